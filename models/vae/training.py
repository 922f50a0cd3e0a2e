"""Training: Adamax on the bound, and the average of the parameters."""

import tensorflow as tf

from models.common import data, replicas, runtime
from models.common.optimizers import Adamax
from models.common.run import Run
from models.vae import pictures
from models.vae.config import Config
from models.vae.evaluation import bounds, describe, make_evaluate_step
from models.vae.model import caveats, initialize, load, make_network, prepare


def make_optimizer(config: Config, variables) -> Adamax:
    """Returns the code's Adamax, with its variables created."""
    optimizer = Adamax(
        config.learning_rate, config.beta_1, config.beta_2, config.epsilon, epsilon_in_max=True
    )
    optimizer.build(variables)
    return optimizer


def make_train_step(config: Config, strategy, network, averaged, optimizer, per_epoch: int):
    """Returns train_step(images, step), with the whole batch on every replica and steps from 0.

    It returns float32 [3]: sums over the images of the loss, the bound and log q(z|x) - log p(z).
    """

    def train_step(images, step):
        seed = tf.stack([tf.constant(config.seed, tf.int64), step + 1])
        x = prepare(config, replicas.share(images), seed)
        with tf.GradientTape() as tape:
            log_px, kl = network(x, seed)
            cost = tf.reduce_sum(kl)
            if config.least_kl:
                # Each map's mean over the whole batch, not only over this replica's share.
                mean = replicas.total(tf.reduce_sum(kl, 0)) / config.batch_size
                cost = config.batch_size * tf.reduce_sum(tf.maximum(config.least_kl, mean))
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

    return replicas.summed(strategy, train_step, config.jit_compile)


def average(averaged, network, decay) -> None:
    """Polyak averaging: averaged <- decay averaged + (1 - decay) parameters."""
    for mean, p in zip(averaged.trainable_variables, network.trainable_variables, strict=True):
        moved = mean + (1 - decay) * (p - mean)
        # Each replica updates its own copy; mean.assign would have to synchronize them.
        tf.raw_ops.AssignVariableOp(resource=mean.handle, value=moved)


def train(config: Config) -> None:
    """Trains one model."""
    images = load(config)  # Before a run folder exists, because the data may be missing.
    examples = len(images.train_images)
    per_epoch = data.steps_per_epoch(config.batch_size, examples)
    title = f"{config.dataset}, {config.parameterization}"
    with Run(config, title, *caveats(config, images)) as run:
        with run.strategy.scope():
            network, averaged = (make_network(config, run.dtype) for _ in range(2))
            optimizer = make_optimizer(config, network.trainable_variables)
        first = runtime.generator(config.seed, 0).permutation(examples)[: config.init_examples]
        initialize(config, network, images.train_images[first])
        for mean, p in zip(averaged.variables, network.variables, strict=True):
            mean.assign(p)
        train_step = make_train_step(config, run.strategy, network, averaged, optimizer, per_epoch)
        evaluate_step = make_evaluate_step(config, run.strategy, averaged)
        run.begin({"network": network, "averaged": averaged, "optimizer": optimizer}, sums=3)
        for epoch in run.epochs(config.last_epoch, per_epoch, config.batch_size):
            permutation = runtime.generator(config.seed, epoch.number).permutation(examples)
            for step in epoch:
                batch = images.train_images[permutation[epoch.slice]]
                sums = train_step(batch, tf.constant(step, tf.int64))
                epoch.add(sums)
                if step % 20 == 0:
                    loss, bound, _ = sums.numpy() / config.batch_size
                    run.show(loss=loss, bound=bound)
            number, last = epoch.number + 1, epoch.number + 1 == config.last_epoch
            loss, bound, kl = epoch.means
            samples = config.eval_samples if last else 1
            result = bounds(config, evaluate_step, images.test_images, samples, run.evaluating)
            run.log(
                epoch=number,
                loss=loss,
                train_bound=bound,
                train_kl=kl,
                **{f"test_{name}": value for name, value in result.items()},
                epoch_seconds=epoch.seconds,
            )
            run.say(f"epoch {number}  train bound {bound:.2f}  test {describe(result)}")
            if run.chief and (last or number % max(1, config.last_epoch // 10) == 0):
                run.image("samples", pictures.samples(config, averaged))
                run.image("reconstructions", pictures.reconstructions(config, averaged, images))
