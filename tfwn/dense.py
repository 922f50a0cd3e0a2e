"""Dense: the fully connected layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from tfwn.layer import FeedForward, LayerOptions, check_positive

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Dense(FeedForward):
    """Fully connected layer: act(x . w + b), w = g * v / ||v|| with one g per unit (eq. 1 and 2).

    Argument names and defaults are those of Keras, except that v is initialized from a normal
    distribution with standard deviation 0.05 (paper, section 3). The variables are
    weight.v [in, units], weight.g [units] and b [units].

    Arguments:
      units: number of outputs.
      activation: a callable, a Keras name, or None. `layer.pre_activation(x)` returns x . w + b.
      use_bias: whether to add b.
      kernel_initializer: initializer of v; see `tfwn.Weight`.
      bias_initializer: initializer of b.
      kernel_mask: fixed mask of v, an array that broadcasts to [in, units]; see `tfwn.Weight`.
      name: name of the layer.
      parameterization, exponential_g, g_initializer, dtype, compute_dtype: see `tfwn.Weight`.

    Raises:
      ValueError: if an option is invalid, the inputs have a rank below 2, or the number of input
        channels is unknown or differs from the first call.

    Inputs have shape [..., in]. Outputs have shape [..., units], in compute_dtype.

    >>> layer = tfwn.Dense(4, activation="relu")
    >>> layer(tf.ones([8, 3])).shape
    TensorShape([8, 4])
    >>> [variable.name for variable in layer.trainable_variables]
    ['dense/b:0', 'dense/weight/g:0', 'dense/weight/v:0']
    """

    def __init__(self, units, activation=None, use_bias=True, **options: Unpack[LayerOptions]):
        super().__init__(activation, use_bias, **options)
        self.units = check_positive("units", units)

    def _weight_shape(self, channels):
        return [channels, self.units]

    def _linear(self, x, w):
        return tf.matmul(x, w) if x.shape.rank == 2 else tf.tensordot(x, w, 1)
