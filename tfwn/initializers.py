"""Initializers by their Keras names, in plain TensorFlow: independent of Keras and its backend."""

import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

_v1 = tf.compat.v1


def initial_value(initializer, shape, dtype) -> tf.Tensor:
    """Returns the value of an initializer: a number, a Keras name or a callable(shape, dtype)."""
    shape = tuple(tf.TensorShape(shape).as_list())
    if isinstance(initializer, str):
        # TensorFlow has no QR decomposition, which "orthogonal" needs, in half precision.
        wide = tf.float64 if dtype == tf.float64 else tf.float32
        return tf.cast(_named(initializer)(shape, dtype=wide), dtype)
    if not callable(initializer) and np.ndim(initializer):
        raise ValueError(f"{_RULE}, got one of type {type(initializer).__name__}")
    if not callable(initializer):
        return tf.fill(shape, tf.cast(initializer, dtype))
    return tf.cast(tf.convert_to_tensor(initializer(shape, dtype=dtype.name)), dtype)


def snake_case(name: str) -> str:
    """Converts a class name to Keras' snake case: conv2d, where tf.Module would use conv2_d."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _named(name: str) -> Callable:
    key = snake_case(name)
    if key not in _INITIALIZERS:
        raise ValueError(f"{_RULE}, got {name!r}")
    return _INITIALIZERS[key]


def _scaled(scale, mode, distribution):
    return _v1.variance_scaling_initializer(scale, mode, distribution)


_normal = tf.random_normal_initializer(0.0, 0.05)
_uniform = tf.random_uniform_initializer(-0.05, 0.05)
_zeros = tf.zeros_initializer()
_ones = tf.ones_initializer()

_INITIALIZERS = {
    "glorot_normal": _scaled(1.0, "fan_avg", "truncated_normal"),
    "glorot_uniform": _scaled(1.0, "fan_avg", "uniform"),
    "he_normal": _scaled(2.0, "fan_in", "truncated_normal"),
    "he_uniform": _scaled(2.0, "fan_in", "uniform"),
    "identity": _v1.initializers.identity(),
    "lecun_normal": _scaled(1.0, "fan_in", "truncated_normal"),
    "lecun_uniform": _scaled(1.0, "fan_in", "uniform"),
    "normal": _normal,
    "one": _ones,
    "ones": _ones,
    "orthogonal": _v1.orthogonal_initializer(),
    "random_normal": _normal,
    "random_uniform": _uniform,
    "truncated_normal": _v1.truncated_normal_initializer(stddev=0.05),
    "uniform": _uniform,
    "variance_scaling": _scaled(1.0, "fan_in", "truncated_normal"),
    "zero": _zeros,
    "zeros": _zeros,
}
_RULE = (
    "an initializer must be a number, a callable(shape, dtype) or one of "
    f"{', '.join(sorted(_INITIALIZERS))}"
)
