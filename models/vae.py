"""Convolutional variational auto-encoders (paper, section 5.2; figure 3).

    python -m models.vae --dataset mnist --parameterization weight_norm --data-dir DATA
    python -m models.vae evaluate runs/vae-mnist-paper-weight_norm-0 --eval-samples 100
    python -m models.vae sample runs/vae-mnist-paper-weight_norm-0

The bound on the test images, averaged weights, read off the axes of the paper's figure 3:

    MNIST       -88 to -84 nats, from epoch 50 to 300
    CIFAR-10    8000 to 10000 in 450 epochs: nats of the density of pixels in [0, 1], that is
                3072 ln 2 (8 - b) with b bits/dim; 8000 is b = 4.24, 9500 is 3.54, 10000 is 3.30

The paper gives the encoder's shape and the optimizer; its "auto-regressive variational inference"
is inverse autoregressive flow (Kingma et al. 2016, arXiv 1606.04934: IAF), of which the code for
CIFAR-10 is public ("the code"). What is open, or differs:

 1. MNIST: 32 latents, two flow steps, each a MADE with hidden layers of 320 and 320 (IAF). Pixels
    are drawn once from their intensities with a fixed seed, the same for all runs: --binarization.
    Layers that give parameters of a distribution begin with pre-activations of standard deviation
    0.1, all others with 1 (section 3); on CIFAR-10, as the code: 0.1, and 1 in the flows.
 2. CIFAR-10: the paper does not say how deep: 8 stochastic layers, half of them at 16x16 and half
    at 8x8: --stochastic-layers. The likelihood loses the tails of the logistic beyond the 256
    values, as in the code: --open-ends. The scale of the pixels begins as that of the first
    images (the code: 1), to save the time to learn it.
 3. A transposed convolution of stride 2 is a convolution to four times the channels, and a
    rearrangement (depth to space).
 4. Adamax is the code's: no correction of bias, epsilon inside the maximum.
 5. The average's decay is min(1 - 1 / (10 epochs), (1 + t) / (10 + t)) in step t, for short runs.
 6. Both parameterisations begin as the same function: w = g v / ||v|| after the same
    data-dependent initialisation.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow as tf

import tfwn
from models.common import (
    checkpoints,
    command_line,
    data,
    options,
    plots,
    progress,
    replicas,
    runtime,
)
from models.common.autoregressive import Autoregressive
from models.common.densities import log_discretized_logistic, log_mean_exp, log_normal
from models.common.errors import UserError
from models.common.layers import Layers, Upsampling
from models.common.optimizers import Adamax
from models.common.run import Run

fold_in = functools.partial(tf.random.experimental.stateless_fold_in, alg="philox")


@dataclasses.dataclass(frozen=True)
class Config(options.RunConfig):
    """The hyper-parameters of section 5.2."""

    # MNIST's and CIFAR-10's models differ; synthetic: needs no files.
    dataset: Literal["mnist", "cifar10", "synthetic_mnist", "synthetic_cifar10"] = "mnist"
    parameterization: Literal["normal", "weight_norm"] = "weight_norm"  # Of every layer.
    binarization: Literal["static", "dynamic"] = "static"  # MNIST: pixels drawn once, or each time.
    maps: tuple[int, ...] = (16, 32, 32)  # MNIST: feature maps at 28x28, 14x14 and 7x7.
    blocks: int = 2  # MNIST: ResNet blocks in each of the three sequences.
    hidden: int = 450  # MNIST: units of the fully connected layer.
    latents: int = 32  # MNIST: units of z.
    flow_steps: int = 2  # MNIST: steps of the flow (0: a diagonal posterior).
    made: tuple[int, ...] = (320, 320)  # MNIST: units of each step's hidden layers.
    stochastic_layers: tuple[int, ...] = (4, 4)  # CIFAR-10: how many at 16x16, 8x8, ...
    features: int = 160  # CIFAR-10: feature maps of the deterministic path.
    latent_maps: int = 32  # CIFAR-10: feature maps of each z.
    flow_layers: int = 2  # CIFAR-10: hidden convolutions of each flow.
    open_ends: bool = False  # CIFAR-10: the first and last of 256 values get the logistic's tails.
    free_bits: float | None = None  # Nats a map may cost for free (none: MNIST 0, CIFAR-10 .25).
    data_dependent_init: bool = True  # Section 3; both parameterizations begin as one function.
    init_examples: int = 200  # Images of the data-dependent initialization.
    epochs: int | None = None  # Passes over the training images (none: MNIST 300, CIFAR-10 450).
    train_examples: int | None = None  # Training images used (none: all).
    batch_size: int = 100  # Images per step, over all replicas.
    learning_rate: float = 0.002  # Adamax's.
    beta_1: float = 0.9  # Adamax's decay of the momentum.
    beta_2: float = 0.999  # Adamax's decay of the infinity norm.
    epsilon: float = 1e-8  # Adamax's epsilon.
    average_epochs: float = 10.0  # Epochs over which the parameters are averaged.
    eval_samples: int = 100  # Importance samples of the log-likelihood reported at the end.

    NAMED: ClassVar[frozenset[str]] = options.RunConfig.NAMED | {"binarization", "eval_samples"}
    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size", "--features", "--init-examples")
    FOLDER_FIELDS: ClassVar[tuple[str, ...]] = ("dataset",)
    RANGES = options.ranges(
        "maps blocks hidden latents made stochastic_layers features latent_maps flow_layers "
        "init_examples epochs train_examples batch_size eval_samples",
        "beta_1 beta_2",
    )

    @property
    def binary(self) -> bool:
        """Whether it is MNIST's model, of images of 0 and 1."""
        return "mnist" in self.dataset


PRESETS = {
    "paper": options.Preset("section 5.2 as far as it is known"),
    "cpu": options.Preset(
        "scaled: minutes on two cores; not comparable with the paper's numbers",
        {
            "maps": (8, 16, 16),
            "hidden": 200,
            "made": (160,),
            "stochastic_layers": (1, 2),
            "features": 20,
            "latent_maps": 8,
            "flow_layers": 1,
            "epochs": 5,
            "batch_size": 32,
            "eval_samples": 10,
        },
    ),
    "smoke": options.Preset(
        "only to see that it runs, in less than a minute; its numbers and pictures mean nothing",
        {
            "dataset": "synthetic_mnist",
            "maps": (2, 4, 4),
            "blocks": 1,
            "hidden": 16,
            "latents": 4,
            "made": (8,),
            "stochastic_layers": (1, 1),
            "features": 4,
            "latent_maps": 2,
            "flow_layers": 1,
            "epochs": 2,
            "init_examples": 100,
            "eval_samples": 3,
        },
    ),
}

# By Config.binary: the ends of figure 3's axes, and the code's free bits.
EPOCHS = {True: 300, False: 450}
FREE_BITS = {True: 0.0, False: 0.25}


# Data


def load(config: Config, data_dir: str = "") -> data.Images:
    """Returns the data set as uint8; MNIST's pixels, with static binarization, as 0 or 255."""
    images = data.load(config.dataset, data_dir or config.data_dir)
    train, test = images.train_images, images.test_images
    if config.binary and config.binarization == "static":
        train, test = (255 * part for part in data.binarize(train, test))
    return dataclasses.replace(
        images, train_images=train[: config.train_examples], test_images=test
    )


def prepare(config: Config, images, seed) -> tf.Tensor:
    """Returns uint8 images as the network takes them: MNIST {0, 1}, CIFAR-10 (-1/2, 1/2)."""
    x = tf.cast(images, tf.float32)
    if not config.binary:
        return (x + 0.5) / 256 - 0.5
    if config.binarization == "dynamic":
        return tf.cast(replicas.uniform_like(x, fold_in(seed, 1_000_000)) * 255 < x, tf.float32)
    return x / 255


# MNIST


class Block(tf.Module):
    """elu(skip(x) + .1 conv2(elu(conv1(x)))); `down` halves the resolution, `up` doubles it."""

    def __init__(self, layers: Layers, inputs, outputs, down=False, up=False):
        super().__init__()
        self.conv1 = layers.conv(inputs if up else outputs, strides=2 if down else 1)
        self.conv2 = Upsampling(layers, outputs) if up else layers.conv(outputs)
        self.skip: Any = None
        if up:
            self.skip = Upsampling(layers, outputs, 1)
        elif down:
            self.skip = layers.conv(outputs, 2, 2)
        elif inputs != outputs:
            self.skip = layers.conv(outputs, 1)

    def __call__(self, x):
        """Returns [batch, height, width, outputs]."""
        skip = x if self.skip is None else self.skip(x)
        return tf.nn.elu(skip + 0.1 * self.conv2(tf.nn.elu(self.conv1(x))))


class MnistVAE(tf.Module):
    """x {0, 1} [batch, 28, 28, 1]; p(z) = N(0, 1); q(z|x) a Gaussian, transformed by the flow."""

    def __init__(self, config: Config, dtype=tf.float32):
        super().__init__()
        layers = Layers(config, dtype)
        self.latents, maps, last = config.latents, config.maps, config.blocks - 1
        self.encoder: list[Any] = []
        for stage, outputs in enumerate(maps):
            for i in range(config.blocks):
                inputs = (1, *maps)[stage] if i == 0 else outputs
                self.encoder.append(Block(layers, inputs, outputs, down=stage > 0 and i == 0))
        self.encoder_dense = layers.dense(config.hidden, activation=tf.nn.elu)
        # mu, log sigma and the context of the flow.
        self.posterior = layers.dense(2 * config.latents + config.made[0], init_scale=0.1)
        self.flow = [
            Autoregressive(layers, config.latents, config.made, init_scale=0.1)
            for _ in range(config.flow_steps)
        ]
        self.decoder_dense = [
            layers.dense(units, activation=tf.nn.elu) for units in (config.hidden, 7 * 7 * maps[-1])
        ]
        self.decoder: list[Any] = []
        for stage, inputs in reversed(list(enumerate(maps))):
            for i in range(config.blocks):
                up = stage > 0 and i == last
                self.decoder.append(Block(layers, inputs, maps[stage - 1] if up else inputs, up=up))
        self.logits = layers.conv(1, init_scale=0.1)

    def __call__(self, x, seed):
        """Returns log p(x|z), float32 [batch], and log q(z|x) - log p(z), [batch, latents].

        Arguments:
          x: float32 [batch, 28, 28, 1].
          seed: int64 [2], of z.
        """
        z, log_q = self.encode(x, seed)
        log_px = -tf.nn.sigmoid_cross_entropy_with_logits(x, self.decode(z))
        return tf.reduce_sum(log_px, [1, 2, 3]), log_q - log_normal(z, 0.0, 0.0)

    def encode(self, x, seed):
        """Returns a draw z from q(z|x) and log q(z|x), both float32 [batch, latents]."""
        mu, log_sigma, context = self.moments(x)
        noise = replicas.normal_like(mu, seed)
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
        """The flow: each step z <- sigma z + (1 - sigma) m, log q <- log q - log sigma."""
        for step in self.flow:
            m, s = step(z, context)
            s += 1.5  # sigma begins near .8: a step begins near the identity.
            sigma = tf.sigmoid(s)
            z = sigma * z + (1 - sigma) * m
            log_q -= tf.math.log_sigmoid(s)
            # The next step has the order of the latents reversed.
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
        """Returns the pixels' means of draws from the model, in [0, 1]."""
        return tf.sigmoid(self.decode(tf.random.stateless_normal([count, self.latents], seed)))

    def reconstruct(self, x, seed) -> tf.Tensor:
        """Returns the pixels' means given a draw from q(z|x), in [0, 1]."""
        return tf.sigmoid(self.decode(self.encode(x, seed)[0]))


# CIFAR-10


class StochasticLayer(tf.Module):
    """One z and its place in the ways up and down; with `halves` at half the size of those below.

    The way up ends at the layer that is `top`.
    """

    def __init__(self, config: Config, layers: Layers, halves: bool, top: bool):
        super().__init__()
        conv = functools.partial(layers.conv, init_scale=0.1)
        h, z = config.features, config.latent_maps
        self.h, self.z, self.halves = h, z, halves
        self.up_split = conv(2 * h + 2 * z, strides=2 if halves else 1)
        self.up_out = None if top else conv(h)
        self.down_split = conv(2 * h + 4 * z)
        self.flow = Autoregressive(layers, z, [h] * config.flow_layers, convolutional=True)
        self.down_out: Any = Upsampling(layers, h, init_scale=0.1) if halves else conv(h)

    def up(self, x):
        """Returns the next x on the way up, and mu, log sigma and context of the posterior."""
        split = self.up_split(tf.nn.elu(x))
        det, *posterior = tf.split(split, [self.h, self.z, self.z, self.h], -1)
        if self.up_out is None:
            return None, posterior
        if self.halves:
            x = tf.nn.avg_pool2d(x, 2, 2, "VALID")
        return x + 0.1 * self.up_out(tf.nn.elu(det)), posterior

    def down(self, x, posterior, seed):
        """Returns the way down's next x, and log q(z) - log p(z), [batch, maps].

        Where `posterior` is None z is drawn from the prior, and the second result is None.
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
        """The flow: z <- (z - m) / exp(s), log q <- log q + s."""
        m, s = (0.1 * t for t in self.flow(z, context))
        return (z - m) * tf.exp(-s), log_q + s


class CifarVAE(tf.Module):
    """x (-1/2, 1/2) [batch, 32, 32, 3]; several z, each with a prior given those above it."""

    def __init__(self, config: Config, dtype=tf.float32):
        super().__init__()
        layers = Layers(config, dtype)
        self.dtype, self.open_ends = dtype, config.open_ends
        levels = len(config.stochastic_layers)
        self.top_size, h = 16 >> (levels - 1), config.features
        self.first = layers.conv(h, 5, 2, init_scale=0.1)
        halves = [
            level > 0 and i == 0
            for level, count in enumerate(config.stochastic_layers)
            for i in range(count)
        ]
        self.layers = [
            StochasticLayer(config, layers, half, top=index == len(halves) - 1)
            for index, half in enumerate(halves)
        ]
        self.top = tf.Variable(tf.zeros([h]), name="top")
        self.last = Upsampling(layers, 3, 5, init_scale=0.1)
        self.log_scale = tf.Variable(tf.zeros([3]), name="log_scale")  # Of each colour's logistic.

    def __call__(self, x, seed):
        """Returns log p(x|z), float32 [batch], and log q(z|x) - log p(z), [batch, maps of all z].

        Arguments:
          x: float32 [batch, 32, 32, 3].
          seed: int64 [2], of z.
        """
        mean, kl = self.down(self.up(x), tf.shape(x)[0], seed)
        log_px = log_discretized_logistic(x, mean, self.log_scale, self.open_ends)
        return tf.reduce_sum(log_px, [1, 2, 3]), tf.concat(kl, -1)

    def up(self, x):
        """Returns each layer's part of the posterior."""
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
            x, kl = layer.down(x, posterior, fold_in(seed, index))
            kls.append(kl)
        mean = 0.1 * tf.cast(self.last(tf.nn.elu(x)), tf.float32)
        return tf.clip_by_value(mean, 1 / 512 - 0.5, 0.5 - 1 / 512), kls

    def sample(self, count: int, seed) -> tf.Tensor:
        """Returns the pixels' means of draws from the model, in [0, 1]."""
        return self.down(None, count, seed)[0] + 0.5

    def reconstruct(self, x, seed) -> tf.Tensor:
        """Returns the pixels' means given a draw from q(z|x), in [0, 1]."""
        return self.down(self.up(x), tf.shape(x)[0], seed)[0] + 0.5


def make_network(config: Config, dtype=tf.float32) -> Any:
    """Returns the data set's network, with its variables."""
    network = (MnistVAE if config.binary else CifarVAE)(config, dtype)
    shape = [1, 28, 28, 1] if config.binary else [1, 32, 32, 3]
    tf.distribute.get_strategy().run(
        lambda: network(tf.zeros(shape), tf.constant([0, 0], tf.int64))
    )
    return network


def initialize(config: Config, network, images: np.ndarray) -> None:
    """Section 3's initialisation of every layer, on the way of x through the whole network."""
    seed = tf.constant([config.seed, 0], tf.int64)
    x = prepare(config, images, seed)
    if config.data_dependent_init:
        # Every replica sees the whole batch, so they agree.
        tfwn.data_dependent_init(
            lambda x: network(x, seed), x, init_scale=lambda layer: layer.init_scale
        )
    if not config.binary:
        # The standard deviation of a logistic is pi / sqrt(3) times its scale.
        stddev = tf.math.reduce_std(x, [0, 1, 2])
        network.log_scale.assign(tf.math.log(stddev * math.sqrt(3) / math.pi))


# Training


def average(averaged, network, decay) -> None:
    """Polyak averaging: averaged <- decay averaged + (1 - decay) parameters."""
    for mean, p in zip(averaged.trainable_variables, network.trainable_variables, strict=True):
        moved = mean + (1 - decay) * (p - mean)
        tf.raw_ops.AssignVariableOp(resource=mean.handle, value=moved)


def make_train_step(config: Config, strategy, network, averaged, optimizer, per_epoch: int):
    """Returns train_step(images, step): the whole batch on every replica, steps from 0.

    It returns float32 [3], sums over the images: the loss, the bound, log q(z|x) - log p(z).
    """
    free_bits = config.free_bits
    free_bits = FREE_BITS[config.binary] if free_bits is None else free_bits

    def replica_step(images, step):
        seed = tf.stack([tf.constant(config.seed, tf.int64), step + 1])
        x = prepare(config, replicas.share(images), seed)
        with tf.GradientTape() as tape:
            log_px, kl = network(x, seed)
            cost = tf.reduce_sum(kl)
            if free_bits:
                # Each map by its mean over the batch, of which this is the replica's share.
                mean = replicas.total(tf.reduce_sum(kl, 0)) / config.batch_size
                cost = config.batch_size * tf.reduce_sum(tf.maximum(free_bits, mean))
                cost /= strategy.num_replicas_in_sync
            loss = cost - tf.reduce_sum(log_px)
            scaled = loss / config.batch_size
        optimizer.apply(tape.gradient(scaled, network.trainable_variables))
        t = tf.cast(step + 1, tf.float32)
        decay = 1 - 1 / max(config.average_epochs * per_epoch, 1)
        average(averaged, network, tf.minimum(decay, (1 + t) / (10 + t)))
        kl = tf.reduce_sum(kl)
        return tf.stack([loss, tf.reduce_sum(log_px) - kl, kl])

    @functools.partial(tf.function, jit_compile=config.jit_compile)
    def train_step(images, step):
        sums = strategy.run(replica_step, (images, step))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return train_step


def make_test_step(config: Config, strategy, network):
    """Returns test_step(images, pixels, seed): log p(x, z) - log q(z|x) and the KL, [images, 2].

    The seeds are of dynamic binarization's pixels and of z.
    """

    def replica_step(images, pixels, seed):
        x = prepare(config, replicas.share(images), pixels)
        log_px, kl = network(x, seed)
        kl = tf.reduce_sum(kl, 1)
        return tf.stack([log_px - kl, kl], 1)

    @functools.partial(tf.function, jit_compile=config.jit_compile)
    def test_step(images, pixels, seed):
        return strategy.gather(strategy.run(replica_step, (images, pixels, seed)), axis=0)

    return test_step


def measure(
    config: Config, test_step, images: np.ndarray, samples=1, tell=lambda done, total: None
):
    """Returns means over the images, in nats: bound, kl and, of several samples, log_likelihood.

    The latter is the importance-weighted bound, mean of log mean_k p(x, z_k) / q(z_k|x), of one x:
    dynamic binarization draws it once. All draws are the same each time. Calls tell(done, total)
    meanwhile.
    """
    parts, batch = [], 500
    starts = range(0, len(images), batch)
    seed = tf.constant([config.seed, -1], tf.int64)  # No step of training has it.
    for number, start in enumerate(starts):
        of_samples, here = [], fold_in(seed, number)
        for k in range(samples):
            tell(number * samples + k, len(starts) * samples)
            part = test_step(images[start : start + batch], fold_in(here, 0), fold_in(here, k))
            of_samples.append(part.numpy().astype(np.float64))
        parts.append(of_samples)
    log_w, kl = np.moveaxis(np.concatenate(parts, 1), -1, 0)  # [samples, images]
    result = {"bound": log_w.mean(), "kl": kl.mean()}
    if samples > 1:
        result["log_likelihood"] = log_mean_exp(log_w).mean()
    return result | units(config, result)


def units(config: Config, result: dict[str, float]) -> dict[str, float]:
    """Returns, for CIFAR-10, the bound in bits/dim and on the axis of figure 3."""
    if config.binary:
        return {}
    bits = -result["bound"] / (3072 * math.log(2))
    return {"bits_per_dim": bits, "paper_axis": 3072 * math.log(2) * (8 - bits)}


def describe(result: dict[str, float]) -> str:
    """Returns what `measure` found, in words."""
    words = f"bound {result['bound']:.2f} nats"
    if "bits_per_dim" in result:
        words += f" ({result['bits_per_dim']:.3f} bits/dim, {result['paper_axis']:.0f} in figure 3)"
    if "log_likelihood" in result:
        words += f"  log-likelihood {result['log_likelihood']:.2f}"
    return words + f"  KL {result['kl']:.2f}"


def note(config: Config, images: data.Images) -> str:
    """Returns what to say beside a result."""
    drawn = f"{config.binarization} binarization" if config.binary else ""
    return options.note(PRESETS, config, drawn, images.caveat)


def check(config: Config) -> None:
    """Refuses configurations that cannot work."""
    if len(config.maps) != 3:
        raise UserError(f"--maps takes 3 numbers, got {len(config.maps)}")
    if len(config.stochastic_layers) > 5:
        raise UserError(
            "--stochastic-layers takes at most 5 numbers, for 16x16 to 1x1 pixels, got "
            f"{len(config.stochastic_layers)}"
        )


def train(config: Config) -> None:
    """Trains one model."""
    check(config)
    images = load(config)  # First: where they are missing, there is no run yet.
    if len(images.train_images) < config.batch_size:
        raise UserError(
            f"--batch-size {config.batch_size} is more than the "
            f"{len(images.train_images)} training images"
        )
    with Run(config) as run:
        train_in(run, config, images)


def train_in(run: Run, config: Config, images: data.Images) -> None:
    """Trains one model in its run folder."""
    run.introduce(f"{config.dataset}, {config.parameterization}", note(config, images))
    examples = len(images.train_images)
    per_epoch = examples // config.batch_size
    epochs = EPOCHS[config.binary] if config.epochs is None else config.epochs
    with run.strategy.scope():
        network, averaged = (make_network(config, run.dtype) for _ in range(2))
        optimizer = Adamax(
            network.trainable_variables, config.learning_rate, config.beta_1, config.beta_2,
            config.epsilon, epsilon_in_max=True,
        )  # fmt: skip
    first = order(config, 0, examples)[: config.init_examples]
    initialize(config, network, images.train_images[first])
    for mean, p in zip(averaged.variables, network.variables, strict=True):
        mean.assign(p)
    train_step = make_train_step(config, run.strategy, network, averaged, optimizer, per_epoch)
    test_step = make_test_step(config, run.strategy, averaged)
    totals = tf.Variable(tf.zeros([3], tf.float64), name="totals")  # Of this epoch.
    start = run.begin(
        {"network": network, "averaged": averaged, "optimizer": optimizer, "totals": totals}
    )
    began = time.monotonic(), start
    total = epochs * per_epoch

    def end_epoch(step):
        """Reports the epoch that ends before `step`; changes nothing."""
        steps, epoch = step - began[1], step // per_epoch
        seconds = (time.monotonic() - began[0]) / steps * per_epoch if steps else None
        loss, bound, kl = (totals / (per_epoch * config.batch_size)).numpy()
        last = step == total
        samples = config.eval_samples if last else 1
        result = measure(config, test_step, images.test_images, samples, run.testing)
        values = {"epoch": epoch, "loss": loss, "train_bound": bound, "train_kl": kl}
        values |= {f"test_{name}": value for name, value in result.items()}
        run.log(step, **values, **({"epoch_seconds": seconds} if seconds else {}))
        run.say(f"epoch {epoch}  train bound {bound:.2f}  test {describe(result)}")
        if run.chief and (last or epoch % max(1, epochs // 10) == 0):
            run.image("samples", sample_grid(config, averaged))
            run.image("reconstructions", reconstruction_grid(config, averaged, images))

    for step in run.steps(
        total, unit="images", per_step=config.batch_size, steps_per_epoch=per_epoch
    ):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
            if position == 0 and step > 0:
                end_epoch(step)
                totals.assign(tf.zeros_like(totals))
            permutation = order(config, epoch, examples)
            began = time.monotonic(), step
        batch = permutation[position * config.batch_size :][: config.batch_size]
        sums = train_step(images.train_images[batch], tf.constant(step, tf.int64))
        totals.assign_add(tf.cast(sums, tf.float64))
        if step % 20 == 0:  # Not at each step: reading a value waits for it.
            loss, bound = (sums[:2] / config.batch_size).numpy()
            run.show(bound=bound)
            if not np.isfinite(loss):
                run.log(loss=loss)
    end_epoch(total)


def order(config: Config, epoch: int, examples: int) -> np.ndarray:
    """Returns the order of the training images in an epoch, counted from 0."""
    return runtime.generator(config.seed, epoch).permutation(examples)


# Pictures and commands


def sample_grid(config: Config, network, count: int = 100, seed: int = 0) -> bytes:
    """Returns draws from the model as a PNG: the means of their pixels."""
    images = network.sample(count, tf.constant([seed, 0], tf.int64))
    return plots.png(plots.tile(images, gap=2))


def reconstruction_grid(config: Config, network, images, count: int = 50, seed: int = 0) -> bytes:
    """Returns test images as a PNG, below each row of them what the model makes of them."""
    number = tf.constant([seed, 0], tf.int64)
    x = prepare(config, images.test_images[:count], number)
    count = len(x)
    shown = x if config.binary else x + 0.5
    both = np.stack([shown, network.reconstruct(x, number)])
    both = np.pad(both, [(0, 0), (0, -count % 10), *3 * [(0, 0)]])
    rows = [part for start in range(0, count, 10) for part in both[:, start : start + 10]]
    return plots.png(plots.tile(np.concatenate(rows), gap=2))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints the bound and the log-likelihood of the test images, with averaged weights."""

    checkpoint: str  # A run folder, or a checkpoint in one.
    eval_samples: int = 100  # Importance samples of the log-likelihood (1: the bound alone).
    data_dir: str = ""  # Where data sets are; default: the run's own.

    RANGES = options.ranges("eval_samples")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws images from a model."""

    checkpoint: str  # A run folder, or a checkpoint in one.
    out: str = ""  # The PNG (default: samples/samples.png in the run folder).
    count: int = 100  # How many images.
    seed: int = 0  # Of the draws.

    RANGES = options.ranges("count")


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Shows test images, and below them what a model makes of their latent variables."""

    checkpoint: str  # A run folder, or a checkpoint in one.
    out: str = ""  # The PNG (default: samples/reconstructions.png in the run folder).
    count: int = 50  # How many images.
    seed: int = 0  # Of the draws.
    data_dir: str = ""  # Where data sets are; default: the run's own.

    RANGES = options.ranges("count")


def restore(path: str) -> tuple[Config, Any, Path]:
    """Returns a run's Config, its network with averaged weights, and the run folder."""
    found = checkpoints.open_run(path, Config)
    network = make_network(found.config, runtime.compute_dtype(found.config))
    found.restore(averaged=network)
    return found.config, network, found.folder


def evaluate(asked: Evaluate) -> None:
    """The `evaluate` command."""
    config, network, _ = restore(asked.checkpoint)
    images = load(config, asked.data_dir)
    test_step = make_test_step(config, tf.distribute.get_strategy(), network)
    with progress.Test() as tell:
        result = measure(config, test_step, images.test_images, asked.eval_samples, tell)
    print(f"test {describe(result)}{note(config, images)}")


def sample(asked: Sample) -> None:
    """The `sample` command."""
    config, network, folder = restore(asked.checkpoint)
    png = sample_grid(config, network, asked.count, asked.seed)
    plots.write(asked.out or folder / "samples" / "samples.png", png)


def reconstruct(asked: Reconstruct) -> None:
    """The `reconstruct` command."""
    config, network, folder = restore(asked.checkpoint)
    images = load(config, asked.data_dir)
    png = reconstruction_grid(config, network, images, asked.count, asked.seed)
    plots.write(asked.out or folder / "samples" / "reconstructions.png", png)


if __name__ == "__main__":
    command_line.main(
        Config,
        train,
        PRESETS,
        {Evaluate: evaluate, Sample: sample, Reconstruct: reconstruct},
    )
