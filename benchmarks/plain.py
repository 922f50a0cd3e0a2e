"""Replaces the op in the layers by the fastest formula in plain TensorFlow."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

import tfwn.weight

NAME = "weight_norm in plain TF"


@contextlib.contextmanager
def weight_norm() -> Iterator[None]:
    """While active, layers compute w in plain TensorFlow. Functions traced then keep doing so."""
    compiled, tfwn.weight.weight_norm = tfwn.weight.weight_norm, _weight_norm
    try:
        yield
    finally:
        tfwn.weight.weight_norm = compiled


def _weight_norm(v, g, axis=-1, *, out_dtype=None, name=None):
    """Eq. 2 for units along the last axis, as in all layers of the four programs.

    The lower bound is l2_normalize's: some units of the auto-encoders' flow are fully masked.
    """
    square = tf.reduce_sum(tf.square(v), list(range(v.shape.rank - 1)), keepdims=True)
    w = v * (g * tf.math.rsqrt(tf.maximum(square, 1e-12)))
    return tf.cast(w, out_dtype or v.dtype)
