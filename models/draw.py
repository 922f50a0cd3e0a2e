"""DRAW, a recurrent generative model of MNIST (paper, section 5.3; figure 4).

    python -m models.draw --parameterization weight_norm --data-dir DATA
    python -m models.draw sample runs/draw-paper-weight_norm-0

Bounds on the test set's log-likelihood in nats, to compare with (figure 4 has no table):

    this model in Theano, normal, 100 epochs, as its author reports it     -90.5
    DRAW's own paper (arXiv 1502.04623, table 2), with attention          -80.97

What the paper leaves open, or where the code that it starts from differs from DRAW's paper:

 1. The paper names neither glimpses nor attention. The code's example with attention: windows of
    2x2 and 5x5, 64 glimpses. Its default without: 10 glimpses, --preset no-attention.
 2. The data are the binarised MNIST of the code, here drawn from a seed: each pixel is 1 with the
    probability of its grey, once and for all. The first 50,000 images of the file are for
    training, in the file's order, which no epoch shuffles.
 3. "Weight normalization to all weight vectors": every column of every matrix has its g; the
    LSTM's input and state are two matrices. Peepholes are no vectors and stay as they are.
 4. v begins as the w of the normal parameterisation and g as ||v||: both begin as the same
    function.
 5. The LSTM's biases begin with 0, the forget gate's too, and all states with 0. As the code.
"""

import dataclasses
import functools
import itertools
import math
import time
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

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
    video,
)
from models.common.errors import UserError
from models.common.run import Run

SIDE = 28  # Pixels of a side of the images.


@dataclasses.dataclass(frozen=True)
class Config(options.RunConfig):
    """The hyper-parameters of section 5.3."""

    parameterization: Literal["normal", "weight_norm"] = "weight_norm"  # Of every matrix.
    dataset: Literal["mnist", "synthetic_mnist"] = "mnist"  # synthetic: needs no files.
    train_images: int = 50_000  # The first of the file; the rest of its 60,000 is not used.
    binarization_seed: int = 0  # Of the pixels drawn from the greys, once for all epochs.
    attention: bool = True  # Read and write through windows, else whole images.
    read_size: int = 2  # Filters of the reading window, in each direction.
    write_size: int = 5  # Filters of the writing window, in each direction.
    glimpses: int = 64  # Steps of time, T.
    encoder_units: int = 256  # Size of the encoder's LSTM.
    decoder_units: int = 256  # Size of the decoder's LSTM.
    latent_units: int = 100  # Size of z at each glimpse.
    initial_stddev: float = 0.01  # Of all weights at the beginning, peepholes included.
    epochs: int = 100  # Passes over the training images.
    batch_size: int = 100  # Images per step, over all replicas.
    learning_rate: float = 3e-4  # Adam's step size.
    beta_1: float = 0.9  # Adam's momentum.
    beta_2: float = 0.999  # Adam's decay of the squared gradient.
    epsilon: float = 1e-8  # Adam's epsilon.
    clip_norm: float = 10.0  # The gradient's norm over all variables is at most this.

    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size", "--glimpses")
    RANGES = options.ranges(
        "train_images glimpses encoder_units decoder_units latent_units epochs batch_size",
        "beta_1 beta_2",
    ) | dict.fromkeys(["read_size", "write_size"], (2.0, math.inf))


PRESETS = {
    "paper": options.Preset("section 5.3 with the code's attention, 64 glimpses"),
    "no-attention": options.Preset(
        "the code's default: whole images, 10 glimpses",
        {"attention": False, "glimpses": 10, "learning_rate": 1e-3},
    ),
    "cpu": options.Preset(
        "16 glimpses, 5 epochs, rate .001, wider init; not comparable with the paper's numbers",
        # From N(0, .01) the bound stays at the mean image's, -208, for one to five epochs.
        {"glimpses": 16, "epochs": 5, "learning_rate": 1e-3, "initial_stddev": 0.05},
    ),
    "smoke": options.Preset(
        "only to see that it runs, in less than a minute; its numbers and pictures mean nothing",
        {
            "dataset": "synthetic_mnist",
            "train_images": 1000,
            "glimpses": 4,
            "encoder_units": 32,
            "decoder_units": 32,
            "latent_units": 10,
            "learning_rate": 1e-2,
            "epochs": 2,
        },
    ),
}


# Data


def load(config: Config, data_dir: str = "") -> data.Images:
    """Returns the data set, binarised."""
    raw = data.load(config.dataset, data_dir or config.data_dir)
    if not config.batch_size <= config.train_images <= len(raw.train_images):
        raise UserError(
            f"--train-images must lie between --batch-size {config.batch_size} and the "
            f"{len(raw.train_images)} of {config.dataset}, got {config.train_images}"
        )
    train, test = data.binarize(
        raw.train_images[..., 0], raw.test_images[..., 0], seed=config.binarization_seed
    )
    return dataclasses.replace(raw, train_images=train[: config.train_images], test_images=test)


# Attention


class Window(NamedTuple):
    """An attention window: a grid of size x size Gaussian filters on the image.

    Attributes:
      centre: of the grid, y and x, in pixels, float32 [batch, 2].
      delta: pixels from one filter to the next, [batch, 1].
      sigma: standard deviation of the filters in pixels, [batch, 1].
      gamma: intensity, [batch, 1].
    """

    centre: tf.Tensor
    delta: tf.Tensor
    sigma: tf.Tensor
    gamma: tf.Tensor


def window(parameters: tf.Tensor, size: int, side: int) -> Window:
    """Returns the window of (g_y, g_x, log delta, log sigma^2, log gamma), [batch, 5].

    centre = (g + 1) / 2 * side; delta = (side - 1) / (size - 1) * exp(log delta): with the
    parameters 0 the grid covers the image.
    """
    g, log_delta, log_variance, log_gamma = tf.split(parameters, [2, 1, 1, 1], 1)
    delta = (side - 1) / (size - 1) * tf.exp(log_delta)
    return Window((g + 1) / 2 * side, delta, tf.exp(log_variance / 2), tf.exp(log_gamma))


def filterbanks(window: Window, size: int, side: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns F_y and F_x, both [batch, size, side]: a row is a filter along one axis.

    mu_i = centre + delta (i - size/2 + 1/2); F_ia = exp(-(a - mu_i)^2 / (2 sigma^2)) divided by
    its sum over the pixels a = 0, 1, ... plus 1e-4, so that a filter outside the image is 0.
    """
    i = tf.range(size, dtype=tf.float32) - size / 2 + 0.5
    a = tf.range(side, dtype=tf.float32)
    mu = window.centre[:, :, None] + (window.delta * i)[:, None, :]
    exponent = -0.5 / tf.square(window.sigma)
    f = tf.exp(tf.square(a - mu[..., None]) * exponent[:, :, None, None])
    f /= tf.reduce_sum(f, 3, keepdims=True) + 1e-4
    return f[:, 0], f[:, 1]


# Network


class Network(tf.Module):
    """Encoder and decoder LSTM, q(z|x), and the linear maps that read and write.

    Arguments:
      config: the Config.
      side: pixels of a side of the images.
      dtype: of the products and the LSTMs; canvas, windows, q and the bound are float32.
    """

    def __init__(self, config: Config, side: int = SIDE, dtype=tf.float32):
        super().__init__()
        self.config, self.side, self.dtype = config, side, dtype
        choices = {"parameterization": config.parameterization, "compute_dtype": dtype}
        index = itertools.count()

        def initial():
            seed = [config.seed, next(index)]
            return functools.partial(
                tf.random.stateless_normal, seed=seed, stddev=config.initial_stddev
            )

        def lstm(inputs, units):
            cell = tfwn.LSTMCell(
                units,
                kernel_initializer=initial(),
                recurrent_initializer=initial(),
                peepholes=True,
                peephole_initializer=initial(),
                unit_forget_bias=False,
                **choices,
            )
            cell.build(tf.TensorShape([None, inputs]))
            return cell

        def linear(inputs, units):
            layer = tfwn.Dense(units, kernel_initializer=initial(), **choices)
            layer.build(tf.TensorShape([None, inputs]))
            return layer

        h_dec, pixels = config.decoder_units, side**2
        if config.attention:
            seen, self.reader = 2 * config.read_size**2, linear(h_dec, 5)
        else:
            seen, self.reader = 2 * pixels, None
        self.encoder = lstm(seen + h_dec, config.encoder_units)
        self.q = linear(config.encoder_units, 2 * config.latent_units)
        self.decoder = lstm(config.latent_units, h_dec)
        self.writer = linear(h_dec, 5 + config.write_size**2 if config.attention else pixels)

    def weights(self) -> dict:
        """Returns every w by the name of its layer: computed once, used at all glimpses."""
        cells = {"encoder": self.encoder, "decoder": self.decoder}
        layers = {"q": self.q, "writer": self.writer}
        if self.reader is not None:
            layers["reader"] = self.reader
        named: dict[str, Any] = {name: cell.effective_weights() for name, cell in cells.items()}
        return named | {name: layer.weight() for name, layer in layers.items()}

    def read(self, x, error, h_dec, weights) -> tf.Tensor:
        """Returns what the encoder sees of x and of what the canvas lacks, [batch, ...].

        gamma F_y I F_x' of I = x and of I = x - sigmoid(c), or both as they are.
        """
        both, size, side = tf.concat([x, error], 2), self.config.read_size, self.side
        if self.reader is None:
            return tf.reshape(both, [-1, 2 * side**2])
        parameters = tf.cast(self.reader(h_dec, weights["reader"]), tf.float32)
        seen = window(parameters, size, side)
        f_y, f_x = filterbanks(seen, size, side)
        rows = tf.reshape(f_y @ both, [-1, 2 * size, side])
        return seen.gamma * tf.reshape(tf.matmul(rows, f_x, transpose_b=True), [-1, 2 * size**2])

    def write(self, h_dec, weights) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns what is added to the canvas, [batch, side, side], and the window's parameters.

        F_y' w F_x / gamma, or a linear map of h_dec.
        """
        linear = tf.cast(self.writer(h_dec, weights["writer"]), tf.float32)
        size, side = self.config.write_size, self.side
        if self.reader is None:
            return tf.reshape(linear, [-1, side, side]), linear[:, :0]
        parameters, patch = tf.split(linear, [5, size**2], 1)
        written = window(parameters, size, side)
        f_y, f_x = filterbanks(written, size, side)
        patch = tf.reshape(patch / written.gamma, [-1, size, size])
        return tf.matmul(f_y, patch @ f_x, transpose_a=True), parameters

    def __call__(self, x, u, weights=None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the cross-entropy of x, [batch], and KL_t, [T, batch]: the bound is -their sum.

        Arguments:
          x: float32 [batch, side, side], 0 or 1.
          u: float32 [T, batch, latent_units], standard normal noise.
          weights: `self.weights()`, where the caller has it.
        """
        weights = self.weights() if weights is None else weights
        steps, _, latent = u.shape
        noise = tf.TensorArray(tf.float32, steps, element_shape=u.shape[1:]).unstack(u)
        qs = tf.TensorArray(tf.float32, steps, element_shape=[u.shape[1], 2 * latent])

        def glimpse(t, canvas, encoder, decoder, qs):
            h_dec = decoder[0]
            r = self.read(x, x - tf.sigmoid(canvas), h_dec, weights)
            seen = tf.concat([tf.cast(r, self.dtype), h_dec], 1)
            h_enc, encoder = self.encoder(seen, encoder, weights["encoder"])
            q = tf.cast(self.q(h_enc, weights["q"]), tf.float32)
            mu, log_sigma = tf.split(q, 2, 1)
            z = mu + tf.exp(log_sigma) * noise.read(t)
            h_dec, decoder = self.decoder(z, decoder, weights["decoder"])
            return t + 1, canvas + self.write(h_dec, weights)[0], encoder, decoder, qs.write(t, q)

        batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
        states = [cell.get_initial_state(batch) for cell in (self.encoder, self.decoder)]
        _, canvas, _, _, qs = tf.while_loop(
            lambda t, *_: t < steps,
            glimpse,
            (0, tf.zeros_like(x), *states, qs),
            maximum_iterations=steps,
        )
        mu, log_sigma = tf.split(qs.stack(), 2, 2)
        kl = tf.reduce_sum((tf.exp(2 * log_sigma) + tf.square(mu) - 1) / 2 - log_sigma, 2)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(x, canvas)
        return tf.reduce_sum(losses, [1, 2]), kl

    def sample(self, u) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws images; returns sigmoid(c_t), [T, batch, side, side], and the windows' parameters.

        Arguments:
          u: float32 [T, batch, latent_units]: z, standard normal.
        """
        weights = self.weights()
        canvas = tf.zeros([u.shape[1], self.side, self.side])
        decoder = self.decoder.get_initial_state(u.shape[1])
        canvases, windows = [], []
        for z in u:
            h_dec, decoder = self.decoder(z, decoder, weights["decoder"])
            written, parameters = self.write(h_dec, weights)
            canvas += written
            canvases.append(tf.sigmoid(canvas))
            windows.append(parameters)
        return tf.stack(canvases), tf.stack(windows)


# Training


def noise(config: Config, x, seed) -> tf.Tensor:
    """Returns u for x, this replica's share of the batch: [T, batch, latent_units]."""
    batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    u = replicas.normal_like(tf.zeros([batch, config.glimpses, config.latent_units]), seed)
    return tf.transpose(u, [1, 0, 2])


def make_steps(config: Config, strategy, network: Network, optimizer=None):
    """Returns (train_step, test_step); both take the whole batch on every replica.

    Called as step(images, seed), they return float32 [1 + T]: the sums over the images of the
    cross-entropy and of each KL_t.
    """

    def sums(x, u):
        cross_entropy, kl = network(x, u)
        return tf.concat([[tf.reduce_sum(cross_entropy)], tf.reduce_sum(kl, 1)], 0)

    def update(x, u):
        with tf.GradientTape() as tape:
            losses = sums(x, u)
            loss = tf.reduce_sum(losses) / config.batch_size
        variables = network.trainable_variables
        gradients = tape.gradient(loss, variables)
        replica = tf.distribute.get_replica_context()
        n = replica.num_replicas_in_sync
        if n > 1:  # Clipped as a whole; the optimizer adds over the replicas.
            gradients = [g / n for g in replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)]
        gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm / n)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return losses

    def on_all(replica_step):
        if config.jit_compile:
            replica_step = tf.function(replica_step, jit_compile=True)

        @tf.function
        def step(images, seed):
            def run(images, seed):
                x = tf.cast(replicas.share(images), tf.float32)
                # Drawn out here, because XLA would draw other numbers.
                return replica_step(x, noise(config, x, seed))

            result = strategy.run(run, (images, seed))
            return strategy.reduce(tf.distribute.ReduceOp.SUM, result, axis=None)

        return step

    return on_all(update), on_all(sums)


def make_optimizer(config: Config, variables) -> tf.keras.optimizers.Adam:
    """Returns the code's Adam."""
    adam = tf.keras.optimizers.Adam(
        config.learning_rate, config.beta_1, config.beta_2, config.epsilon
    )
    adam.build(variables)
    return adam


def mean_losses(
    config: Config, test_step, images, tell=lambda done, total: None, draws: int = 1
) -> np.ndarray:
    """Returns the images' mean cross-entropy and KL_t, float64 [1 + T], in nats.

    Arguments:
      config, test_step: of the network.
      images: uint8 [examples, side, side].
      tell: called as tell(done, total) meanwhile.
      draws: of the noise for each image; the same ones each time.
    """
    sums, batch = np.zeros(1 + config.glimpses), config.batch_size
    starts = range(0, len(images), batch)
    for index, (_, start) in enumerate(itertools.product(range(draws), starts)):
        tell(index, draws * len(starts))
        seed = tf.constant([config.seed, -1 - index], tf.int64)
        sums += test_step(images[start : start + batch], seed).numpy()
    return sums / (draws * len(images))


def describe(losses: np.ndarray) -> str:
    """Returns what `mean_losses` found, in words."""
    cross_entropy, kl = losses[0], losses[1:].sum()
    return f"bound {-losses.sum():.2f} nats = -(cross-entropy {cross_entropy:.2f} + KL {kl:.2f})"


def note(config: Config, images: data.Images | None = None) -> str:
    """Returns what to say beside a result."""
    return options.note(PRESETS, config, images.caveat if images else "")


def train(config: Config) -> None:
    """Trains one network."""
    images = load(config)  # First: where they are missing, there is no run yet.
    with Run(config) as run:
        train_one(config, images, run)


def train_one(config: Config, images: data.Images, run: Run) -> None:
    """Trains one network in a run's folder."""
    run.introduce(config.parameterization, note(config, images))
    with run.strategy.scope():
        network = Network(config, dtype=run.dtype)
        optimizer = make_optimizer(config, network.trainable_variables)
    train_step, test_step = make_steps(config, run.strategy, network, optimizer)
    totals = tf.Variable(tf.zeros([1 + config.glimpses], tf.float64), name="totals")
    start = run.begin({"network": network, "optimizer": optimizer, "totals": totals})

    per_epoch = len(images.train_images) // config.batch_size
    began = time.monotonic(), start

    def end_epoch(step):
        """Reports the epoch that ends before `step`; changes nothing."""
        steps = step - began[1]
        seconds = (time.monotonic() - began[0]) / steps * per_epoch if steps else None
        losses = mean_losses(config, test_step, images.test_images, run.testing)
        values = {
            "epoch": step // per_epoch,
            "loss": float(tf.reduce_sum(totals)) / (per_epoch * config.batch_size),
            "test_bound": -losses.sum(),
            "test_cross_entropy": losses[0],
        }
        run.log(
            step,
            **values,
            **({"epoch_seconds": seconds} if seconds else {}),
            **{f"kl/{t:02}": kl for t, kl in enumerate(losses[1:], 1)},
        )
        canvases, _ = network.sample(sample_noise(config))
        run.image("samples", plots.png(plots.tile(canvases[-1])))
        run.say(
            f"epoch {values['epoch']}  train bound {-values['loss']:.2f}  test {describe(losses)}"
        )

    total = config.epochs * per_epoch
    for step in run.steps(
        total, unit="images", per_step=config.batch_size, steps_per_epoch=per_epoch
    ):
        position = step % per_epoch * config.batch_size
        if position == 0 and step > 0:
            end_epoch(step)
            totals.assign(tf.zeros_like(totals))
        if position == 0:
            began = time.monotonic(), step
        losses = train_step(
            images.train_images[position : position + config.batch_size],
            tf.constant([config.seed, step + 1], tf.int64),
        )
        totals.assign_add(tf.cast(losses, tf.float64))
        if step % 20 == 0:  # Not at each step: reading a value waits for it.
            loss = float(tf.reduce_sum(losses)) / config.batch_size
            run.show(bound=-loss)
            if not np.isfinite(loss):
                run.log(loss=loss)
    end_epoch(total)


# Pictures


def sample_noise(config: Config, seed: int = 0, count: int = 100) -> tf.Tensor:
    """Returns the z of `count` images, [T, count, latent_units]."""
    shape = [config.glimpses, count, config.latent_units]
    return tf.random.stateless_normal(shape, [seed, 0], alg="philox")


def with_window(canvas: np.ndarray, parameters, config: Config, scale: int) -> np.ndarray:
    """Returns a canvas enlarged, the window's frame on it in red, uint8 [height, width, 3].

    Arguments:
      canvas: float in [0, 1] [side, side].
      parameters: [5] as for `window`; [0] for no frame.
      config: its write_size is the window's.
      scale: pixels per pixel. The line is as thick as the filters' sigma, up to a pixel.
    """
    from PIL import Image, ImageDraw

    side = len(canvas) * scale
    picture = Image.fromarray(np.round(255 * canvas).astype(np.uint8)).convert("RGB")
    picture = picture.resize((side, side), Image.Resampling.NEAREST)
    if len(parameters):
        seen = window(tf.constant(parameters[None]), config.write_size, len(canvas))
        y, x = seen.centre[0].numpy()
        half = float(seen.delta[0, 0]) * (config.write_size - 1) / 2
        # A pixel's value is that of its middle. Limits, because a window may be very large.
        box = np.array([x - half, y - half, x + half, y + half]) + 0.5
        width = int(np.clip(round(float(seen.sigma[0, 0]) * scale), 1, scale))
        corners = tuple(np.clip(box * scale, -side, 2 * side))
        ImageDraw.Draw(picture).rectangle(corners, outline=(255, 40, 40), width=width)
    return np.asarray(picture)


# Commands


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints the bound on the test set of a checkpoint."""

    checkpoint: str  # A run folder, or a checkpoint in one.
    draws: int = 1  # Draws of the noise for each image.
    data_dir: str = ""  # Where data sets are; default: the run's own.

    RANGES = options.ranges("draws")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws images: a grid of them, and a GIF of how they are drawn, with the attention."""

    checkpoint: str  # A run folder, or a checkpoint in one.
    out: str = ""  # The folder to write to (default: samples in the run folder).
    seed: int = 0  # Of the samples.
    scale: int = 4  # Pixels per pixel in the GIF.

    RANGES = options.ranges("scale")


def restore(path: str) -> tuple[Config, Network, Path]:
    """Returns a run's Config, its network, and the run folder."""
    found = checkpoints.open_run(path, Config)
    network = Network(found.config, dtype=runtime.compute_dtype(found.config))
    found.restore(network=network)
    return found.config, network, found.folder


def evaluate(asked: Evaluate) -> None:
    """The `evaluate` command."""
    config, network, _ = restore(asked.checkpoint)
    images = load(config, asked.data_dir)
    _, test_step = make_steps(config, tf.distribute.get_strategy(), network)
    with progress.Test() as tell:
        losses = mean_losses(config, test_step, images.test_images, tell, asked.draws)
    print(f"test {describe(losses)}{note(config, images)}")


def sample(asked: Sample) -> None:
    """The `sample` command."""
    config, network, folder = restore(asked.checkpoint)
    out = Path(asked.out) if asked.out else folder / "samples"
    canvases, windows = (part.numpy() for part in network.sample(sample_noise(config, asked.seed)))
    plots.write(out / "samples.png", plots.png(plots.tile(canvases[-1]), 3))
    none = np.zeros([len(canvases[0]), 0])
    # At the end the finished images, without windows.
    frames = [*zip(canvases, windows, strict=True)] + [(canvases[-1], none)] * (
        8 + len(canvases) // 4
    )
    with video.Video(out / "drawing.gif", rate=max(4, config.glimpses / 4)) as film:
        for pair in frames:
            both = itertools.islice(zip(*pair, strict=True), 32)
            pictures = [with_window(c, p, config, asked.scale) for c, p in both]
            film.frame(plots.tile(np.stack(pictures), 8, asked.scale))
    print(f"wrote {out / 'drawing.gif'}" + note(config))


if __name__ == "__main__":
    command_line.main(Config, train, PRESETS, {Evaluate: evaluate, Sample: sample})
