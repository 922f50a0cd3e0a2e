"""Data, optimizer, training step, training loop and evaluation of section 5.3."""

import dataclasses
import itertools

import numpy as np
import tensorflow as tf

from models.common import checkpoints, data, plots, progress, replicas, runtime
from models.common.errors import UserError
from models.common.run import Run
from models.draw.config import Config, Evaluate
from models.draw.network import Network
from models.draw.pictures import sample_noise


def load(config: Config, data_dir: str = "") -> data.Images:
    """Returns the data set, binarized."""
    raw = data.load(config.dataset, data_dir or config.data_dir)
    if not config.batch_size <= config.train_images <= len(raw.train_images):
        raise UserError(
            f"--train-images must lie between --batch-size {config.batch_size} and the "
            f"{len(raw.train_images)} images of {config.dataset}, got {config.train_images}"
        )
    train, test = data.binarize(
        raw.train_images[..., 0], raw.test_images[..., 0], seed=config.binarization_seed
    )
    return dataclasses.replace(raw, train_images=train[: config.train_images], test_images=test)


def noise(config: Config, x, seed) -> tf.Tensor:
    """Returns u, [T, batch, latent_units], for x, this replica's share of the batch."""
    batch = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    like = tf.zeros([batch, config.glimpses, config.latent_units])
    # Folded, because [seed, 1], [seed, 2], ... also seed the layers' v.
    u = replicas.normal_like(like, replicas.fold_in(seed, 0))
    return tf.transpose(u, [1, 0, 2])


def make_steps(config: Config, strategy, network: Network, optimizer=None):
    """Returns (train_step, evaluate_step); both take the whole batch on every replica.

    step(images, seed) returns float32 [1 + T], the sums over the images of the cross-entropy and
    of each KL_t.
    """

    def evaluate_step(x, u):
        cross_entropy, kl = network(x, u)
        return tf.concat([[tf.reduce_sum(cross_entropy)], tf.reduce_sum(kl, 1)], 0)

    def train_step(x, u):
        with tf.GradientTape() as tape:
            losses = evaluate_step(x, u)
            loss = tf.reduce_sum(losses) / config.batch_size
        variables = network.trainable_variables
        gradients = tape.gradient(loss, variables)
        replica = tf.distribute.get_replica_context()
        n = replica.num_replicas_in_sync
        if n > 1:  # Clip the sum over replicas; 1/n, because the optimizer sums again.
            gradients = [g / n for g in replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)]
        gradients, _ = tf.clip_by_global_norm(gradients, config.clip_norm / n)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return losses

    def with_noise(step):
        if config.jit_compile:
            step = tf.function(step, jit_compile=True)

        def replica_step(images, seed):
            x = tf.cast(replicas.share(images), tf.float32)
            return step(x, noise(config, x, seed))  # XLA would draw different noise.

        return replicas.summed(strategy, replica_step)

    return with_noise(train_step), with_noise(evaluate_step)


def make_optimizer(config: Config, variables) -> tf.keras.optimizers.Adam:
    """Returns Adam as in the code, with its variables created."""
    adam = tf.keras.optimizers.Adam(
        config.learning_rate, config.beta_1, config.beta_2, config.epsilon
    )
    adam.build(variables)
    return adam


def mean_losses(
    config: Config, evaluate_step, images, report=lambda done, total: None, draws: int = 1
) -> np.ndarray:
    """Returns the images' mean cross-entropy and KL_t, float64 [1 + T], in nats.

    Args:
      config, evaluate_step: those of the network.
      images: uint8 [examples, side, side].
      report: called as report(done, total) to show progress.
      draws: noise samples per image, the same in every call.
    """
    sums, batch = np.zeros(1 + config.glimpses), config.batch_size
    starts = range(0, len(images), batch)
    for index, (_, start) in enumerate(itertools.product(range(draws), starts)):
        report(index, draws * len(starts))
        seed = tf.constant([config.seed, -1 - index], tf.int64)
        sums += evaluate_step(images[start : start + batch], seed).numpy()
    return sums / (draws * len(images))


def describe(losses: np.ndarray) -> str:
    """Returns the result of `mean_losses` as text."""
    cross_entropy, kl = losses[0], losses[1:].sum()
    return f"bound {-losses.sum():.2f} nats = -(cross-entropy {cross_entropy:.2f} + KL {kl:.2f})"


def train(config: Config) -> None:
    """Trains one network."""
    images = load(config)  # Before a run folder exists, because the data may be missing.
    per_epoch = len(images.train_images) // config.batch_size
    with Run(config, config.parameterization, images.caveat) as run:
        with run.strategy.scope():
            network = Network(config, dtype=run.dtype)
            optimizer = make_optimizer(config, network.trainable_variables)
        train_step, evaluate_step = make_steps(config, run.strategy, network, optimizer)
        run.begin({"network": network, "optimizer": optimizer}, sums=1 + config.glimpses)
        for epoch in run.epochs(config.epochs, per_epoch, config.batch_size):
            for step in epoch:
                seed = tf.constant([config.seed, step + 1], tf.int64)
                losses = train_step(images.train_images[epoch.slice], seed)
                epoch.add(losses)
                if step % 20 == 0:
                    run.show(loss=tf.reduce_sum(losses) / config.batch_size)
            loss = epoch.means.sum()
            losses = mean_losses(config, evaluate_step, images.test_images, run.evaluating)
            run.log(
                epoch=epoch.number + 1,
                loss=loss,
                test_bound=-losses.sum(),
                test_cross_entropy=losses[0],
                epoch_seconds=epoch.seconds,
                **{f"kl/{t:02}": kl for t, kl in enumerate(losses[1:], 1)},
            )
            canvases, _ = network.sample(sample_noise(config))
            run.image("samples", plots.png(plots.tile(canvases[-1])))
            run.say(f"epoch {epoch.number + 1}  train bound {-loss:.2f}  test {describe(losses)}")


def evaluate(asked: Evaluate) -> None:
    """The `evaluate` command."""
    found = checkpoints.open_run(asked.checkpoint, Config)
    images = load(found.config, asked.data_dir)
    network = Network(found.config, dtype=runtime.compute_dtype(found.config))
    found.restore(network=network)
    _, evaluate_step = make_steps(found.config, tf.distribute.get_strategy(), network)
    with progress.evaluation() as report:
        losses = mean_losses(found.config, evaluate_step, images.test_images, report, asked.draws)
    print(f"test {describe(losses)}{found.note(images.caveat)}")
