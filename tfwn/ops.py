"""The op: w = g * v / ||v|| (paper, eq. 2) and its gradient (eq. 3)."""

import tensorflow as tf


def weight_norm(v, g, axis=-1, *, out_dtype=None, name=None):
    """Returns w = g * v / ||v||, the norm over all axes of v but `axis`."""
    with tf.name_scope(name or "weight_norm"):
        v = tf.convert_to_tensor(v)
        g = tf.convert_to_tensor(g)
        kept = [] if axis is None else [axis] if isinstance(axis, int) else list(axis)
        kept = [a % v.shape.rank for a in kept]
        reduced = [a for a in range(v.shape.rank) if a not in kept]
        wide = tf.float64 if v.dtype == tf.float64 else tf.float32
        v_wide = tf.cast(v, wide)
        square = tf.reduce_sum(v_wide * v_wide, reduced, keepdims=True)
        g = tf.reshape(tf.cast(g, wide), tf.shape(square))
        inverse = tf.where(square > 0, tf.math.rsqrt(tf.where(square > 0, square, 1.0)), 0.0)
        return tf.cast(v_wide * (g * inverse), out_dtype or v.dtype)
