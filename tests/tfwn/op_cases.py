"""Helpers for testing the op under TensorFlow's transformations."""

import numpy as np
import pytest
import tensorflow as tf

LAYOUTS = [
    pytest.param((7, 5), -1, id="dense"),
    pytest.param((3, 2, 4, 5), (-2, -1), id="depthwise"),
    pytest.param((3, 6, 4), 1, id="interior"),
    pytest.param((4, 9), 0, id="rows"),
    pytest.param((4, 5), None, id="whole"),
    pytest.param((3, 4, 5), (2, 0), id="out of order"),
]


def plain(v, g, axis=-1):
    """Eq. 2 in plain TensorFlow ops, whose gradients serve as reference."""
    axes = [] if axis is None else [axis] if isinstance(axis, int) else list(axis)
    axes = [a % v.shape.rank for a in axes]
    rest = [a for a in range(v.shape.rank) if a not in axes]
    length = tf.sqrt(tf.reduce_sum(v * v, rest, keepdims=True))
    return tf.reshape(tf.transpose(g, np.argsort(axes)), length.shape) * v / length


def arguments(rng, shape, axis, dtype=tf.float64):
    """Returns random v and g, and random coefficients of v's shape."""
    axes = [] if axis is None else [axis] if isinstance(axis, int) else axis
    shapes = shape, [shape[a] for a in axes], shape
    return [tf.constant(rng.normal(size=s), dtype) for s in shapes]


def assert_close(outputs, expected, rtol=1e-11, atol=1e-12):
    for out, truly in zip(tf.nest.flatten(outputs), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(out, truly, rtol=rtol, atol=atol)


def second_derivatives(f, v, g, c, axis):
    """Returns second derivatives of a function that is nonlinear in w, grad_v and grad_g."""
    with tf.GradientTape() as outer:
        outer.watch([v, g, c])
        with tf.GradientTape() as inner:
            inner.watch([v, g])
            y = tf.reduce_sum(tf.sin(c * f(v, g, axis)))
        grad_v, grad_g = inner.gradient(y, [v, g])
        z = [tf.reduce_sum(tf.sin(grad_v)), tf.reduce_sum(tf.cos(grad_g))]
    return outer.gradient(z, [v, g, c])
