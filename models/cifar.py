"""CIFAR-10 classification (paper, section 5.1; figures 1 and 2; architecture in table A).

    python -m models.cifar --parameterization weight_norm_mean_only_bn --data-dir DATA
    python -m models.cifar evaluate runs/cifar-paper-weight_norm_mean_only_bn-0

Test error after 200 epochs, the paper's figure 2:

    mean-only batch norm                  8.52 %
    weight norm                           8.46 %
    normal                                8.43 %
    batch norm                            8.05 %
    weight norm + mean-only batch norm    7.31 %

What the paper leaves open, or where its released code differs from it:

 1. The code has the inputs as (u8 - 127.5) / 128; ZCA adds 1e-5 to the eigenvalues, and its
    moments are those of the training images only. As the code.
 2. The code's Adam has its epsilon inside the root: --epsilon-inside-root. Here it is Keras' Adam,
    where it is outside. Both correct the bias with the beta_1 of the moment.
 3. In the code's normal parameterisation w begins with Glorot's initialiser and a g that the
    data-dependent initialisation sets stays frozen: --frozen-g. Here all five begin as the
    same function: w = g v / ||v|| is computed from the same v after the same initialisation.
 4. The data-dependent initialisation sees the first 500 images of the first epoch, with noise and
    dropout. As the code.
"""

import dataclasses
import functools
import time
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow as tf

import tfwn
from models.common import (
    checkpoints,
    command_line,
    data,
    options,
    progress,
    replicas,
    runtime,
    sweep,
)
from models.common.batch_norm import BatchNormalization
from models.common.errors import UserError
from models.common.run import Run

PAPER = {  # Test error in percent, figure 2.
    "mean_only_bn": 8.52,
    "weight_norm": 8.46,
    "normal": 8.43,
    "batch_norm": 8.05,
    "weight_norm_mean_only_bn": 7.31,
}


@dataclasses.dataclass(frozen=True)
class Config(options.RunConfig):
    """The hyper-parameters of section 5.1."""

    parameterization: Literal[
        "normal", "batch_norm", "weight_norm", "weight_norm_mean_only_bn", "mean_only_bn"
    ] = "weight_norm"  # Of every layer, the output layer included.
    dataset: Literal["cifar10", "synthetic_cifar10"] = "cifar10"  # synthetic: needs no files.
    whiten: bool = True  # ZCA whitening.
    zca_epsilon: float = 1e-5  # Added to the eigenvalues in ZCA.
    width: int = 96  # Channels of the first three convolutions; those after have twice as many.
    noise: float = 0.15  # Standard deviation of the Gaussian noise on the whitened images.
    dropout: float = 0.5  # Rate of both dropout layers.
    leak: float = 0.1  # Slope of the leaky ReLU below zero.
    init_examples: int = 500  # Images of the data-dependent initialisation.
    frozen_g: bool = False  # The code's normal parameterisation, deviation 3.
    bn_momentum: float = 0.9  # Of the running moments of (mean-only) batch norm.
    bn_epsilon: float = 1e-6  # Added to the variance in batch norm.
    synchronized: bool = True  # Batch moments over all replicas, rather than each replica's own.
    epochs: int = 200  # Passes over the training images.
    batch_size: int = 100  # Images per step, over all replicas.
    learning_rate: float | None = None  # Of the first half (none: .0003 for normal, else .003).
    beta_1: float = 0.9  # Adam's momentum in the first half of the epochs.
    beta_1_late: float = 0.5  # Adam's momentum in the second half.
    beta_2: float = 0.999  # Adam's decay of the squared gradient.
    epsilon: float = 1e-8  # Adam's epsilon.
    epsilon_inside_root: bool = False  # The code's Adam, deviation 2.
    sweep: bool = False  # Run all five over --learning-rates and --seeds, below --out.
    learning_rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)  # The sweep's grid.
    seeds: tuple[int, ...] = (0, 1, 2)  # The sweep's seeds.

    MAY_CHANGE: ClassVar[frozenset[str]] = options.RunConfig.MAY_CHANGE | {
        "learning_rates",
        "seeds",
    }
    NAMED: ClassVar[frozenset[str]] = options.RunConfig.NAMED | {"learning_rate"}
    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size", "--width")
    RANGES = options.ranges(
        "width init_examples epochs batch_size",
        "dropout bn_momentum beta_1 beta_1_late beta_2",
    )


PRESETS = {
    "paper": options.Preset("section 5.1 as it stands"),
    "cpu": options.Preset(
        "a quarter of the width, 8 epochs; not comparable with the paper's numbers",
        {"width": 24, "epochs": 8},
    ),
    "smoke": options.Preset(
        "only to see that it runs, in less than a minute; its numbers mean nothing",
        {
            "dataset": "synthetic_cifar10",
            "whiten": False,
            "width": 4,
            "epochs": 2,
            "init_examples": 100,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints the test error of a checkpoint."""

    checkpoint: str  # A run folder, or a checkpoint in one.
    data_dir: str = ""  # Where data sets are; default: the run's own.


# Data


def zca(images: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """ZCA whitening: (x - mean) W has covariance I, W = U diag((s + epsilon)^-1/2) U'.

    Arguments:
      images: float32 [examples, ...].
      epsilon: added to the eigenvalues s of the covariance U diag(s) U'.
    """
    x = images.reshape(len(images), -1).astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    s, u = np.linalg.eigh(x.T @ x / len(x))
    return {"mean": mean, "w": (u / np.sqrt(s + epsilon)) @ u.T}


def load(config: Config, data_dir: str = "") -> data.Images:
    """Returns the data set with float32 images, scaled and whitened."""
    raw = data.load(config.dataset, data_dir or config.data_dir)
    train, test = (
        (images.astype(np.float32) - 127.5) / 128 for images in (raw.train_images, raw.test_images)
    )
    if config.whiten:
        name = f"zca-{config.zca_epsilon:g}"
        whitening = data.cached(name, raw.train_images, lambda: zca(train, config.zca_epsilon))
        mean, w = (whitening[key].astype(np.float32) for key in ("mean", "w"))
        for images in (train, test):
            # Once for the whole run, in place: a step on a CPU would notice the product.
            for part in np.array_split(images.reshape(len(images), -1), -(-len(images) // 5000)):
                part[:] = tf.matmul(part - mean, w)
    return dataclasses.replace(raw, train_images=train, test_images=test)


# Network, in the order of table A


class GaussianNoise(tf.Module):
    """x + stddev * noise in training."""

    def __init__(self, stddev):
        super().__init__()
        self.stddev = stddev

    def __call__(self, x, training, seed):
        """Returns x with noise."""
        if not training:
            return x
        return x + tf.cast(self.stddev * replicas.normal_like(x, seed), x.dtype)


class Dropout(tf.Module):
    """In training zero with probability `rate`, else x / (1 - rate)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def __call__(self, x, training, seed):
        """Returns x with units dropped."""
        if not training:
            return x
        kept = replicas.uniform_like(x, seed) >= self.rate
        return tf.where(kept, x / (1 - self.rate), tf.zeros([], x.dtype))


class Pool(tf.Module):
    """2x2 max pooling with stride 2, or the global average."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __call__(self, x, training, seed):
        """Returns the pooled x."""
        if self.kind == "average":
            return tf.reduce_mean(x, [1, 2])
        return tf.nn.max_pool2d(x, 2, 2, "VALID")


def leaky_relu(t, slope):
    """max(t, slope * t), whose gradient needs the output alone.

    So t need not be kept, and TensorFlow fuses convolution, b and this. (Its own gradient reads t,
    and trips Grappler: "remapper failed".)
    """

    @tf.custom_gradient
    def activate(t):
        y = tf.nn.leaky_relu(t, slope)
        return y, lambda grad: tf.raw_ops.LeakyReluGrad(gradients=grad, features=y, alpha=slope)

    return activate(t)


class Layer(tf.Module):
    """act(w x + b) in the parameterisation that the Config asks for."""

    def __init__(self, config, dtype, units, index, kernel=None, padding="same", activation=True):
        super().__init__()
        kind = config.parameterization
        self.leak = config.leak if activation else None
        init = functools.partial(tf.random.stateless_normal, seed=[config.seed, index], stddev=0.05)
        self.frozen_g = None
        if config.frozen_g and kind in ("normal", "mean_only_bn"):
            init = tf.keras.initializers.GlorotUniform(config.seed + index)
            self.frozen_g = tf.Variable(tf.ones([units]), trainable=False, name="frozen_g")
        choices = {
            "use_bias": kind in ("normal", "weight_norm"),
            "parameterization": "weight_norm" if kind.startswith("weight_norm") else "normal",
            "kernel_initializer": init,
            "compute_dtype": dtype,
        }
        if kernel is None:
            self.linear = tfwn.Dense(units, **choices)
        else:
            self.linear = tfwn.Conv2D(units, kernel, padding=padding, **choices)
        self.norm: Any = None
        if kind == "batch_norm":
            self.norm = BatchNormalization(
                units, config.bn_momentum, config.bn_epsilon, config.synchronized
            )
        elif kind.endswith("mean_only_bn"):
            self.norm = tfwn.MeanOnlyBatchNormalization(
                momentum=config.bn_momentum, synchronized=config.synchronized, compute_dtype=dtype
            )

    def __call__(self, x, training, seed):
        """Returns the layer's outputs."""
        w = None
        if self.frozen_g is not None:
            self.linear.build(x.shape)
            w = self.linear.weight() * tf.cast(self.frozen_g, x.dtype)
        t = self.linear(x, w)
        if self.norm is not None:
            t = self.norm(t, training)
        return t if self.leak is None else leaky_relu(t, self.leak)


class Network(tf.Module):
    """Table A. `rows` holds its rows after ZCA whitening, by the paper's names, in its order."""

    def __init__(self, config: Config, dtype=tf.float32):
        super().__init__()
        self.dtype, width = dtype, config.width
        layer = functools.partial(Layer, config, dtype)
        self.rows: list[tuple[str, Any]] = [
            ("Gaussian noise", GaussianNoise(config.noise)),
            ("3x3 conv leaky ReLU", layer(width, 0, 3)),
            ("3x3 conv leaky ReLU", layer(width, 1, 3)),
            ("3x3 conv leaky ReLU", layer(width, 2, 3)),
            ("2x2 max pool, str. 2", Pool("max")),
            ("dropout", Dropout(config.dropout)),
            ("3x3 conv leaky ReLU", layer(2 * width, 3, 3)),
            ("3x3 conv leaky ReLU", layer(2 * width, 4, 3)),
            ("3x3 conv leaky ReLU", layer(2 * width, 5, 3)),
            ("2x2 max pool, str. 2", Pool("max")),
            ("dropout", Dropout(config.dropout)),
            ("3x3 conv leaky ReLU", layer(2 * width, 6, 3, "valid")),
            ("1x1 conv leaky ReLU", layer(2 * width, 7, 1)),
            ("1x1 conv leaky ReLU", layer(2 * width, 8, 1)),
            ("global average pool", Pool("average")),
            ("softmax output", layer(10, 9, activation=False)),
        ]

    def __call__(self, images, training=False, seed=None) -> tf.Tensor:
        """Returns float32 logits [examples, 10].

        Arguments:
          images: float32 [examples, 32, 32, 3], whitened.
          training: with noise, dropout and batch moments.
          seed: int64 [2], of noise and dropout; needed in training.
        """
        x = tf.cast(images, self.dtype)
        fold_in = functools.partial(tf.random.experimental.stateless_fold_in, alg="philox")
        for index, (_, row) in enumerate(self.rows):
            x = row(x, training, fold_in(seed, index) if training else None)
        return tf.cast(x, tf.float32)


def initialize(config: Config, network: Network, images: np.ndarray) -> None:
    """Section 3's initialisation: all parameterisations begin as the same function.

    Batch norm needs none: with gamma = 1 and beta = 0 it normalises v's outputs itself.
    """
    if config.parameterization == "batch_norm":
        return
    layers = [row for _, row in network.rows if isinstance(row, Layer)]
    norms = [layer.linear.weight.get_g() for layer in layers]
    seed = tf.constant([config.seed, 0], tf.int64)
    # Every replica sees the whole batch, so they agree.
    tfwn.data_dependent_init(lambda x: network(x, training=True, seed=seed), tf.constant(images))
    for layer, norm in zip(layers, norms, strict=True):
        if layer.frozen_g is not None:
            layer.frozen_g.assign(layer.linear.weight.get_g() / norm)
            layer.linear.weight.set_g(norm)


# Optimiser


class EpsilonInsideRoot(tf.keras.optimizers.Adam):
    """Adam with w -= lr * m^ / sqrt(v^ + epsilon), deviation 2."""

    def update_step(self, gradient, variable, learning_rate):
        """One variable's step."""
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        self.assign_add(m, (1 - self.beta_1) * (gradient - m))
        self.assign_add(v, (1 - self.beta_2) * (tf.square(gradient) - v))
        t = tf.cast(self.iterations + 1, tf.float32)
        m_hat = m / (1 - tf.pow(tf.convert_to_tensor(self.beta_1), t))
        v_hat = v / (1 - tf.pow(self.beta_2, t))
        self.assign_sub(variable, learning_rate * m_hat * tf.math.rsqrt(v_hat + self.epsilon))


def make_optimizer(config: Config, variables) -> tf.keras.optimizers.Adam:
    """Returns the Adam of section 5.1; its beta_1 is a variable, switched with the slots kept."""
    kind = EpsilonInsideRoot if config.epsilon_inside_root else tf.keras.optimizers.Adam
    adam = kind(schedule(config, 0)[0], beta_2=config.beta_2, epsilon=config.epsilon)
    adam.beta_1 = tf.Variable(config.beta_1, trainable=False, name="beta_1")
    adam.build(variables)
    return adam


def default_rate(parameterization: str) -> float:
    """Returns the learning rate where none is given."""
    return 0.0003 if parameterization == "normal" else 0.003


def schedule(config: Config, epoch: int) -> tuple[float, float]:
    """Returns (learning rate, beta_1) of an epoch, counted from 0."""
    first, half = config.learning_rate, config.epochs / 2
    if first is None:
        first = default_rate(config.parameterization)
    beta_1 = config.beta_1 if epoch < half else config.beta_1_late
    return first * min(2 - epoch / half, 1.0), beta_1


# Training


def make_steps(config: Config, strategy, network: Network, optimizer=None):
    """Returns (train_step, test_step); both take the whole batch on every replica.

    train_step(images, labels, seed) and test_step(images, labels) return float32 [2]: the sum of
    the losses and the number of errors.
    """

    compiled = functools.partial(tf.function, jit_compile=config.jit_compile)

    def losses_and_errors(logits, labels):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return losses, tf.cast(tf.argmax(logits, 1) != labels, tf.float32)

    def train_replica(images, labels, seed):
        images, labels = replicas.share(images), replicas.share(labels)
        with tf.GradientTape() as tape:
            losses, errors = losses_and_errors(network(images, True, seed), labels)
            loss = tf.reduce_sum(losses) / config.batch_size  # The optimizer adds over replicas.
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(errors)])

    def test_replica(images, labels):
        losses, errors = losses_and_errors(network(replicas.share(images)), replicas.share(labels))
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(errors)])

    @compiled
    def train_step(images, labels, seed):
        sums = strategy.run(train_replica, (images, labels, seed))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    @compiled
    def test_step(images, labels):
        sums = strategy.run(test_replica, (images, labels))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return train_step, test_step


def error_rate(test_step, images: data.Images, tell=lambda done, total: None) -> float:
    """Returns the test error with running moments, in [0, 1]; calls tell(done, total) meanwhile."""
    errors, batch = 0.0, 500
    for start in range(0, len(images.test_labels), batch):
        tell(start, len(images.test_labels))
        part = slice(start, start + batch)
        errors += float(test_step(images.test_images[part], images.test_labels[part])[1])
    return errors / len(images.test_labels)


def order(config: Config, epoch: int, examples: int) -> np.ndarray:
    """Returns the order of the training images in an epoch, counted from 0."""
    return runtime.generator(config.seed, epoch).permutation(examples)


def note(config: Config, images: data.Images) -> str:
    """Returns what to say beside a result."""
    return options.note(PRESETS, config, images.caveat)


def train(config: Config) -> None:
    """Trains one network, or with --sweep all of the grid."""
    if config.sweep:
        sweep.run(config, train, parameterization=tuple(PAPER))
    else:
        images = load(config)  # First: where they are missing, there is no run yet.
        if len(images.train_images) < config.batch_size:
            raise UserError(
                f"--batch-size {config.batch_size} is more than the "
                f"{len(images.train_images)} training images"
            )
        with Run(config) as run:
            train_one(config, images, run)


def train_one(config: Config, images: data.Images, run: Run) -> None:
    """Trains one network."""
    run.introduce(config.parameterization, note(config, images))
    examples = len(images.train_labels)
    with run.strategy.scope():
        network = Network(config, run.dtype)
        network(images.test_images[:1])  # Makes the variables.
        optimizer = make_optimizer(config, network.trainable_variables)
    first = order(config, 0, examples)[: config.init_examples]
    initialize(config, network, images.train_images[first])
    train_step, test_step = make_steps(config, run.strategy, network, optimizer)
    totals = tf.Variable(tf.zeros([2], tf.float64), name="totals")  # Loss, errors of this epoch.
    start = run.begin({"network": network, "optimizer": optimizer, "totals": totals})

    per_epoch = examples // config.batch_size
    began = time.monotonic(), start

    def end_epoch(step):
        """Reports the epoch that ends before `step`; changes nothing."""
        steps = step - began[1]
        seconds = (time.monotonic() - began[0]) / steps * per_epoch if steps else None
        values = {
            "epoch": step // per_epoch,
            "loss": totals[0] / (per_epoch * config.batch_size),
            "train_error": totals[1] / (per_epoch * config.batch_size),
            "test_error": error_rate(test_step, images, run.testing),
            "learning_rate": schedule(config, step // per_epoch - 1)[0],
        }
        run.log(step, **values, **({"epoch_seconds": seconds} if seconds else {}))
        run.say(
            "epoch {epoch:.0f}  loss {loss:.4f}  train error {train_error:.2%}  "
            "test error {test_error:.2%}".format(**{k: float(v) for k, v in values.items()})
        )

    total = config.epochs * per_epoch
    for step in run.steps(
        total, unit="images", per_step=config.batch_size, steps_per_epoch=per_epoch
    ):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == start:
            learning_rate, beta_1 = schedule(config, epoch)
            if position == 0 and step > 0:
                end_epoch(step)
                totals.assign(tf.zeros_like(totals))
            optimizer.learning_rate.assign(learning_rate)
            optimizer.beta_1.assign(beta_1)
            permutation = order(config, epoch, examples)
            began = time.monotonic(), step
        batch = permutation[position * config.batch_size :][: config.batch_size]
        sums = train_step(
            images.train_images[batch],
            images.train_labels[batch],
            tf.constant([config.seed, step + 1], tf.int64),
        )
        totals.assign_add(tf.cast(sums, tf.float64))
        if step % 20 == 0:  # Not at each step: reading a value waits for it.
            loss = float(sums[0]) / config.batch_size
            run.show(loss=loss)
            if not np.isfinite(loss):
                run.log(loss=loss)
    end_epoch(total)


def evaluate(options: Evaluate) -> None:
    """The `evaluate` command."""
    found = checkpoints.open_run(options.checkpoint, Config)
    config = found.config
    images = load(config, options.data_dir)
    network = Network(config, runtime.compute_dtype(config))
    network(images.test_images[:1])
    found.restore(network=network)
    _, test_step = make_steps(config, tf.distribute.get_strategy(), network)
    with progress.Test() as tell:
        error = error_rate(test_step, images, tell)
    print(f"test error {error:.2%}" + note(config, images))


if __name__ == "__main__":
    command_line.main(Config, train, PRESETS, {Evaluate: evaluate})
