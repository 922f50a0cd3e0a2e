"""The few densities that generative models need, elementwise, and means of exponentials."""

import math

import numpy as np
import tensorflow as tf


def log_normal(x, mean, log_sigma) -> tf.Tensor:
    """Returns log N(x; mean, sigma^2)."""
    return -0.5 * (math.log(2 * math.pi) + tf.square((x - mean) * tf.exp(-log_sigma))) - log_sigma


def log_discretized_logistic(x, mean, log_scale, open_ends: bool = False) -> tf.Tensor:
    """Returns log P of that of 256 intervals of (-1/2, 1/2) in which x lies.

    P = sigmoid((x + 1/256 - mean) / scale) - sigmoid((x - mean) / scale), x floored to 1/256, and
    1e-7 more. All 256 add up to the logistic's mass in [-1/2, 1/2]; with `open_ends`, where the
    first and the last interval reach to infinity, to 1.
    """
    low = tf.floor(x * 256) / 256
    below, above = (tf.sigmoid((end - mean) * tf.exp(-log_scale)) for end in (low, low + 1 / 256))
    if open_ends:
        below = tf.where(low <= -0.5, 0.0, below)
        above = tf.where(low >= 0.5 - 1 / 256, 1.0, above)
    return tf.math.log(above - below + 1e-7)


def log_mean_exp(log_w: np.ndarray) -> np.ndarray:
    """Returns log(mean(exp(log_w))) over the first axis."""
    top = log_w.max(0)
    return top + np.log(np.exp(log_w - top).mean(0))
