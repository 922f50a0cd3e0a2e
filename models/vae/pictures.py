"""Pictures of samples and reconstructions, and the commands that write them."""

import numpy as np
import tensorflow as tf

from models.common import plots
from models.vae.config import Config, Reconstruct, Sample
from models.vae.evaluation import restore
from models.vae.model import load, prepare


def samples(config: Config, network, count: int = 100, seed: int = 0) -> bytes:
    """Returns a PNG of samples from the model (the means of the pixels)."""
    images = network.sample(count, tf.constant([seed, 0], tf.int64))
    return plots.png(plots.tile(images, gap=2))


def reconstructions(config: Config, network, images, count: int = 50, seed: int = 0) -> bytes:
    """Returns a PNG of test images in rows of 10, each row above its reconstructions."""
    number = tf.constant([seed, 0], tf.int64)
    x = prepare(config, images.test_images[:count], number)
    count = len(x)
    shown = x if config.mnist else x + 0.5
    both = np.stack([shown, network.reconstruct(x, number)])
    both = np.pad(both, [(0, 0), (0, -count % 10), *3 * [(0, 0)]])
    rows = [part for start in range(0, count, 10) for part in both[:, start : start + 10]]
    return plots.png(plots.tile(np.concatenate(rows), gap=2))


def sample(asked: Sample) -> None:
    """The `sample` command."""
    found, network = restore(asked.checkpoint)
    png = samples(found.config, network, asked.count, asked.seed)
    plots.write(asked.out or found.folder / "samples" / "samples.png", png)


def reconstruct(asked: Reconstruct) -> None:
    """The `reconstruct` command."""
    found, network = restore(asked.checkpoint)
    images = load(found.config, asked.data_dir)
    png = reconstructions(found.config, network, images, asked.count, asked.seed)
    plots.write(asked.out or found.folder / "samples" / "reconstructions.png", png)
