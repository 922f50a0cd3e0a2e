"""The CIFAR-10 model: a ResNet with several stochastic layers, each with a flow."""

import functools
from typing import Any

import tensorflow as tf

from models.common import layers, replicas
from models.vae.config import Config
from models.vae.flow import Autoregressive, Upsampling, log_normal


class StochasticLayer(tf.Module):
    """One z, with its part of the bottom-up pass (posterior) and the top-down pass (prior).

    With `halves`, it works at half the resolution of the layer below. The bottom-up pass ends at
    the `top` layer.
    """

    def __init__(self, config: Config, make: layers.Layers, halves: bool, top: bool):
        super().__init__()
        conv = functools.partial(make.conv, init_scale=0.1)
        h, z = config.features, config.latent_maps
        self.h, self.z, self.halves = h, z, halves
        self.up_split = conv(2 * h + 2 * z, strides=2 if halves else 1)
        self.up_out = None if top else conv(h)
        self.down_split = conv(2 * h + 4 * z)
        self.flow = Autoregressive(make, z, [h] * config.flow_layers, convolutional=True)
        self.down_out: Any = Upsampling(make, h, init_scale=0.1) if halves else conv(h)

    def up(self, x):
        """Returns the next x going up, and the posterior's mu, log sigma and context."""
        split = self.up_split(tf.nn.elu(x))
        det, *posterior = tf.split(split, [self.h, self.z, self.z, self.h], -1)
        if self.up_out is None:
            return None, posterior
        if self.halves:
            x = tf.nn.avg_pool2d(x, 2, 2, "VALID")
        return x + 0.1 * self.up_out(tf.nn.elu(det)), posterior

    def down(self, x, posterior, seed):
        """Returns the next x going down, and log q(z) - log p(z), [batch, maps].

        If `posterior` is None, z is drawn from the prior and the second result is None.
        """
        split = self.down_split(tf.nn.elu(x))
        det, *moments, context = tf.split(split, [self.h, *4 * [self.z], self.h], -1)
        mu_p, log_sigma_p, mu_r, log_sigma_r = (tf.cast(t, tf.float32) for t in moments)
        noise, kl = replicas.normal_like(mu_p, seed), None
        if posterior is None:
            z = mu_p + tf.exp(log_sigma_p) * noise
        else:
            mu_q, log_sigma_q, context_q = posterior
            log_sigma = log_sigma_r + tf.cast(log_sigma_q, tf.float32)
            z0 = mu_r + tf.cast(mu_q, tf.float32) + tf.exp(log_sigma) * noise
            z, log_q = self.transform(
                z0, log_normal(noise, 0.0, 0.0) - log_sigma, context + context_q
            )
            kl = tf.reduce_sum(log_q - log_normal(z, mu_p, log_sigma_p), [1, 2])
        if self.halves:
            x = tf.repeat(tf.repeat(x, 2, 1), 2, 2)
        det = tf.concat([det, tf.cast(z, det.dtype)], -1)
        return x + 0.1 * self.down_out(tf.nn.elu(det)), kl

    def transform(self, z, log_q, context):
        """Applies the flow: z <- (z - m) / exp(s), log q <- log q + s."""
        m, s = (0.1 * t for t in self.flow(z, context))
        return (z - m) * tf.exp(-s), log_q + s


class CifarVAE(tf.Module):
    """Models x in (-1/2, 1/2) with several z; the prior of each depends on those above it."""

    def __init__(self, config: Config, dtype=tf.float32):
        super().__init__()
        make = layers.Layers(
            config.parameterization, layers.initial(config), dtype, frozen_g=config.frozen_g
        )
        self.dtype, self.open_ends = dtype, config.open_ends
        levels = len(config.stochastic_layers)
        self.top_size, h = 16 >> (levels - 1), config.features
        self.first = make.conv(h, 5, 2, init_scale=0.1)
        halves = [
            level > 0 and i == 0
            for level, count in enumerate(config.stochastic_layers)
            for i in range(count)
        ]
        self.layers = [
            StochasticLayer(config, make, half, top=index == len(halves) - 1)
            for index, half in enumerate(halves)
        ]
        self.top = tf.Variable(tf.zeros([h]), name="top")
        self.last = Upsampling(make, 3, 5, init_scale=0.1)
        self.log_scale = tf.Variable(tf.zeros([3]), name="log_scale")  # The logistic's, by color.

    def __call__(self, x, seed):
        """Returns log p(x|z), float32 [batch], and log q(z|x) - log p(z), [batch, maps of all z].

        Args:
          x: float32 [batch, 32, 32, 3].
          seed: int64 [2], seeds z.
        """
        mean, kl = self.down(self.up(x), tf.shape(x)[0], seed)
        log_px = log_discretized_logistic(x, mean, self.log_scale, self.open_ends)
        return tf.reduce_sum(log_px, [1, 2, 3]), tf.concat(kl, -1)

    def up(self, x):
        """Returns each layer's parameters of the posterior."""
        x, posteriors = self.first(x), []
        for layer in self.layers:
            x, posterior = layer.up(x)
            posteriors.append(posterior)
        return posteriors

    def down(self, posteriors, count, seed):
        """Returns the pixels' means, float32 [count, 32, 32, 3], and each layer's KL."""
        size = self.top_size
        x = tf.cast(tf.tile(self.top[None, None, None], [count, size, size, 1]), self.dtype)
        kls = []
        for index, layer in reversed(list(enumerate(self.layers))):
            posterior = posteriors[index] if posteriors else None
            x, kl = layer.down(x, posterior, replicas.fold_in(seed, index))
            kls.append(kl)
        mean = 0.1 * tf.cast(self.last(tf.nn.elu(x)), tf.float32)
        return tf.clip_by_value(mean, 1 / 512 - 0.5, 0.5 - 1 / 512), kls

    def sample(self, count: int, seed) -> tf.Tensor:
        """Draws all z from the prior; returns the pixels' means, in [0, 1]."""
        return self.down(None, count, seed)[0] + 0.5

    def reconstruct(self, x, seed) -> tf.Tensor:
        """Draws all z from q(z|x); returns the pixels' means, in [0, 1]."""
        return self.down(self.up(x), tf.shape(x)[0], seed)[0] + 0.5


def log_discretized_logistic(x, mean, log_scale, open_ends: bool = False) -> tf.Tensor:
    """Returns log P of the interval that contains x, one of 256 equal parts of (-1/2, 1/2).

    P = sigmoid((x + 1/256 - mean) / scale) - sigmoid((x - mean) / scale) + 1e-7, where x is rounded
    down to a multiple of 1/256. The 256 P sum to the logistic's mass in [-1/2, 1/2], or to 1 with
    `open_ends`, which extends the first and the last interval to infinity.
    """
    low = tf.floor(x * 256) / 256
    below, above = (tf.sigmoid((end - mean) * tf.exp(-log_scale)) for end in (low, low + 1 / 256))
    if open_ends:
        below = tf.where(low <= -0.5, 0.0, below)
        above = tf.where(low >= 0.5 - 1 / 256, 1.0, above)
    return tf.math.log(above - below + 1e-7)
