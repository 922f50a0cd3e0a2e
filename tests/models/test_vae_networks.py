"""Tests the networks in models/vae: their shapes, initialization and data."""

import numpy as np
import pytest
import tensorflow as tf
from vaes import KINDS, SEED, config_of, each_dataset, each_kind, images_of, initialized

from models.common import data
from models.vae.config import Config
from models.vae.model import load, make_network, prepare
from tfwn.layer import FeedForward


def layers_called(network, x):
    """Returns each layer that the network calls on x, with its pre-activations."""
    calls = []
    pre_activation = FeedForward.pre_activation

    def record(layer, *args):
        t = pre_activation(layer, *args)
        calls.append((layer, t.numpy()))
        return t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeedForward, "pre_activation", record)
        network(x, tf.constant([0, 0], tf.int64))
    return calls


@each_kind
@each_dataset
def test_data_dependent_init_reaches_every_layer_of_every_part(dataset, kind):
    config = config_of(dataset=dataset, parameterization=kind, stochastic_layers=(2, 2))
    network = initialized(config)
    x = prepare(config, images_of(config), tf.constant([0, 0], tf.int64))
    calls = layers_called(network, x)
    every = {id(m) for m in network.submodules if isinstance(m, FeedForward)}
    assert {id(layer) for layer, _ in calls} == every
    constant = 0
    for layer, t in calls:
        mean, stddev = (
            t.mean((0, 1, 2) if t.ndim == 4 else 0),
            t.std((0, 1, 2) if t.ndim == 4 else 0),
        )
        if layer.b is not None:
            np.testing.assert_allclose(mean, 0, atol=1e-4)
        varies = stddev > 1e-6
        constant += (~varies).sum()
        np.testing.assert_allclose(stddev[varies], layer.init_scale, rtol=1e-3)
    # MNIST: the fully masked first m and s of each step. CIFAR-10: the layers whose input is the
    # variable `top`, which starts at zero.
    split = 2 * config.features + 4 * config.latent_maps
    assert constant == (2 * config.flow_steps if "mnist" in dataset else split)


@each_dataset
def test_both_parameterizations_begin_as_the_same_function(dataset):
    outputs = []
    for kind in KINDS:
        config = config_of(dataset=dataset, parameterization=kind)
        outputs.append(initialized(config)(prepare(config, images_of(config), SEED), SEED))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_mnists_encoder_is_the_papers_and_the_decoder_its_mirror():
    network = make_network(Config())
    shapes = [
        (layer.weight.shape.as_list(), t.shape[1:])
        for layer, t in layers_called(network, tf.zeros([1, 28, 28, 1]))
    ]
    encoder = [t for w, t in shapes if w[0] == 3][: 6 * 2]
    assert [t[-1] for t in encoder] == 4 * [16] + 8 * [32]
    assert [t[0] for t in encoder] == 4 * [28] + 4 * [14] + 4 * [7]
    dense = [w for w, _ in shapes if len(w) == 2]
    assert dense[0] == [7 * 7 * 32, 450]
    assert dense[1] == [450, 2 * 32 + 320]
    assert dense[2:8] == 2 * [[32, 320], [320, 320], [320, 64]]
    assert dense[8:] == [[32, 450], [450, 7 * 7 * 32]]
    decoder = [t for w, t in shapes if w[0] == 3][6 * 2 :]
    # If a rearrangement doubles the size, the convolution before it has the smaller size.
    assert [t[0] for t in decoder] == 4 * [7] + 4 * [14] + 5 * [28]
    assert decoder[-1] == (28, 28, 1)


def test_cifars_layers_are_the_codes():
    config = Config(dataset="cifar10")
    network = make_network(config)
    assert len(network.layers) == 8
    below, halves, top = (network.layers[i] for i in (0, 4, 7))
    h, z = 160, 32
    assert below.up_split.weight.shape == [3, 3, h, 2 * h + 2 * z]
    assert below.down_split.weight.shape == [3, 3, h, 2 * h + 4 * z]
    assert below.up_out.weight.shape == [3, 3, h, h]
    assert below.down_out.weight.shape == [3, 3, h + z, h]
    assert halves.down_out.conv.weight.shape == [3, 3, h + z, 4 * h]
    assert top.up_out is None
    assert [layer.weight.shape.as_list() for layer in below.flow.hidden] == [
        [3, 3, z, h], [3, 3, h, h],
    ]  # fmt: skip
    assert network.first.weight.shape == [5, 5, 3, h]
    assert network.down(None, 2, SEED)[0].shape == [2, 32, 32, 3]
    assert network.top_size == 8


def test_static_binarization_is_drawn_once_for_all_seeds_and_dynamic_each_time():
    one, other = (load(config_of(seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one.train_images, other.train_images)
    np.testing.assert_array_equal(np.unique(one.train_images), [0, 255])
    grey = data.load("synthetic_mnist").train_images / 255
    drawn = (one.train_images / 255).astype(float)
    assert abs((drawn - grey).mean()) < 2e-3
    dynamic = config_of(binarization="dynamic")
    images = images_of(dynamic)
    x = [prepare(dynamic, images, tf.constant([0, step], tf.int64)).numpy() for step in (1, 2)]
    assert set(np.unique(x)) == {0, 1}
    assert (x[0] != x[1]).any()
    assert abs(x[0].mean() - images.mean() / 255) < 5e-3


def test_binarized_mnist(data_dir):
    images = load(Config(data_dir=str(data_dir)))
    grey = data.load("mnist", str(data_dir))
    assert images.train_images.shape == (60_000, 28, 28, 1)
    assert (images.train_images[grey.train_images == 255] == 255).all()
    assert (images.test_images[grey.test_images == 0] == 0).all()
    assert images.test_images.mean() == pytest.approx(grey.test_images.mean(), rel=1e-3)


@each_dataset
def test_weights_and_noise_have_different_seeds(dataset, normal_seeds):
    config = config_of(dataset=dataset)
    network = make_network(config)
    x = tf.zeros([1, *load(config).train_images.shape[1:]])
    network(x, SEED)
    weights = {seed for seed in normal_seeds if seed[0] == config.seed}
    normal_seeds.clear()
    for seed in weights:
        network(x, tf.constant(seed, tf.int64))
    network.sample(1, tf.constant([config.seed, 0], tf.int64))
    assert weights
    assert normal_seeds
    assert not weights & normal_seeds
