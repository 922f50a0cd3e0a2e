"""Helpers for testing the auto-encoders: small networks for both data sets."""

import pytest
import tensorflow as tf

from models.vae.config import Config
from models.vae.model import initialize, load, make_network

SEED = tf.constant([0, 1], tf.int64)
KINDS = ("normal", "weight_norm")
each_dataset = pytest.mark.parametrize("dataset", ["synthetic_mnist", "synthetic_cifar10"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(**values):
    return Config.of_preset("smoke", **values)


def images_of(config, count=100):
    return load(config).train_images[:count]


def initialized(config, count=100):
    network = make_network(config)
    initialize(config, network, images_of(config, count))
    return network
