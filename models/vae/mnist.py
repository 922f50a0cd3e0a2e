"""The MNIST model: ResNet blocks, one z, and a flow on its posterior."""

import math
from typing import Any

import tensorflow as tf

from models.common import layers, replicas
from models.vae.config import Config
from models.vae.flow import Autoregressive, Upsampling, log_normal


class Block(tf.Module):
    """elu(skip(x) + .1 conv2(elu(conv1(x)))); `down` halves the resolution, `up` doubles it."""

    def __init__(self, make: layers.Layers, inputs, outputs, down=False, up=False):
        super().__init__()
        self.conv1 = make.conv(inputs if up else outputs, strides=2 if down else 1)
        self.conv2 = Upsampling(make, outputs) if up else make.conv(outputs)
        self.skip: Any = None
        if up:
            self.skip = Upsampling(make, outputs, 1)
        elif down:
            self.skip = make.conv(outputs, 2, 2)
        elif inputs != outputs:
            self.skip = make.conv(outputs, 1)

    def __call__(self, x):
        """Returns [batch, height, width, outputs]."""
        skip = x if self.skip is None else self.skip(x)
        return tf.nn.elu(skip + 0.1 * self.conv2(tf.nn.elu(self.conv1(x))))


class MnistVAE(tf.Module):
    """Models x in {0, 1} with p(z) = N(0, 1); q(z|x) is a Gaussian transformed by the flow."""

    def __init__(self, config: Config, dtype=tf.float32):
        super().__init__()
        make = layers.Layers(
            config.parameterization, layers.initial(config), dtype, frozen_g=config.frozen_g
        )
        self.latents, maps, last = config.latents, config.maps, config.blocks - 1
        self.encoder: list[Any] = []
        for stage, outputs in enumerate(maps):
            for i in range(config.blocks):
                inputs = (1, *maps)[stage] if i == 0 else outputs
                self.encoder.append(Block(make, inputs, outputs, down=stage > 0 and i == 0))
        self.encoder_dense = make.dense(config.hidden, activation=tf.nn.elu)
        # mu, log sigma and the context of the flow.
        self.posterior = make.dense(2 * config.latents + config.made[0], init_scale=0.1)
        self.flow = [
            Autoregressive(make, config.latents, config.made, init_scale=0.1)
            for _ in range(config.flow_steps)
        ]
        self.decoder_dense = [
            make.dense(units, activation=tf.nn.elu) for units in (config.hidden, 7 * 7 * maps[-1])
        ]
        self.decoder: list[Any] = []
        for stage, inputs in reversed(list(enumerate(maps))):
            for i in range(config.blocks):
                up = stage > 0 and i == last
                self.decoder.append(Block(make, inputs, maps[stage - 1] if up else inputs, up=up))
        self.logits = make.conv(1, init_scale=0.1)

    def __call__(self, x, seed):
        """Returns log p(x|z), float32 [batch], and log q(z|x) - log p(z), [batch, latents].

        Args:
          x: float32 [batch, 28, 28, 1].
          seed: int64 [2], seeds z.
        """
        z, log_q = self.encode(x, seed)
        log_px = -tf.nn.sigmoid_cross_entropy_with_logits(x, self.decode(z))
        return tf.reduce_sum(log_px, [1, 2, 3]), log_q - log_normal(z, 0.0, 0.0)

    def encode(self, x, seed):
        """Draws z from q(z|x); returns z and log q(z|x), both float32 [batch, latents]."""
        mu, log_sigma, context = self.moments(x)
        # Folded, because [seed, 1], [seed, 2], ... also seed the layers' v.
        noise = replicas.normal_like(mu, replicas.fold_in(seed, 0))
        z = mu + tf.exp(log_sigma) * noise
        return self.transform(z, log_normal(noise, 0.0, 0.0) - log_sigma, context)

    def moments(self, x):
        """Returns mu and log sigma of the Gaussian, and the context of the flow."""
        for block in self.encoder:
            x = block(x)
        h = self.encoder_dense(tf.reshape(x, [-1, math.prod(x.shape[1:])]))
        outputs = tf.cast(self.posterior(h), tf.float32)
        return tf.split(outputs, [self.latents, self.latents, -1], -1)

    def transform(self, z, log_q, context):
        """Applies the flow; each step: z <- sigma z + (1 - sigma) m, log q <- log q - log sigma."""
        for step in self.flow:
            m, s = step(z, context)
            s += 1.5  # Initially sigma is about 0.8, so a step starts close to the identity.
            sigma = tf.sigmoid(s)
            z = sigma * z + (1 - sigma) * m
            log_q -= tf.math.log_sigmoid(s)
            # The next step sees the latents in reverse order.
            z, log_q = tf.reverse(z, [-1]), tf.reverse(log_q, [-1])
        return z, log_q

    def decode(self, z):
        """Returns the pixels' logits, float32 [batch, 28, 28, 1]."""
        for layer in self.decoder_dense:
            z = layer(z)
        x = tf.reshape(z, [-1, 7, 7, z.shape[-1] // 49])
        for block in self.decoder:
            x = block(x)
        return tf.cast(self.logits(x), tf.float32)

    def sample(self, count: int, seed) -> tf.Tensor:
        """Draws z from the prior; returns the pixels' means, in [0, 1]."""
        z = tf.random.stateless_normal([count, self.latents], replicas.fold_in(seed, 0))
        return tf.sigmoid(self.decode(z))

    def reconstruct(self, x, seed) -> tf.Tensor:
        """Draws z from q(z|x); returns the pixels' means, in [0, 1]."""
        return tf.sigmoid(self.decode(self.encode(x, seed)[0]))
