"""tfwn's layers, configured for a program's network."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import tfwn


class ConstantG(tf.Module):
    """w = g v with a trainable v and a constant g, which is set by data-dependent initialization.

    It replaces a layer's weight in the normal parameterization.
    """

    def __init__(self, weight: tfwn.Weight):
        super().__init__()
        self.weight = weight
        self.g = tf.Variable(tf.ones(weight.g_shape), trainable=False, name="g")

    def __call__(self) -> tf.Tensor:
        """Returns w."""
        v = self.weight()
        return v * tf.cast(self.g, v.dtype)

    def direction(self) -> tf.Tensor:
        """Returns w / ||w||."""
        return self.weight.direction()

    def get_g(self) -> tf.Tensor:
        """Returns ||w||."""
        return self.g * self.weight.get_g()

    def set_g(self, g) -> None:
        """Sets the constant g so that ||w|| equals the argument."""
        norm = self.weight.get_g()
        self.g.assign(tf.math.divide_no_nan(tf.reshape(g, norm.shape), norm))


class _WithConstantG:
    weight: Any

    def _initialize(self, input_shape: Any) -> None:
        super()._initialize(input_shape)  # type: ignore[misc]
        self.weight = ConstantG(self.weight)


class _Dense(_WithConstantG, tfwn.Dense):
    pass


class _Conv2D(_WithConstantG, tfwn.Conv2D):
    pass


class Layers:
    """Creates the layers of a network.

    Each layer has an attribute `init_scale`, the standard deviation of its pre-activations after
    data-dependent initialization.

    Args:
      parameterization: "normal" or "weight_norm".
      initializer: a function that returns v's initializer for a layer's index, counted from 0.
      compute_dtype: the dtype of inputs and products.
      dtype: the dtype of the variables.
      frozen_g: whether the normal parameterization is w = g v with a constant g.
    """

    def __init__(
        self,
        parameterization: str,
        initializer: Callable[[int], Any],
        compute_dtype: tf.DType = tf.float32,
        dtype: tf.DType = tf.float32,
        frozen_g: bool = False,
    ):
        self._shared = {
            "parameterization": parameterization,
            "compute_dtype": compute_dtype,
            "dtype": dtype,
        }
        self._kinds: tuple[Any, Any] = (tfwn.Dense, tfwn.Conv2D)
        if frozen_g:
            self._kinds = _Dense, _Conv2D
        self._initializers = map(initializer, itertools.count())

    def dense(self, units: int, *, init_scale: float = 1.0, **choices: Any) -> tfwn.Dense:
        """Returns a fully connected layer; `choices` are passed to tfwn.Dense."""
        return self._make(self._kinds[0], init_scale, units, choices)

    def conv(
        self, filters: int, kernel: int = 3, strides: int = 1, *, init_scale: float = 1.0,
        padding: str = "same", **choices: Any,
    ) -> tfwn.Conv2D:  # fmt: skip
        """Returns a convolution; `choices` are passed to tfwn.Conv2D."""
        choices |= {"kernel_size": kernel, "strides": strides, "padding": padding}
        return self._make(self._kinds[1], init_scale, filters, choices)

    def _make(self, kind: Any, init_scale: float, units: int, choices: dict[str, Any]) -> Any:
        v = next(self._initializers)
        layer = kind(units, **{**self._shared, "kernel_initializer": v, **choices})
        layer.init_scale = init_scale
        return layer


def initial(config: Any) -> Callable[[int], Any]:
    """Returns the initializers of section 3, v ~ N(0, 0.05), or Glorot's if `config.frozen_g`.

    The paper's code uses Glorot's in its normal parameterization, where g is constant.
    """
    if config.frozen_g:
        return lambda index: tf.keras.initializers.GlorotUniform(1000 * config.seed + index)
    return normal(config.seed)


def normal(seed: int) -> Callable[[int], Any]:
    """Returns the initializers of section 3: v ~ N(0, 0.05), independent for each layer."""
    return lambda index: functools.partial(
        tf.random.stateless_normal, seed=[seed, index], stddev=0.05
    )
