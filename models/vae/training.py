"""Training: Adamax on the bound, and Polyak averages of the parameters."""

import functools
import time

import numpy as np
import tensorflow as tf

from models.common import data, replicas, runtime
from models.common.errors import UserError
from models.common.optimizers import Adamax
from models.common.run import Run
from models.vae import pictures
from models.vae.config import EPOCHS, FREE_BITS, Config, check
from models.vae.evaluation import bounds, describe, make_evaluate_step
from models.vae.model import initialize, load, make_network, note, prepare


def average(averaged, network, decay) -> None:
    """Polyak averaging: averaged <- decay averaged + (1 - decay) parameters."""
    for mean, p in zip(averaged.trainable_variables, network.trainable_variables, strict=True):
        moved = mean + (1 - decay) * (p - mean)
        # Each replica assigns its own copy; mean.assign would want to synchronize them.
        tf.raw_ops.AssignVariableOp(resource=mean.handle, value=moved)


def make_train_step(config: Config, strategy, network, averaged, optimizer, per_epoch: int):
    """Returns train_step(images, step): the whole batch on every replica, steps from 0.

    It returns float32 [3], sums over the images: loss, bound, log q(z|x) - log p(z).
    """
    free_bits = config.free_bits
    free_bits = FREE_BITS[config.mnist] if free_bits is None else free_bits

    def replica_step(images, step):
        seed = tf.stack([tf.constant(config.seed, tf.int64), step + 1])
        x = prepare(config, replicas.share(images), seed)
        with tf.GradientTape() as tape:
            log_px, kl = network(x, seed)
            cost = tf.reduce_sum(kl)
            if free_bits:
                # The mean of each map over the whole batch, of which this replica has a share.
                mean = replicas.total(tf.reduce_sum(kl, 0)) / config.batch_size
                cost = config.batch_size * tf.reduce_sum(tf.maximum(free_bits, mean))
                cost /= strategy.num_replicas_in_sync
            loss = cost - tf.reduce_sum(log_px)
            scaled = loss / config.batch_size
        variables = network.trainable_variables
        optimizer.apply(tape.gradient(scaled, variables), variables)
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


def make_optimizer(config: Config, variables) -> Adamax:
    """Returns the code's Adamax."""
    optimizer = Adamax(
        config.learning_rate, config.beta_1, config.beta_2, config.epsilon, epsilon_in_max=True
    )
    optimizer.build(variables)
    return optimizer


def train(config: Config) -> None:
    """Trains one model."""
    check(config)
    images = load(config)  # First: if they are missing, no run folder is made.
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
    epochs = EPOCHS[config.mnist] if config.epochs is None else config.epochs
    with run.strategy.scope():
        network, averaged = (make_network(config, run.dtype) for _ in range(2))
        optimizer = make_optimizer(config, network.trainable_variables)
    first = order(config, 0, examples)[: config.init_examples]
    initialize(config, network, images.train_images[first])
    for mean, p in zip(averaged.variables, network.variables, strict=True):
        mean.assign(p)
    train_step = make_train_step(config, run.strategy, network, averaged, optimizer, per_epoch)
    evaluate_step = make_evaluate_step(config, run.strategy, averaged)
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
        result = bounds(config, evaluate_step, images.test_images, samples, run.testing)
        values = {"epoch": epoch, "loss": loss, "train_bound": bound, "train_kl": kl}
        values |= {f"test_{name}": value for name, value in result.items()}
        run.log(step, **values, **({"epoch_seconds": seconds} if seconds else {}))
        run.say(f"epoch {epoch}  train bound {bound:.2f}  test {describe(result)}")
        if run.chief and (last or epoch % max(1, epochs // 10) == 0):
            run.image("samples", pictures.samples(config, averaged))
            run.image("reconstructions", pictures.reconstructions(config, averaged, images))

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
