"""Layers of tfwn as a program's Config asks for them, and the convolution that doubles a size."""

import functools
import itertools
from typing import Any

import tensorflow as tf

import tfwn


class Layers:
    """Makes a network's layers, v ~ N(0, 0.05): one parameterisation, and each with its own seed.

    Each has `init_scale`, the standard deviation that its pre-activations are to get from
    data-dependent initialization.

    Args:
      config: with `seed` and `parameterization`.
      dtype: compute type.
    """

    def __init__(self, config: Any, dtype):
        self._config, self._dtype, self._count = config, dtype, itertools.count()

    def _make(self, kind, *sizes, init_scale=1.0, **choices) -> Any:
        seed = [self._config.seed, next(self._count)]
        layer = kind(
            *sizes,
            parameterization=self._config.parameterization,
            kernel_initializer=functools.partial(
                tf.random.stateless_normal, seed=seed, stddev=0.05
            ),
            compute_dtype=self._dtype,
            **choices,
        )
        layer.init_scale = init_scale
        return layer

    def dense(self, units, **choices) -> tfwn.Dense:
        """Returns a fully connected layer."""
        return self._make(tfwn.Dense, units, **choices)

    def conv(self, filters, kernel=3, strides=1, **choices) -> tfwn.Conv2D:
        """Returns a convolution."""
        return self._make(tfwn.Conv2D, filters, kernel, strides, padding="same", **choices)


class Upsampling(tf.Module):
    """A convolution that doubles height and width."""

    def __init__(self, layers: Layers, filters, kernel=3, **choices):
        super().__init__()
        self.conv = layers.conv(4 * filters, kernel, **choices)

    def __call__(self, x):
        """Returns [batch, 2 height, 2 width, filters]."""
        return tf.nn.depth_to_space(self.conv(x), 2)
