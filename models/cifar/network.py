"""The network of table A, row by row, and its initialization."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

import tfwn
from models.cifar.batch_norm import BatchNormalization
from models.cifar.config import Config
from models.common import layers, replicas


class GaussianNoise(tf.Module):
    """Adds Gaussian noise in training: x + stddev * noise."""

    def __init__(self, stddev):
        super().__init__()
        self.stddev = stddev

    def __call__(self, x, training, seed):
        """Returns x, with noise in training."""
        if not training:
            return x
        return x + tf.cast(self.stddev * replicas.normal_like(x, seed), x.dtype)


class Dropout(tf.Module):
    """In training, zeroes elements with probability `rate` and divides the rest by 1 - rate."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def __call__(self, x, training, seed):
        """Returns x, with elements dropped in training."""
        if not training:
            return x
        kept = replicas.uniform_like(x, seed) >= self.rate
        return tf.where(kept, x / (1 - self.rate), tf.zeros([], x.dtype))


class Pool(tf.Module):
    """2x2 max pooling with stride 2, or global average pooling."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __call__(self, x, training, seed):
        """Returns the pooled x."""
        if self.kind == "average":
            return tf.reduce_mean(x, [1, 2])
        return tf.nn.max_pool2d(x, 2, 2, "VALID")


def leaky_relu(t, slope):
    """Returns max(t, slope * t), with a gradient computed from the output alone.

    TensorFlow can then discard t and fuse the activation with the convolution and b. The built-in
    gradient reads t, which makes Grappler report "remapper failed".
    """

    @tf.custom_gradient
    def activate(t):
        y = tf.nn.leaky_relu(t, slope)
        return y, lambda grad: tf.raw_ops.LeakyReluGrad(gradients=grad, features=y, alpha=slope)

    return activate(t)


class Layer(tf.Module):
    """Computes act(w x + b), with w parameterized as the Config says."""

    def __init__(self, config, make, units, kernel=None, padding="same", activation=True):
        super().__init__()
        kind = config.parameterization
        self.leak = config.leak if activation else None
        use_bias = kind in ("normal", "weight_norm")
        if kernel is None:
            self.linear = make.dense(units, use_bias=use_bias)
        else:
            self.linear = make.conv(units, kernel, padding=padding, use_bias=use_bias)
        self.norm: Any = None
        if kind == "batch_norm":
            self.norm = BatchNormalization(
                units, config.bn_momentum, config.bn_epsilon, config.synchronized
            )
        elif kind.endswith("mean_only_bn"):
            self.norm = tfwn.MeanOnlyBatchNormalization(
                momentum=config.bn_momentum,
                synchronized=config.synchronized,
                compute_dtype=self.linear.compute_dtype,
            )

    def __call__(self, x, training, seed):
        """Returns the layer's outputs."""
        t = self.linear(x)
        if self.norm is not None:
            t = self.norm(t, training)
        return t if self.leak is None else leaky_relu(t, self.leak)


class Network(tf.Module):
    """Table A. `rows` lists its rows after ZCA whitening, with the paper's names."""

    def __init__(self, config: Config, dtype=tf.float32):
        super().__init__()
        self.dtype, width = dtype, config.width
        kind = "weight_norm" if config.parameterization.startswith("weight_norm") else "normal"
        make = layers.Layers(kind, layers.initial(config), dtype, frozen_g=config.frozen_g)
        layer = functools.partial(Layer, config, make)
        self.rows: list[tuple[str, Any]] = [
            ("Gaussian noise", GaussianNoise(config.noise)),
            ("3x3 conv leaky ReLU", layer(width, 3)),
            ("3x3 conv leaky ReLU", layer(width, 3)),
            ("3x3 conv leaky ReLU", layer(width, 3)),
            ("2x2 max pool, str. 2", Pool("max")),
            ("dropout", Dropout(config.dropout)),
            ("3x3 conv leaky ReLU", layer(2 * width, 3)),
            ("3x3 conv leaky ReLU", layer(2 * width, 3)),
            ("3x3 conv leaky ReLU", layer(2 * width, 3)),
            ("2x2 max pool, str. 2", Pool("max")),
            ("dropout", Dropout(config.dropout)),
            ("3x3 conv leaky ReLU", layer(2 * width, 3, "valid")),
            ("1x1 conv leaky ReLU", layer(2 * width, 1)),
            ("1x1 conv leaky ReLU", layer(2 * width, 1)),
            ("global average pool", Pool("average")),
            ("softmax output", layer(10, activation=False)),
        ]

    def __call__(self, images, training=False, seed=None) -> tf.Tensor:
        """Returns float32 logits [examples, 10].

        Args:
          images: float32 [examples, 32, 32, 3], whitened.
          training: use noise, dropout and batch moments.
          seed: int64 [2], seeds noise and dropout; required in training.
        """
        x = tf.cast(images, self.dtype)
        for index, (_, row) in enumerate(self.rows):
            x = row(x, training, replicas.fold_in(seed, index) if training else None)
        return tf.cast(x, tf.float32)


def initialize(config: Config, network: Network, images: np.ndarray) -> None:
    """Applies the initialization of section 3, so all parameterizations start as one function.

    Batch norm needs none, because with gamma = 1 and beta = 0 it normalizes v's outputs itself.
    """
    if config.parameterization == "batch_norm":
        return
    seed = tf.constant([config.seed, 0], tf.int64)
    # Every replica sees the whole batch, so all compute the same values.
    tfwn.data_dependent_init(lambda x: network(x, training=True, seed=seed), tf.constant(images))
