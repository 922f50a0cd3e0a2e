"""Weight normalization in a plain TensorFlow training loop: MNIST digits, one CPU, seconds.

Trains the same network twice, from the same initial function, with the weights w themselves and
with w = g * v / ||v||, and prints both losses side by side. Needs `pip install '.[models]'`.
"""

import itertools
import os
import time
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from rich.console import Console
from rich.table import Table

import tfwn

UNITS = [784, 256, 256, 10]
STEPS = 400
REPORT = 50
BATCH = 100
LEARNING_RATE = 0.05


class Network(tf.Module):
    """Fully connected, ReLU; `normalized` says how a weight matrix is stored."""

    def __init__(self, normalized: bool, seed: int):
        random = np.random.default_rng(seed)
        self.layers = []
        for inputs, outputs in itertools.pairwise(UNITS):
            v = random.normal(0, 0.05, [inputs, outputs]).astype("float32")
            g = np.linalg.norm(v, axis=0)  # so that at first w = v, either way
            layer = [tf.Variable(v), tf.Variable(g)] if normalized else [tf.Variable(v)]
            self.layers.append([*layer, tf.Variable(tf.zeros(outputs))])

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the logits [batch, 10] of images [batch, 784]."""
        for number, (*weight, b) in enumerate(self.layers):
            w = tfwn.weight_norm(*weight) if len(weight) == 2 else weight[0]
            x = tf.matmul(tf.nn.relu(x) if number else x, w) + b
        return x


def load_digits() -> tf.data.Dataset:
    """Returns shuffled batches of (image [BATCH, 784] in 0..1, label [BATCH])."""
    shared = Path(__file__).parents[2] / "shared" / "data"
    data_dir = os.environ.get("TFWN_DATA_DIR", shared if shared.is_dir() else None)
    digits = tfds.load("mnist", split="train", data_dir=data_dir, as_supervised=True)
    to_vector = lambda image, label: (tf.reshape(image, [784]) / 255, label)  # noqa: E731
    return digits.cache().repeat().shuffle(10_000, seed=1).map(to_vector).batch(BATCH)


def train(normalized: bool) -> tuple[list[float], float]:
    """Returns the mean loss of every REPORT steps, and the seconds they took."""
    network = Network(normalized, seed=1)
    optimizer = tf.keras.optimizers.SGD(LEARNING_RATE, momentum=0.9)

    @tf.function
    def step(image, label):
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(label, network(image))
            loss = tf.reduce_mean(losses)
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    batches = iter(load_digits())
    begin = time.perf_counter()
    losses = [float(step(*next(batches))) for _ in range(STEPS)]
    seconds = time.perf_counter() - begin
    return np.mean(np.reshape(losses, [-1, REPORT]), axis=1).tolist(), seconds


def main() -> None:
    """Trains both and prints a table."""
    console = Console()
    results = {}
    for name, normalized in (("normal", False), ("weight norm", True)):
        with console.status(f"training the {name} network"):
            results[name] = train(normalized)
    table = Table("steps", *results, title="MNIST training loss")
    for number, losses in enumerate(zip(*(r[0] for r in results.values()), strict=True)):
        table.add_row(
            f"{number * REPORT + 1} to {(number + 1) * REPORT}", *(f"{x:.4f}" for x in losses)
        )
    table.add_section()
    table.add_row("seconds", *(f"{r[1]:.1f}" for r in results.values()))
    console.print(table)


if __name__ == "__main__":
    main()
