"""SGD training that measures every update and the covariance of the gradients."""

from typing import Any

import numpy as np
import tensorflow as tf

import tfwn
from models.common import data, layers, runtime
from models.common.run import Run
from models.mechanism.config import Config


class Network(tf.Module):
    """784 pixels, two hidden layers of ReLUs, 10 logits."""

    def __init__(self, config: Config):
        super().__init__()
        make = layers.Layers(config.parameterization, layers.normal(config.seed))
        self.layers = [make.dense(units) for units in (config.units, config.units, 10)]

    def __call__(self, x) -> tuple[list, list]:
        """Returns the inputs and the pre-activations of the layers."""
        inputs, outputs = [], []
        for layer in self.layers:
            inputs.append(x)
            outputs.append(layer(x))
            x = tf.nn.relu(outputs[-1])
        return inputs, outputs

    def losses(self, outputs, labels) -> tf.Tensor:
        """Returns the cross-entropy of each image."""
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs[-1])

    def vectors(self) -> list[tf.Variable]:
        """Returns each layer's v, or w in the normal parameterization."""
        weights = [layer.weight for layer in self.layers]
        return [w.w if w.parameterization == "normal" else w.v for w in weights]

    def units(self) -> list[tf.Tensor]:
        """Returns each layer's w, every unit scaled to length 1."""
        return [tf.nn.l2_normalize(layer.weight(), 0) for layer in self.layers]


def initialize(config: Config, network: Network, images) -> None:
    """Initializes the network from data, and with `config.matched_start` sets v = w."""
    tfwn.data_dependent_init(lambda x: network(x)[1][-1], tf.constant(images))
    if config.matched_start:
        for layer in network.layers:
            layer.weight.v.assign(layer.weight())


class Measures(tf.Module):
    """Tracks each unit's norm as predicted by sqrt(1 + c^2), and the largest error of a step."""

    def __init__(self, network: Network):
        super().__init__()
        self.first = tf.Variable(norms(network.vectors()), trainable=False)
        self.formula = tf.Variable(self.first)
        self.error = tf.Variable(tf.zeros_like(self.first), trainable=False)

    def add(self, before, after) -> None:
        """Adds an update of the vectors: ||v|| should become sqrt(1 + c^2) ||v||."""
        c = norms([b - a for a, b in zip(before, after, strict=True)]) / norms(before)
        factor = tf.sqrt(1 + tf.square(c))
        self.formula.assign(self.formula * factor)
        error = norms(after) / (factor * norms(before)) - 1
        self.error.assign(tf.maximum(self.error, tf.abs(error)))

    def values(self, network: Network) -> dict[str, float]:
        """Returns the growth of the norms, averaged over units, and the largest error."""
        growth = norms(network.vectors()) / self.first
        return {
            "growth": float(tf.reduce_mean(growth)),
            "growth_by_formula": float(tf.reduce_mean(self.formula / self.first)),
            "formula_error": float(tf.reduce_max(self.error)),
        }


def norms(vectors) -> tf.Tensor:
    """Returns the norms of all units, float64."""
    return tf.concat([tf.norm(tf.cast(v, tf.float64), axis=0) for v in vectors], 0)


def angles(before, after) -> tf.Tensor:
    """Returns the angles between unit vectors in degrees, accurate for small ones."""
    pairs = [
        (tf.cast(a, tf.float64), tf.cast(b, tf.float64)) for a, b in zip(before, after, strict=True)
    ]
    half = tf.atan2(norms([a - b for a, b in pairs]), norms([a + b for a, b in pairs]))
    return 2 * half * 180 / np.pi


def make_step(network: Network, optimizer, measures: Measures):
    """Returns step(images, labels), which returns [loss, mean turn of w in degrees], float64."""

    @tf.function
    def step(images, labels):
        vectors = [tf.identity(v) for v in network.vectors()]
        units = network.units()
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(network.losses(network(images)[1], labels))
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        measures.add(vectors, network.vectors())
        angle = tf.reduce_mean(angles(units, network.units()))
        return tf.stack([tf.cast(loss, tf.float64), angle])

    return step


def covariances(config: Config, network: Network, images, labels) -> dict[str, float]:
    """Returns means over hidden units; C is the covariance of the single images' gradients.

    `cosine`: |cos| of w and C's dominant eigenvector (`cosine_random`: of a random vector and that
    eigenvector); `share` and `share_projected`: the largest eigenvalue divided by the trace, for C
    and for M C M.
    """
    x = tf.constant(images)
    with tf.GradientTape() as tape:
        inputs, outputs = network(x)
        losses = network.losses(outputs, labels)
    # Per image, the gradient with respect to w is the input times that of the pre-activation.
    slopes = tape.gradient(losses, outputs[:-1])
    random = runtime.generator(config.seed, 1)
    found = []
    for a, slope, layer in zip(inputs, slopes, network.layers, strict=False):
        w, a, slope = (np.asarray(part, np.float64) for part in (layer.weight(), a, slope))
        for unit in np.linspace(0, w.shape[1] - 1, config.samples).astype(int):
            gradients = a * slope[:, unit, None]
            c = np.cov(gradients, rowvar=False)
            if not np.trace(c) > 0:  # The unit is 0 for all images.
                continue
            values, vectors = np.linalg.eigh(c)
            direction = w[:, unit] / np.linalg.norm(w[:, unit])
            projected = c - np.outer(direction, direction @ c)
            projected -= np.outer(projected @ direction, direction)
            other = random.normal(size=len(direction))
            found.append(
                {
                    "cosine": abs(vectors[:, -1] @ direction),
                    "cosine_random": abs(vectors[:, -1] @ other) / np.linalg.norm(other),
                    "share": values[-1] / values.sum(),
                    "share_projected": np.linalg.eigvalsh(projected)[-1] / np.trace(projected),
                }
            )
    names = found[0] if found else ()  # Empty if all units are dead.
    return {name: float(np.mean([one[name] for one in found])) for name in names}


def train(config: Config) -> None:
    """Trains one network."""
    images = data.load(config.dataset, config.data_dir)
    x, test_x = (
        part.reshape(len(part), -1).astype(np.float32) / 255
        for part in (images.train_images, images.test_images)
    )
    y, per_epoch = images.train_labels, data.steps_per_epoch(config.batch_size, len(x))
    with Run(config, config.parameterization, images.caveat) as run:
        network = Network(config)
        initialize(config, network, x[:500])
        optimizer = tf.keras.optimizers.SGD(config.learning_rate)
        optimizer.build(network.trainable_variables)
        measures = Measures(network)
        train_step = make_step(network, optimizer, measures)
        state = {"network": network, "optimizer": optimizer, "measures": measures}
        run.begin(state, sums=2)

        def look() -> dict[str, Any]:
            some = slice(0, config.examples)
            return measures.values(network) | covariances(config, network, x[some], y[some])

        if run.step == 0:
            run.log(**look())
        for epoch in run.epochs(config.epochs, per_epoch, config.batch_size):
            order = runtime.generator(config.seed, epoch.number).permutation(len(x))
            for step in epoch:
                batch = order[epoch.slice]
                sums = train_step(x[batch], y[batch])
                epoch.add(sums * config.batch_size)
                if step % 100 == 0:
                    run.show(loss=sums[0])
            loss, angle = epoch.means
            test_error = float(np.mean(np.argmax(network(test_x)[1][-1], 1) != images.test_labels))
            run.log(epoch=epoch.number + 1, loss=loss, angle=angle, test_error=test_error, **look())
            run.say(
                f"epoch {epoch.number + 1}  loss {loss:.4f}  test error {test_error:.2%}  "
                f"a step turns w by {angle:.3f} degrees"
            )
