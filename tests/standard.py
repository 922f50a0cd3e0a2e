"""Inputs for data-dependent initialization, and the check of what it promises."""

import numpy as np
import tensorflow as tf


def images(count=32, size=10, channels=3):
    """Returns images with mean 3, so that the pre-activations' means matter."""
    return tf.random.stateless_normal([count, size, size, channels], [1, 2], mean=3.0)


def check_standard(t, axis=-1, scale=1.0):
    """Asserts that each unit of t / scale has mean 0 to 1e-5 and variance 1 to 1e-4."""
    t = np.asarray(t, np.float64)
    others = tuple(a for a in range(t.ndim) if a not in {a % t.ndim for a in np.atleast_1d(axis)})
    assert np.max(np.abs(t.mean(others))) < 1e-5 * scale
    assert np.max(np.abs(t.var(others) / scale**2 - 1)) < 1e-4
