"""Activations by their Keras names, in plain TensorFlow: independent of Keras and its backend."""

import tensorflow as tf


def get_activation(activation):
    """Returns the activation for a Keras name; a callable or None is returned unchanged."""
    if not isinstance(activation, str):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be a callable, None or one of {', '.join(sorted(_ACTIVATIONS))}, "
            f"got {activation!r}"
        )
    return _ACTIVATIONS[activation]


def _glu(x):
    a, b = tf.split(x, 2, -1)
    return a * tf.sigmoid(b)


def _hard_shrink(x):
    return tf.where(tf.abs(x) > 0.5, x, tf.zeros_like(x))


def _hard_sigmoid(x):
    return tf.nn.relu6(x + 3) / 6


def _hard_silu(x):
    return x * _hard_sigmoid(x)


def _hard_tanh(x):
    return tf.clip_by_value(x, -1, 1)


def _leaky_relu(x):
    return tf.nn.leaky_relu(x, 0.2)


def _mish(x):
    return x * tf.tanh(tf.nn.softplus(x))


def _soft_shrink(x):
    return tf.sign(x) * tf.nn.relu(tf.abs(x) - 0.5)


def _sparse_plus(x):
    middle = tf.square(x + 1) / 4
    return tf.where(x <= -1, tf.zeros_like(x), tf.where(x < 1, middle, x))


def _sparse_sigmoid(x):
    return tf.clip_by_value((x + 1) / 2, 0, 1)


def _sparsemax(x):
    """Returns the point of the simplex nearest to x (Martins & Astudillo 2016)."""
    descending = tf.sort(x, direction="DESCENDING")
    total = tf.cumsum(descending, -1)
    count = tf.range(1, tf.shape(x)[-1] + 1)
    positive = tf.cast(1 + tf.cast(count, x.dtype) * descending > total, tf.int32)
    support = tf.reduce_sum(positive, -1, keepdims=True)
    threshold = (tf.gather(total, support - 1, batch_dims=x.shape.rank - 1) - 1) / tf.cast(
        support, x.dtype
    )
    return tf.nn.relu(x - threshold)


def _squareplus(x):
    return (x + tf.sqrt(tf.square(x) + 4)) / 2


def _tanh_shrink(x):
    return x - tf.tanh(x)


_ACTIVATIONS = {
    "celu": tf.nn.elu,  # Equal for celu's default, alpha=1.
    "elu": tf.nn.elu,
    "exponential": tf.exp,
    "gelu": tf.nn.gelu,
    "glu": _glu,
    "hard_shrink": _hard_shrink,
    "hard_sigmoid": _hard_sigmoid,
    "hard_silu": _hard_silu,
    "hard_swish": _hard_silu,
    "hard_tanh": _hard_tanh,
    "leaky_relu": _leaky_relu,
    "linear": tf.identity,
    "log_sigmoid": tf.math.log_sigmoid,
    "log_softmax": tf.nn.log_softmax,
    "mish": _mish,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "selu": tf.nn.selu,
    "sigmoid": tf.sigmoid,
    "silu": tf.nn.silu,
    "soft_shrink": _soft_shrink,
    "softmax": tf.nn.softmax,
    "softplus": tf.nn.softplus,
    "softsign": tf.nn.softsign,
    "sparse_plus": _sparse_plus,
    "sparse_sigmoid": _sparse_sigmoid,
    "sparsemax": _sparsemax,
    "squareplus": _squareplus,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
    "tanh_shrink": _tanh_shrink,
}
