"""Weight norm as TensorFlow users write it, in place of the operation in the layers."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

import tfwn.weight

NAME = "weight_norm in plain TF"


@contextlib.contextmanager
def weight_norm() -> Iterator[None]:
    """While active, layers compute w in plain TensorFlow: what is traced then goes on with it."""
    compiled, tfwn.weight.weight_norm = tfwn.weight.weight_norm, _weight_norm
    try:
        yield
    finally:
        tfwn.weight.weight_norm = compiled


def _weight_norm(v, g, axis=-1, *, out_dtype=None, name=None):
    """Eq. 2; the units of the layers of the four programs are the last axis.

    The epsilon of l2_normalize matters: some units of the auto-encoders' flow are masked in full.
    """
    w = tf.math.l2_normalize(v, list(range(v.shape.rank - 1))) * g
    return tf.cast(w, out_dtype or v.dtype)
