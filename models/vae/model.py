"""The two models behind one interface: data, network, initialization."""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

import tfwn
from models.common import data, replicas
from models.vae.cifar10 import CifarVAE
from models.vae.config import Config
from models.vae.mnist import MnistVAE


def load(config: Config, data_dir: str = "") -> data.Images:
    """Returns the data set as uint8; with static binarization MNIST's pixels are 0 or 255."""
    images = data.load(config.dataset, data_dir or config.data_dir)
    train, test = images.train_images, images.test_images
    if config.mnist and config.binarization == "static":
        train, test = (255 * part for part in data.binarize(train, test))
    return dataclasses.replace(
        images, train_images=train[: config.train_examples], test_images=test
    )


def prepare(config: Config, images, seed) -> tf.Tensor:
    """Returns the network's input for uint8 images: MNIST {0, 1}, CIFAR-10 (-1/2, 1/2)."""
    x = tf.cast(images, tf.float32)
    if not config.mnist:
        return (x + 0.5) / 256 - 0.5
    if config.binarization == "dynamic":
        uniform = replicas.uniform_like(x, replicas.fold_in(seed, 1_000_000))
        return tf.cast(uniform * 255 < x, tf.float32)
    return x / 255


def make_network(config: Config, dtype=tf.float32) -> Any:
    """Returns the data set's network, with its variables created."""
    network = (MnistVAE if config.mnist else CifarVAE)(config, dtype)
    shape = [1, 28, 28, 1] if config.mnist else [1, 32, 32, 3]
    tf.distribute.get_strategy().run(
        lambda: network(tf.zeros(shape), tf.constant([0, 0], tf.int64))
    )
    return network


def initialize(config: Config, network, images: np.ndarray) -> None:
    """Initializes every layer from data (section 3), in the order of the forward pass."""
    seed = tf.constant([config.seed, 0], tf.int64)
    x = prepare(config, images, seed)
    if config.data_dependent_init:
        # Every replica sees the whole batch, so all compute the same values.
        tfwn.data_dependent_init(
            lambda x: network(x, seed), x, init_scale=lambda layer: layer.init_scale
        )
    if not config.mnist:
        # A logistic's standard deviation is pi / sqrt(3) times its scale.
        stddev = tf.math.reduce_std(x, [0, 1, 2])
        network.log_scale.assign(tf.math.log(stddev * math.sqrt(3) / math.pi))


def caveats(config: Config, images: data.Images) -> tuple[str, str]:
    """Returns the caveats shown with the results."""
    return f"{config.binarization} binarization" if config.mnist else "", images.caveat
