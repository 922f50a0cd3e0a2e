"""Optimizer, training step, training loop and evaluation of section 5.1."""

import tensorflow as tf

from models.cifar.config import Config, Evaluate
from models.cifar.images import load
from models.cifar.network import Network, initialize
from models.common import checkpoints, data, progress, replicas, runtime
from models.common.run import Run


class EpsilonInsideRoot(tf.keras.optimizers.Adam):
    """Adam with w -= lr * m^ / sqrt(v^ + epsilon): item 2 in models/cifar/__init__.py."""

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable."""
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        self.assign_add(m, (1 - self.beta_1) * (gradient - m))
        self.assign_add(v, (1 - self.beta_2) * (tf.square(gradient) - v))
        t = tf.cast(self.iterations + 1, tf.float32)
        m_hat = m / (1 - tf.pow(tf.convert_to_tensor(self.beta_1), t))
        v_hat = v / (1 - tf.pow(self.beta_2, t))
        self.assign_sub(variable, learning_rate * m_hat * tf.math.rsqrt(v_hat + self.epsilon))


def make_optimizer(config: Config, variables) -> tf.keras.optimizers.Adam:
    """Returns section 5.1's Adam. beta_1 is a variable, so changing it keeps the moments."""
    kind = EpsilonInsideRoot if config.epsilon_inside_root else tf.keras.optimizers.Adam
    adam = kind(schedule(config, 0)[0], beta_2=config.beta_2, epsilon=config.epsilon)
    adam.beta_1 = tf.Variable(config.beta_1, trainable=False, name="beta_1")
    adam.build(variables)
    return adam


def schedule(config: Config, epoch: int) -> tuple[float, float]:
    """Returns (learning rate, beta_1) of an epoch, counted from 0."""
    half = config.epochs / 2
    beta_1 = config.beta_1 if epoch < half else config.beta_1_late
    return config.rate * min(2 - epoch / half, 1.0), beta_1


def make_steps(config: Config, strategy, network: Network, optimizer=None):
    """Returns (train_step, evaluate_step); both take the whole batch on every replica.

    train_step(images, labels, seed) and evaluate_step(images, labels) return float32 [2], the sum
    of the losses and the number of errors.
    """

    def losses_and_errors(logits, labels):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return losses, tf.cast(tf.argmax(logits, 1) != labels, tf.float32)

    def train_step(images, labels, seed):
        images, labels = replicas.share(images), replicas.share(labels)
        with tf.GradientTape() as tape:
            losses, errors = losses_and_errors(network(images, True, seed), labels)
            loss = tf.reduce_sum(losses) / config.batch_size  # The optimizer sums over replicas.
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(errors)])

    def evaluate_step(images, labels):
        losses, errors = losses_and_errors(network(replicas.share(images)), replicas.share(labels))
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(errors)])

    steps = train_step, evaluate_step
    return tuple(replicas.summed(strategy, step, config.jit_compile) for step in steps)


def error_rate(evaluate_step, images: data.Images, report=lambda done, total: None) -> float:
    """Returns the test error, in [0, 1], computed with running moments."""
    errors, batch = 0.0, 500
    for start in range(0, len(images.test_labels), batch):
        report(start, len(images.test_labels))
        part = slice(start, start + batch)
        errors += float(evaluate_step(images.test_images[part], images.test_labels[part])[1])
    return errors / len(images.test_labels)


def train(config: Config) -> None:
    """Trains one network."""
    images = load(config)  # Before a run folder exists, because the data may be missing.
    examples = len(images.train_labels)
    per_epoch = data.steps_per_epoch(config.batch_size, examples)
    with Run(config, config.parameterization, images.caveat) as run:
        with run.strategy.scope():
            network = Network(config, run.dtype)
            network(images.test_images[:1])  # Creates the variables.
            optimizer = make_optimizer(config, network.trainable_variables)
        first = runtime.generator(config.seed, 0).permutation(examples)[: config.init_examples]
        initialize(config, network, images.train_images[first])
        train_step, evaluate_step = make_steps(config, run.strategy, network, optimizer)
        run.begin({"network": network, "optimizer": optimizer}, sums=2)
        for epoch in run.epochs(config.epochs, per_epoch, config.batch_size):
            learning_rate, beta_1 = schedule(config, epoch.number)
            optimizer.learning_rate.assign(learning_rate)
            optimizer.beta_1.assign(beta_1)
            permutation = runtime.generator(config.seed, epoch.number).permutation(examples)
            for step in epoch:
                batch = permutation[epoch.slice]
                sums = train_step(
                    images.train_images[batch],
                    images.train_labels[batch],
                    tf.constant([config.seed, step + 1], tf.int64),
                )
                epoch.add(sums)
                if step % 20 == 0:
                    run.show(loss=sums[0] / config.batch_size)
            loss, train_error = epoch.means
            test_error = error_rate(evaluate_step, images, run.evaluating)
            run.log(
                epoch=epoch.number + 1,
                loss=loss,
                train_error=train_error,
                test_error=test_error,
                learning_rate=learning_rate,
                epoch_seconds=epoch.seconds,
            )
            run.say(
                f"epoch {epoch.number + 1}  loss {loss:.4f}  train error {train_error:.2%}  "
                f"test error {test_error:.2%}"
            )


def evaluate(asked: Evaluate) -> None:
    """The `evaluate` command."""
    found = checkpoints.open_run(asked.checkpoint, Config)
    images = load(found.config, asked.data_dir)
    network = Network(found.config, runtime.compute_dtype(found.config))
    network(images.test_images[:1])
    found.restore(network=network)
    _, evaluate_step = make_steps(found.config, tf.distribute.get_strategy(), network)
    with progress.evaluation() as report:
        error = error_rate(evaluate_step, images, report)
    print(f"test error {error:.2%}{found.note(images.caveat)}")
