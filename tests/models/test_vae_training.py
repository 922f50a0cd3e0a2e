"""models/vae.py: flows and densities against their definitions, one start, exact resume."""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from models import vae
from models.common import checkpoints, command_line, data, metrics, runtime
from models.common.autoregressive import Autoregressive
from models.common.densities import log_discretized_logistic, log_mean_exp, log_normal
from models.common.optimizers import Adamax
from tfwn.layer import FeedForward

ROOT = Path(__file__).parents[2]
SEED = tf.constant([0, 1], tf.int64)
DATASETS = ("synthetic_mnist", "synthetic_cifar10")
KINDS = ("normal", "weight_norm")
each_dataset = pytest.mark.parametrize("dataset", DATASETS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(**values):
    return vae.Config(**{**vae.PRESETS["smoke"].values, "preset": "smoke", **values})


def images_of(config, count=100):
    return vae.load(config).train_images[:count]


def initialized(config, count=100):
    network = vae.make_network(config)
    vae.initialize(config, network, images_of(config, count))
    return network


def weights(folder):
    """All of a run's final checkpoint, by name."""
    reader = tf.train.load_checkpoint(str(checkpoints.find(folder) / "tf"))
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def assert_same_run(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for part in ("averaged/", "optimizer/_variables/", "optimizer/m/", "optimizer/u/"):
        assert sum(name.startswith(part) for name in ours) > 20, part
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], name)
    ours, theirs = metrics.read(one), metrics.read(other)
    names = ours.keys() - {"time", "epoch_seconds"}
    assert names == theirs.keys() - {"time", "epoch_seconds"}
    for name in names:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


@pytest.fixture
def run(capsys):
    """Runs the command line; returns (exit status, stdout, stderr)."""

    def call(*argv):
        status = 0
        commands = {
            vae.Evaluate: vae.evaluate,
            vae.Sample: vae.sample,
            vae.Reconstruct: vae.reconstruct,
        }
        try:
            command_line.main(vae.Config, vae.train, vae.PRESETS, commands, list(map(str, argv)))
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# The flow


def random_flow(rng, convolutional, latents=6, kind="weight_norm", hidden=(14, 9)):
    """A masked network with nothing at its first value, and inputs for it."""
    layers = vae.Layers(vae.Config(parameterization=kind), tf.float32)
    net = Autoregressive(layers, latents, hidden, convolutional)
    shape = [1, 4, 3] if convolutional else [1]
    z, context = (
        tf.constant(rng.normal(size=[*shape, n]), tf.float32) for n in (latents, hidden[0])
    )
    net(z, context)
    for layer in [*net.hidden, net.output]:
        layer.weight.set_g(rng.uniform(0.5, 2, layer.weight.g_shape))
        if layer.b is not None:
            layer.b.assign(rng.normal(size=layer.b.shape))
    return net, z, context


def jacobian(function, z):
    """dy_i / dz_j, both flat, and y."""
    flat = tf.reshape(z, [-1])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(flat)
        y = tf.reshape(function(tf.reshape(flat, z.shape)), [-1])
    return tape.jacobian(y, flat, experimental_use_pfor=False).numpy(), y.numpy()


@each_kind
@pytest.mark.parametrize("convolutional", [False, True], ids=["dense", "convolution"])
@pytest.mark.parametrize("hidden", [(14, 9), (4,)])  # Fewer units than latents, too.
def test_m_and_s_depend_on_what_is_before_them_alone(rng, convolutional, kind, hidden):
    net, z, context = random_flow(rng, convolutional, kind=kind, hidden=hidden)
    for part in range(2):
        found, _ = jacobian(lambda z: net(z, context)[part], z)  # noqa: B023
        assert (found[np.triu_indices(len(found))] == 0).all()
        if hidden == (14, 9):
            # On all of it: here the values of the same pixel.
            assert (found[-6:, -6:][np.tril_indices(6, -1)] != 0).all()


def test_a_convolutional_net_sees_the_pixels_above_and_to_the_left(rng):
    net, z, context = random_flow(rng, True, latents=2, hidden=(4,))
    found, _ = jacobian(lambda z: net(z, context)[0], z)
    seen = np.abs(found.reshape(4, 3, 2, 4, 3, 2)[2, 1]).sum((0, 3)) > 0
    # Two 3x3 windows, each of the row above and the pixel to the left.
    np.testing.assert_array_equal(seen, [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]])


@each_dataset
def test_the_flow_s_log_determinant_is_autodiffs(rng, dataset):
    config = config_of(dataset=dataset, latents=6, made=(20, 12), flow_layers=2)
    network = initialized(config)
    if "mnist" in dataset:
        flow, nets, shape, width = network, network.flow, [1, 6], 20
        assert len(nets) == 2
    else:
        flow = network.layers[0]
        nets, shape, width = [flow.flow], [1, 3, 3, config.latent_maps], config.features
    for net in nets:
        net.output.b.assign(rng.normal(size=net.output.b.shape))
        net.output.weight.set_g(rng.uniform(0.5, 1, net.output.weight.g_shape))
    z, context = (
        tf.constant(rng.normal(size=[*shape[:-1], n]), tf.float32) for n in (shape[-1], width)
    )
    _, log_q = flow.transform(z, tf.zeros_like(z), context)
    found, _ = jacobian(lambda z: flow.transform(z, tf.zeros_like(z), context)[0], z)
    sign, log_determinant = np.linalg.slogdet(found.astype(np.float64))
    assert abs(log_determinant) > 0.1
    assert float(tf.reduce_sum(log_q)) == pytest.approx(-log_determinant, abs=1e-4)
    # On MNIST reversed after each of two steps: both orders occur.
    triangular = (found[np.triu_indices(len(found), 1)] == 0).all()
    assert triangular == (dataset == "synthetic_cifar10")
    assert sign == 1


def test_one_step_of_mnists_flow_is_triangular(rng):
    network = initialized(config_of(latents=6, made=(20,), flow_steps=1))
    network.flow[0].output.weight.set_g(np.full(12, 3.0))
    z, context = (tf.constant(rng.normal(size=[1, n]), tf.float32) for n in (6, 20))
    found, _ = jacobian(lambda z: network.transform(z, tf.zeros_like(z), context)[0], z)
    found = found[::-1]  # The step ends with a reversal.
    assert (found[np.triu_indices(6, 1)] == 0).all()
    assert (found[np.tril_indices(6)] != 0).all()
    assert ((np.diag(found) > 0) & (np.diag(found) < 1)).all()


@each_kind
@each_dataset
def test_masked_units_have_finite_values_and_gradients(dataset, kind):
    config = config_of(dataset=dataset, parameterization=kind)
    network = initialized(config)
    net = network.flow[0] if "mnist" in dataset else network.layers[0].flow
    masked = (net.output.kernel_mask == 0).all((0, 1, 2) if dataset == "synthetic_cifar10" else 0)
    if "mnist" in dataset:
        assert masked.sum() == 2  # The first m and the first s.
        np.testing.assert_array_equal(net.output.weight().numpy()[:, masked], 0)
    x = vae.prepare(config, images_of(config), SEED)
    with tf.GradientTape() as tape:
        log_px, kl = network(x, SEED)
        loss = tf.reduce_sum(kl) - tf.reduce_sum(log_px)
    gradients = tape.gradient(loss, network.trainable_variables)
    assert np.isfinite(loss)
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        assert np.isfinite(gradient).all(), variable.name


# Densities and the bound


@pytest.mark.parametrize("scale", [0.003, 0.05, 1.0, 20.0])
@pytest.mark.parametrize("mean", [-0.6, -0.498, 0.0, 0.123, 0.498])
def test_the_discretized_logistic_sums_to_1_over_256_values(mean, scale):
    values = (tf.range(256, dtype=tf.float32) + 0.5) / 256 - 0.5

    def total(**options):
        return float(
            tf.reduce_sum(
                tf.exp(log_discretized_logistic(values, mean, math.log(scale), **options))
            )
        )

    assert total(open_ends=True) == pytest.approx(1, abs=6e-5)  # 256 times 1e-7, and rounding.
    logistic = 0.5 * (1 + np.tanh((np.array([-0.5, 0.5]) - mean) / scale / 2))
    assert total() == pytest.approx(logistic[1] - logistic[0], abs=6e-5)


def test_the_discretized_logistic_is_its_formula(rng):
    pixels = rng.integers(0, 256, (50, 3))
    mean, log_scale = rng.uniform(-0.5, 0.5, (50, 3)), rng.uniform(-4, -1, 3)
    edge = (pixels / 256 - 0.5 - mean) / np.exp(log_scale)
    step = 1 / 256 / np.exp(log_scale)
    p = 1 / (1 + np.exp(-edge - step)) - 1 / (1 + np.exp(-edge)) + 1e-7
    x = vae.prepare(config_of(dataset="synthetic_cifar10"), pixels.astype(np.uint8), SEED)
    found = log_discretized_logistic(
        x, tf.constant(mean, tf.float32), tf.constant(log_scale, tf.float32)
    )
    np.testing.assert_allclose(np.exp(found), p, rtol=1e-3, atol=3e-7)


def analytic_kl(mu_q, log_q, mu_p=0.0, log_p=0.0):
    """KL of two Gaussians with these means and logarithms of standard deviations."""
    return (
        (np.exp(2 * (log_q - log_p)) + ((mu_q - mu_p) / np.exp(log_p)) ** 2 - 1) / 2 + log_p - log_q
    )


def test_mnists_kl_without_flow_is_the_analytic_one(rng):
    network = initialized(config_of(flow_steps=0))
    network.posterior.b.assign(rng.normal(size=network.posterior.b.shape))
    image = vae.prepare(config_of(), images_of(config_of(), 1), SEED)
    mu, log_sigma, _ = network.moments(image)
    draws = 20_000
    z, log_q = network.encode(tf.tile(image, [draws, 1, 1, 1]), SEED)
    kl = (log_q - log_normal(z, 0.0, 0.0)).numpy()
    expected = analytic_kl(mu.numpy(), log_sigma.numpy())[0]
    assert expected.max() > 0.5
    np.testing.assert_allclose(kl.mean(0), expected, atol=5 * (kl.std(0) / draws**0.5).max())


def test_a_layers_kl_with_an_idle_flow_is_the_analytic_one(rng):
    config = config_of(dataset="synthetic_cifar10", features=5, latent_maps=3)
    layer = initialized(config).layers[0]
    for part in (layer.flow.output, layer.down_split):
        part.b.assign(0.5 * rng.normal(size=part.b.shape))
    layer.flow.output.weight.assign(tf.zeros(layer.flow.output.weight.shape))
    layer.flow.output.b.assign(tf.zeros_like(layer.flow.output.b))
    draws = 10_000
    x, mu_q, log_sigma_q, context = (
        tf.constant(0.5 * rng.normal(size=[1, 2, 2, n]), tf.float32) for n in (5, 3, 3, 5)
    )
    split = layer.down_split(tf.nn.elu(x)).numpy()
    mu_p, log_p, mu_r, log_r = (split[..., 5 + 3 * i : 8 + 3 * i] for i in range(4))
    kls = analytic_kl(mu_q.numpy() + mu_r, log_sigma_q.numpy() + log_r, mu_p, log_p)
    expected = np.asarray(kls).sum((0, 1, 2))
    tiled = [tf.tile(t, [draws, 1, 1, 1]) for t in (x, mu_q, log_sigma_q, context)]
    kl = layer.down(tiled[0], tiled[1:], SEED)[1].numpy()
    assert (abs(kl.mean(0) - expected) < 5 * kl.std(0) / draws**0.5).all()


@each_dataset
def test_more_samples_tighten_the_bound(dataset):
    config = config_of(dataset=dataset)
    network = initialized(config)
    step = vae.make_test_step(config, tf.distribute.get_strategy(), network)
    images = vae.load(config).test_images
    results = {k: vae.measure(config, step, images, k) for k in (1, 2, 20)}
    assert "log_likelihood" not in results[1]
    for k in (2, 20):
        assert results[k]["log_likelihood"] > results[k]["bound"]
    assert results[20]["log_likelihood"] > results[2]["log_likelihood"]
    again = vae.measure(config, step, images, 2)
    assert again == results[2]


def test_dynamic_binarization_draws_one_x_for_all_importance_samples():
    config = config_of(binarization="dynamic")
    network = initialized(config)
    step = vae.make_test_step(config, tf.distribute.get_strategy(), network)
    images = vae.load(config).test_images  # Fewer than a batch, so that its number is 0.
    seed = vae.fold_in(tf.constant([config.seed, -1], tf.int64), 0)
    x = vae.prepare(config, images, vae.fold_in(seed, 0))
    assert set(np.unique(x)) == {0, 1}
    weights = [network(x, vae.fold_in(seed, k)) for k in range(5)]
    log_w = np.array([log_px - tf.reduce_sum(kl, 1) for log_px, kl in weights], np.float64)
    found = vae.measure(config, step, images, 5)
    assert found["bound"] == pytest.approx(log_w.mean(), abs=1e-3)
    assert found["log_likelihood"] == pytest.approx(log_mean_exp(log_w).mean(), abs=1e-3)


def test_importance_weighting_is_the_log_of_the_mean_weight(rng):
    log_w = rng.normal(-1000, 3, (7, 4))
    expected = np.log(np.exp(log_w + 1000).mean(0)) - 1000
    np.testing.assert_allclose(log_mean_exp(log_w), expected, rtol=1e-12)


def test_a_bound_in_nats_is_bits_per_dimension_and_a_place_in_figure_3():
    config = vae.Config(dataset="cifar10")
    found = vae.units(config, {"bound": -3.54 * 3072 * math.log(2)})
    assert found["bits_per_dim"] == pytest.approx(3.54)
    assert found["paper_axis"] == pytest.approx(9500, abs=5)
    assert vae.units(vae.Config(), {"bound": -85.0}) == {}


@each_dataset
def test_free_bits_bound_the_loss_and_not_the_bound(dataset):
    losses, bounds = {}, {}
    for free_bits in (0.0, 3.0):
        config = config_of(dataset=dataset, free_bits=free_bits, learning_rate=0.0)
        network = initialized(config)
        step = vae.make_train_step(
            config, tf.distribute.get_strategy(), network, initialized(config),
            Adamax(network.trainable_variables, 0.0, epsilon_in_max=True), 10,
        )  # fmt: skip
        images = images_of(config)
        losses[free_bits], bounds[free_bits], kl = step(images, tf.constant(0, tf.int64)).numpy()
    maps = network(vae.prepare(config, images, SEED), SEED)[1].shape[1]
    assert losses[0.0] == pytest.approx(-bounds[0.0], rel=1e-6)
    assert bounds[0.0] == pytest.approx(bounds[3.0], rel=1e-6)
    assert losses[3.0] - losses[0.0] > 0
    assert losses[3.0] + bounds[3.0] + kl >= 100 * 3.0 * maps * (1 - 1e-3)
    assert vae.FREE_BITS == {True: 0.0, False: 0.25}


# Networks and their start


def layers_called(network, x):
    """Each layer that a call of the network uses, and its pre-activations."""
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
    x = vae.prepare(config, images_of(config), tf.constant([0, 0], tf.int64))
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
    # MNIST: the masked first m and s of each step. CIFAR-10: the top begins with zeros.
    split = 2 * config.features + 4 * config.latent_maps
    assert constant == (2 * config.flow_steps if "mnist" in dataset else split)


@each_dataset
def test_both_parameterizations_begin_as_the_same_function(dataset):
    outputs = []
    for kind in KINDS:
        config = config_of(dataset=dataset, parameterization=kind)
        outputs.append(initialized(config)(vae.prepare(config, images_of(config), SEED), SEED))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_mnists_encoder_is_the_papers_and_the_decoder_its_mirror():
    network = vae.make_network(vae.Config())
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
    # A convolution before the rearrangement that doubles the size has the size before it.
    assert [t[0] for t in decoder] == 4 * [7] + 4 * [14] + 5 * [28]
    assert decoder[-1] == (28, 28, 1)


def test_cifars_layers_are_the_codes():
    config = vae.Config(dataset="cifar10")
    network = vae.make_network(config)
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
    one, other = (vae.load(config_of(seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(one.train_images, other.train_images)
    np.testing.assert_array_equal(np.unique(one.train_images), [0, 255])
    grey = data.load("synthetic_mnist").train_images / 255
    drawn = (one.train_images / 255).astype(float)
    assert abs((drawn - grey).mean()) < 2e-3
    dynamic = config_of(binarization="dynamic")
    images = images_of(dynamic)
    x = [vae.prepare(dynamic, images, tf.constant([0, step], tf.int64)).numpy() for step in (1, 2)]
    assert set(np.unique(x)) == {0, 1}
    assert (x[0] != x[1]).any()
    assert abs(x[0].mean() - images.mean() / 255) < 5e-3


def test_binarized_mnist(data_dir):
    images = vae.load(vae.Config(data_dir=str(data_dir)))
    grey = data.load("mnist", str(data_dir))
    assert images.train_images.shape == (60_000, 28, 28, 1)
    assert (images.train_images[grey.train_images == 255] == 255).all()
    assert (images.test_images[grey.test_images == 0] == 0).all()
    assert images.test_images.mean() == pytest.approx(grey.test_images.mean(), rel=1e-3)


# Training


def first_losses(config, strategy=None, steps=3):
    strategy = strategy or tf.distribute.get_strategy()
    dtype, images = runtime.compute_dtype(config), images_of(config)
    with strategy.scope():
        network, averaged = (vae.make_network(config, dtype) for _ in range(2))
        optimizer = Adamax(network.trainable_variables, config.learning_rate, epsilon_in_max=True)
    vae.initialize(config, network, images)
    for mean, p in zip(averaged.variables, network.variables, strict=True):
        mean.assign(p)
    step = vae.make_train_step(config, strategy, network, averaged, optimizer, 10)
    losses = [step(images, tf.constant(i, tf.int64)).numpy()[0] / 100 for i in range(steps)]
    test_step = vae.make_test_step(config, strategy, averaged)
    bound = vae.measure(config, test_step, images[:99])["bound"]  # Shares of replicas differ.
    return [*losses, bound]


@each_dataset
def test_two_replicas_train_as_one(dataset):
    config = config_of(dataset=dataset, free_bits=0.4)
    mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    assert first_losses(config, mirrored) == pytest.approx(first_losses(config), rel=2e-4)


@each_dataset
def test_seeds_decide_all(dataset):
    one = first_losses(config_of(dataset=dataset), steps=2)
    assert one == first_losses(config_of(dataset=dataset), steps=2)
    assert one != pytest.approx(first_losses(config_of(dataset=dataset, seed=1), steps=2), rel=1e-5)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("synthetic_mnist", {"jit_compile": True}),
        ("synthetic_mnist", {"mixed_precision": "bfloat16"}),
        ("synthetic_cifar10", {"mixed_precision": "bfloat16"}),
    ],
)
def test_first_losses_under_xla_and_in_bfloat16(dataset, options):
    config = config_of(dataset=dataset)
    # Another draw of z under XLA.
    expected = first_losses(config, steps=2)
    found = first_losses(dataclasses.replace(config, **options), steps=2)
    assert found == pytest.approx(expected, rel=1e-2)


def test_the_average_is_polyaks_with_a_warm_up():
    config = config_of(average_epochs=2.0)
    network, averaged = (initialized(config) for _ in range(2))
    optimizer = Adamax(network.trainable_variables, 0.01, epsilon_in_max=True)
    step = vae.make_train_step(
        config, tf.distribute.get_strategy(), network, averaged, optimizer, per_epoch=2
    )
    expected = [p.numpy().astype(np.float64) for p in network.trainable_variables]
    decays = []
    for t in range(40):
        step(images_of(config), tf.constant(t, tf.int64))
        decay = min(1 - 1 / 4, (2 + t) / (11 + t))
        decays.append(decay)
        for i, p in enumerate(network.trainable_variables):
            expected[i] = decay * expected[i] + (1 - decay) * p.numpy()
    assert decays[0] < decays[5] < decays[-1] == 0.75
    for mean, value in zip(averaged.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(mean, value, rtol=1e-5, atol=1e-6)
    assert any(
        np.abs(mean - p).max() > 1e-4
        for mean, p in zip(averaged.trainable_variables, network.trainable_variables, strict=True)
    )


def test_units_of_a_single_weight_keep_its_sign():
    """The image's one map makes some of the first skip, the order of the latents some in MADE."""
    config = config_of()
    network, averaged = (initialized(config) for _ in range(2))
    optimizer = Adamax(network.trainable_variables, 0.01, epsilon_in_max=True)
    strategy = tf.distribute.get_strategy()
    step = vae.make_train_step(config, strategy, network, averaged, optimizer, per_epoch=10)
    layers = [network.encoder[0].skip, network.flow[0].hidden[0]]
    masks = [np.ones([1, 1, 1, 2]), network.flow[0].hidden[0].kernel_mask]
    alone = [(m != 0) & (np.reshape(m, [-1, m.shape[-1]]).sum(0) == 1) for m in masks]
    before = [layer.weight.v.numpy() for layer in layers]
    for t in range(5):
        step(images_of(config), tf.constant(t, tf.int64))
    for layer, v, only in zip(layers, before, alone, strict=True):
        assert only.any()
        np.testing.assert_array_equal(layer.weight.v.numpy()[only], v[only])
    assert (network.flow[0].hidden[0].weight.v.numpy() != before[1])[~alone[1]].any()


@each_dataset
def test_a_run_learns_logs_and_its_commands_use_the_averaged_weights(run, tmp_path, dataset):
    folder = tmp_path / "a"
    status, out, _ = run(
        "--preset", "smoke", "--dataset", dataset, "--out", folder, "--epochs", 3,
        "--learning-rate", 0.01,
    )  # fmt: skip
    assert status == 0
    assert "only to see that it runs" in out
    logged = metrics.read(folder)
    assert logged["epoch"] == [1, 2, 3]
    assert logged["train_bound"][0] < logged["train_bound"][1] < logged["train_bound"][2]
    assert logged["test_log_likelihood"][2] > logged["test_bound"][2]
    assert math.isnan(logged["test_log_likelihood"][1])
    assert ("test_bits_per_dim" in logged) == (dataset == "synthetic_cifar10")
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures[0] == "reconstructions-000000010.png"
    assert len(pictures) == 6
    status, out, _ = run("evaluate", folder, "--eval-samples", 3)
    assert status == 0
    assert f"bound {logged['test_bound'][2]:.2f} nats" in out
    assert f"log-likelihood {logged['test_log_likelihood'][2]:.2f}" in out
    assert "synthetic" in out
    averaged = vae.restore(folder)[1].trainable_variables
    saved = weights(folder)
    names = [name for name in saved if name.startswith("averaged/") and "/initialized/" not in name]
    assert sorted(map(float, (np.sum(saved[n]) for n in names))) == sorted(
        float(np.sum(v.numpy())) for v in averaged
    )
    status, _, err = run("sample", folder, "--out", folder / "metrics.csv" / "no" / "a.png")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "a.png: cannot write there (Not a directory); name another file" in err
    for command, name in (("sample", "samples"), ("reconstruct", "reconstructions")):
        assert run(command, folder)[1] == f"wrote {folder / 'samples' / name}.png\n"
    for command, count in (("sample", 12), ("reconstruct", 12)):
        png = tmp_path / f"{command}.png"
        assert run(command, folder, "--count", count, "--out", png)[0] == 0
        shape = tf.io.decode_png(png.read_bytes()).shape
        side, rows = 30 if "mnist" in dataset else 34, 4 if command == "reconstruct" else 2
        assert shape[:2] == [rows * side - 2, 10 * side - 2]


@pytest.mark.parametrize(
    ("dataset", "kind"), [("synthetic_mnist", "normal"), ("synthetic_cifar10", "weight_norm")]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, capsys, dataset, kind):
    """Stopped in an epoch, between two, after the last step, and in the test after that."""
    whole = config_of(dataset=dataset, parameterization=kind, out=str(tmp_path / "whole"))
    vae.train(whole)
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"), checkpoint_every=0.0)
    steps = vae.Run.steps
    for stop in (3, 10, 20):

        def until(self, total, stop=stop, **options):
            for step in steps(self, total, **options):
                if step == stop:
                    raise InterruptedError
                yield step
            raise InterruptedError

        monkeypatch.setattr(vae.Run, "steps", until)
        with pytest.raises(InterruptedError):
            vae.train(broken)
        broken = dataclasses.replace(broken, resume=True)
    monkeypatch.setattr(vae.Run, "steps", steps)
    testing = vae.Run.testing

    def ask(self, done, total):
        os.kill(os.getpid(), signal.SIGTERM)
        testing(self, done, total)

    monkeypatch.setattr(vae.Run, "testing", ask)
    with pytest.raises(SystemExit, match="143"):
        vae.train(broken)
    monkeypatch.setattr(vae.Run, "testing", testing)
    assert f"stopped at step 20, saved; go on with --resume --out {broken.out}" in (
        capsys.readouterr().out
    )
    vae.train(broken)
    assert_same_run(whole.out, broken.out)


def start(*argv):
    return subprocess.Popen(
        [sys.executable, "-m", "models.vae", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )


@pytest.mark.slow
@each_dataset
def test_killed_at_random_moments_and_resumed(tmp_path, dataset):
    options = ["--preset", "smoke", "--epochs", "40", "--dataset", dataset]
    options += ["--checkpoint-every", "1", "--out"]
    whole = start(*options, tmp_path / "whole")
    assert "epoch 40" in whole.communicate(timeout=600)[0]
    killed, moments, reached, resume = tmp_path / "killed", random.Random(0), [], []

    def last():
        return max((path.name for path in killed.glob("checkpoints/step-*")), default="")

    for _ in range(2):
        process, before = start(*options, killed, *resume), last()
        deadline = time.monotonic() + 600
        while last() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL
        reached.append(last())
        resume = ["--resume"]
    assert sorted(set(reached)) == reached  # Each got further than the one before.
    end = start(*options, killed, "--resume")
    assert "epoch 40" in end.communicate(timeout=600)[0]
    assert_same_run(tmp_path / "whole", killed)


def test_each_data_set_has_its_run_folder():
    for dataset in ("mnist", "cifar10"):
        words = ["--dataset", dataset, "--seed", "3"]
        config = command_line.parse(vae.Config, vae.PRESETS, words, program="python -m models.vae")
        assert config.out == f"runs/vae-{dataset}-paper-weight_norm-3"


# Mistakes


def test_a_learning_rate_that_is_too_high_ends_with_its_step(run, tmp_path):
    status, _, err = run("--preset", "smoke", "--learning-rate", 1e30, "--out", tmp_path / "a")
    assert status == 2
    assert "is nan at step" in err or "is not finite at step" in err or "is inf at step" in err
    assert "lower --learning-rate" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "minst"], "it is one of"),
        (["--data-dir", "no/such/folder"], "--data-dir no/such/folder: there is no such folder"),
        (["--maps", "16", "32"], "--maps takes 3 numbers, got 2"),
        (["--stochastic-layers", "4", "0"], "--stochastic-layers must be at least 1, got 0"),
        (["--stochastic-layers", *"111111"], "--stochastic-layers takes at most 5 numbers"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--flow-steps", "-1"], "--flow-steps must be at least 0, got -1"),
        (["--preset", "smoke", "--batch-size", "2000"], "more than the 1000 training images"),
        (["--jit-compile", "--strategy", "mirrored"], "--jit-compile cannot be used with"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, tmp_path, argv, message):
    status, _, err = run(*argv, "--out", tmp_path / "a")
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "no/such/run"], "no/such/run: there is no such folder"),
        (["sample", "no/such/run", "--count", "0"], "--count must be at least 1, got 0"),
        (["evaluate", "no/such/run", "--eval-samples", "0"], "--eval-samples must be at least 1"),
    ],
)
def test_a_commands_mistake_is_told_in_one_line(run, argv, message):
    status, _, err = run(*argv)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_batch_that_replicas_cannot_share(run, tmp_path):
    status, _, err = run(
        "--preset", "smoke", "--strategy", "mirrored", "--batch-size", 101, "--out", tmp_path / "a"
    )
    assert status == 2
    assert "--batch-size 101 must be a multiple of the 2 replicas" in err
