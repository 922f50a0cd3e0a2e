"""Layers of tfwn as a program's Config asks for them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import tfwn


class Layers:
    """Makes a network's layers.

    Each layer has an attribute `init_scale`: the standard deviation that data-dependent
    initialization gives to its pre-activations.

    Args:
      parameterization: "normal" or "weight_norm".
      initializer: returns v's initializer for the n-th layer, n counted from 0.
      compute_dtype: of inputs and products.
      dtype: of the variables.
    """

    def __init__(
        self,
        parameterization: str,
        initializer: Callable[[int], Any],
        compute_dtype: tf.DType = tf.float32,
        dtype: tf.DType = tf.float32,
    ):
        self._shared = {
            "parameterization": parameterization,
            "compute_dtype": compute_dtype,
            "dtype": dtype,
        }
        self._initializers = map(initializer, itertools.count())

    def dense(self, units: int, *, init_scale: float = 1.0, **choices: Any) -> tfwn.Dense:
        """Returns a fully connected layer; `choices` are tfwn.Dense's."""
        return self._make(tfwn.Dense, init_scale, units, choices)

    def conv(
        self, filters: int, kernel: int = 3, strides: int = 1, *, init_scale: float = 1.0,
        padding: str = "same", **choices: Any,
    ) -> tfwn.Conv2D:  # fmt: skip
        """Returns a convolution; `choices` are tfwn.Conv2D's."""
        choices |= {"kernel_size": kernel, "strides": strides, "padding": padding}
        return self._make(tfwn.Conv2D, init_scale, filters, choices)

    def _make(self, kind: Any, init_scale: float, units: int, choices: dict[str, Any]) -> Any:
        v = next(self._initializers)
        layer = kind(units, **{**self._shared, "kernel_initializer": v, **choices})
        layer.init_scale = init_scale
        return layer


def normal(seed: int) -> Callable[[int], Any]:
    """Returns the initializers of section 3: v ~ N(0, 0.05), drawn for each layer anew."""
    return lambda index: functools.partial(
        tf.random.stateless_normal, seed=[seed, index], stddev=0.05
    )
