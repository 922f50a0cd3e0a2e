"""Tests the flows, densities and bounds in models/vae against their definitions."""

import math

import numpy as np
import pytest
import tensorflow as tf
from vaes import SEED, config_of, each_dataset, each_kind, images_of, initialized

from models.common import replicas
from models.common.layers import Layers, normal
from models.vae.cifar10 import log_discretized_logistic
from models.vae.config import Config
from models.vae.evaluation import bounds, log_mean_exp, make_evaluate_step, units
from models.vae.flow import Autoregressive, log_normal
from models.vae.model import load, prepare
from models.vae.training import make_optimizer, make_train_step


def random_flow(rng, convolutional, latents=6, kind="weight_norm", hidden=(14, 9)):
    """Returns a masked network with random parameters, and inputs for it."""
    layers = Layers(kind, normal(0))
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
    """Returns dy_i / dz_j and y, with y and z flattened."""
    flat = tf.reshape(z, [-1])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(flat)
        y = tf.reshape(function(tf.reshape(flat, z.shape)), [-1])
    return tape.jacobian(y, flat, experimental_use_pfor=False).numpy(), y.numpy()


@each_kind
@pytest.mark.parametrize("convolutional", [False, True], ids=["dense", "convolution"])
@pytest.mark.parametrize("hidden", [(14, 9), (4,)])  # Also fewer units than latents.
def test_m_and_s_depend_on_what_is_before_them_alone(rng, convolutional, kind, hidden):
    net, z, context = random_flow(rng, convolutional, kind=kind, hidden=hidden)
    for part in range(2):
        found, _ = jacobian(lambda z: net(z, context)[part], z)  # noqa: B023
        assert (found[np.triu_indices(len(found))] == 0).all()
        if hidden == (14, 9):
            # They depend on everything before them; checked here within one pixel.
            assert (found[-6:, -6:][np.tril_indices(6, -1)] != 0).all()


def test_a_convolutional_net_sees_the_pixels_above_and_to_the_left(rng):
    net, z, context = random_flow(rng, True, latents=2, hidden=(4,))
    found, _ = jacobian(lambda z: net(z, context)[0], z)
    seen = np.abs(found.reshape(4, 3, 2, 4, 3, 2)[2, 1]).sum((0, 3)) > 0
    # Two layers, each with a 3x3 window that covers the row above and the pixel to the left.
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
    # MNIST reverses the latents after each of two steps, so its Jacobian is not triangular.
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
    x = prepare(config, images_of(config), SEED)
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
    x = prepare(config_of(dataset="synthetic_cifar10"), pixels.astype(np.uint8), SEED)
    found = log_discretized_logistic(
        x, tf.constant(mean, tf.float32), tf.constant(log_scale, tf.float32)
    )
    np.testing.assert_allclose(np.exp(found), p, rtol=1e-3, atol=3e-7)


def analytic_kl(mu_q, log_q, mu_p=0.0, log_p=0.0):
    """Returns the KL of two Gaussians from their means and log standard deviations."""
    return (
        (np.exp(2 * (log_q - log_p)) + ((mu_q - mu_p) / np.exp(log_p)) ** 2 - 1) / 2 + log_p - log_q
    )


def test_mnists_kl_without_flow_is_the_analytic_one(rng):
    network = initialized(config_of(flow_steps=0))
    network.posterior.b.assign(rng.normal(size=network.posterior.b.shape))
    image = prepare(config_of(), images_of(config_of(), 1), SEED)
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
    step = make_evaluate_step(config, tf.distribute.get_strategy(), network)
    images = load(config).test_images
    results = {k: bounds(config, step, images, k) for k in (1, 2, 20)}
    assert "log_likelihood" not in results[1]
    for k in (2, 20):
        assert results[k]["log_likelihood"] > results[k]["bound"]
    assert results[20]["log_likelihood"] > results[2]["log_likelihood"]
    again = bounds(config, step, images, 2)
    assert again == results[2]


def test_dynamic_binarization_draws_one_x_for_all_importance_samples():
    config = config_of(binarization="dynamic")
    network = initialized(config)
    step = make_evaluate_step(config, tf.distribute.get_strategy(), network)
    images = load(config).test_images  # Fewer than a batch, so its index is 0.
    seed = replicas.fold_in(tf.constant([config.seed, -1], tf.int64), 0)
    x = prepare(config, images, replicas.fold_in(seed, 0))
    assert set(np.unique(x)) == {0, 1}
    weights = [network(x, replicas.fold_in(seed, k)) for k in range(5)]
    log_w = np.array([log_px - tf.reduce_sum(kl, 1) for log_px, kl in weights], np.float64)
    found = bounds(config, step, images, 5)
    assert found["bound"] == pytest.approx(log_w.mean(), abs=1e-3)
    assert found["log_likelihood"] == pytest.approx(log_mean_exp(log_w).mean(), abs=1e-3)


def test_importance_weighting_is_the_log_of_the_mean_weight(rng):
    log_w = rng.normal(-1000, 3, (7, 4))
    expected = np.log(np.exp(log_w + 1000).mean(0)) - 1000
    np.testing.assert_allclose(log_mean_exp(log_w), expected, rtol=1e-12)


def test_a_bound_in_nats_is_bits_per_dimension_and_a_place_in_figure_3():
    """Bounds on CIFAR-10 are also reported in bits per dimension and on figure 3's axis."""
    config = Config(dataset="cifar10")
    found = units(config, {"bound": -3.54 * 3072 * math.log(2)})
    assert found["bits_per_dim"] == pytest.approx(3.54)
    assert found["paper_axis"] == pytest.approx(9500, abs=5)
    assert units(Config(), {"bound": -85.0}) == {}


@each_dataset
def test_free_bits_bound_the_loss_and_not_the_bound(dataset):
    """Free bits change the training loss, but not the reported bound."""
    losses, bounds = {}, {}
    for free_bits in (0.0, 3.0):
        config = config_of(dataset=dataset, free_bits=free_bits, learning_rate=0.0)
        network = initialized(config)
        step = make_train_step(
            config, tf.distribute.get_strategy(), network, initialized(config),
            make_optimizer(config, network.trainable_variables), 10,
        )  # fmt: skip
        images = images_of(config)
        losses[free_bits], bounds[free_bits], kl = step(images, tf.constant(0, tf.int64)).numpy()
    maps = network(prepare(config, images, SEED), SEED)[1].shape[1]
    assert losses[0.0] == pytest.approx(-bounds[0.0], rel=1e-6)
    assert bounds[0.0] == pytest.approx(bounds[3.0], rel=1e-6)
    assert losses[3.0] - losses[0.0] > 0
    assert losses[3.0] + bounds[3.0] + kl >= 100 * 3.0 * maps * (1 - 1e-3)
    assert (Config().least_kl, Config(dataset="cifar10").least_kl) == (0.0, 0.25)
