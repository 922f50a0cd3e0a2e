"""Embedding: looks up rows of a table by integer ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from tfwn.layer import Layer, check_positive, refuse_initialization
from tfwn.weight import Weight, WeightOptions, check_weight_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Embedding(Layer):
    """Embedding: maps id i to row i of w, w_i = g_i * v_i / ||v_i|| with one g per row (eq. 2).

    Argument names and defaults are those of Keras. Only the rows that are looked up are normalized,
    and the gradients of v and g are sparse. The variables are weight.v [input_dim, output_dim] and
    weight.g [input_dim].

    Arguments:
      input_dim: number of rows; ids lie in [0, input_dim).
      output_dim: length of a row.
      embeddings_initializer: initializer of v; see `tfwn.Weight`. Default: Keras' "uniform".
      mask_zero: whether id 0 is padding; `compute_mask` then returns a mask.
      name: name of the layer.
      weight_options: parameterization, exponential_g, g_initializer, dtype and compute_dtype, see
        `tfwn.Weight`.

    Raises:
      ValueError: if an option is invalid or the ids are not integers.
      RuntimeError: if data-dependent initialization reaches the layer.

    Ids may have any shape. Outputs have this shape plus a last axis of size output_dim, in
    compute_dtype.

    >>> tfwn.Embedding(10, 4)(tf.constant([[1, 2, 1]])).shape
    TensorShape([1, 3, 4])
    """

    def __init__(
        self,
        input_dim,
        output_dim,
        embeddings_initializer="uniform",
        mask_zero=False,
        *,
        name=None,
        **weight_options: Unpack[WeightOptions],
    ):
        super().__init__(name=name)
        self.input_dim = check_positive("input_dim", input_dim)
        self.output_dim = check_positive("output_dim", output_dim)
        self.mask_zero = mask_zero
        self.embeddings_initializer = embeddings_initializer
        self._weight_options = check_weight_options(**weight_options)

    def __call__(self, inputs) -> tf.Tensor:
        """Returns the rows of w for the ids `inputs`."""
        refuse_initialization(self)
        ids = tf.convert_to_tensor(inputs)
        if not ids.dtype.is_integer:
            raise ValueError(f"inputs of {self.name!r} must be integers, got {ids.dtype.name}")
        if ids.dtype != tf.int32:
            ids = tf.cast(ids, tf.int64)
        self.build(ids.shape)
        return self.weight.rows(ids)

    def compute_mask(self, inputs) -> tf.Tensor | None:
        """Returns the mask for a recurrent layer, inputs != 0, or None without `mask_zero`."""
        return tf.not_equal(inputs, 0) if self.mask_zero else None

    def _initialize(self, input_shape):
        self.weight = Weight(
            [self.input_dim, self.output_dim],
            0,
            initializer=self.embeddings_initializer,
            **self._weight_options,
        )
