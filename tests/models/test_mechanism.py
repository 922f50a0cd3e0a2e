"""Tests the measurements of the experiment on section 2.1 in cases with known answers."""

import numpy as np
import pytest
import tensorflow as tf

from models.common import metrics
from models.mechanism import training
from models.mechanism.__main__ import FUNCTIONS
from models.mechanism.config import Config


def test_angles_are_exact_for_small_and_large_ones(rng):
    a = rng.normal(size=(50, 3))
    a /= np.linalg.norm(a, axis=0)
    b = rng.normal(size=(50, 3))
    b -= a * (a * b).sum(0)
    b /= np.linalg.norm(b, axis=0)
    radians = np.array([1e-9, 0.5, 3.0])
    turned = np.cos(radians) * a + np.sin(radians) * b
    found = training.angles([tf.constant(a)], [tf.constant(turned)])
    np.testing.assert_allclose(found, np.degrees(radians), rtol=1e-6)


@pytest.mark.parametrize("kind", ["weight_norm", "normal"])
def test_norms_follow_the_formula_with_weight_norm_alone(command, tmp_path, kind):
    status, _, err = command(
        FUNCTIONS, "--preset", "smoke", "--parameterization", kind, "--out", tmp_path / "a"
    )
    assert status == 0, err
    table = metrics.read(tmp_path / "a")
    assert table["epoch"][1:] == [1, 2]
    growth, formula, error = (
        table[name][-1] for name in ("growth", "growth_by_formula", "formula_error")
    )
    if kind == "weight_norm":
        assert growth > 1.001
        assert growth == pytest.approx(formula, rel=1e-5)
        assert error < 1e-6
    else:
        assert error > 1e-4
    assert table["loss"][-1] < table["loss"][1]


@pytest.mark.parametrize(
    "words", [["--mixed-precision", "bfloat16"], ["--jit-compile"], ["--strategy", "mirrored"]]
)
def test_options_that_would_do_nothing_are_refused(command, tmp_path, words):
    status, _, err = command(FUNCTIONS, "--preset", "smoke", *words, "--out", tmp_path / "a")
    assert (status, words[0] in err, err.count("\n")) == (2, True, 1)


def test_a_matched_start_makes_the_first_step_the_normal_one(rng):
    x, y = rng.random((100, 784)).astype(np.float32), np.arange(100) % 10
    changes = {}
    for arm, values in Config.ARMS.items():
        network = training.Network(Config.of_preset("smoke", **values))
        training.initialize(Config.of_preset("smoke", **values), network, x)
        before = [np.array(layer.weight()) for layer in network.layers]
        optimizer = tf.keras.optimizers.SGD(1e-3)
        training.make_step(network, optimizer, training.Measures(network))(x, y)
        after = [layer.weight() for layer in network.layers]
        changes[arm] = np.concatenate([np.ravel(a - b) for a, b in zip(after, before, strict=True)])
    size = np.linalg.norm(changes["normal"])
    assert np.linalg.norm(changes["weight_norm_matched"] - changes["normal"]) < 0.01 * size
    assert np.linalg.norm(changes["weight_norm"]) > 2 * size


def test_covariances_of_a_network_whose_gradients_are_known(rng):
    """One direction dominates the inputs, so it is the first eigenvector of the first layer's C."""
    config = Config.of_preset("smoke", parameterization="normal", examples=400, samples=3)
    network = training.Network(config)
    direction = rng.normal(size=784)
    direction /= np.linalg.norm(direction)
    x = 0.01 * rng.normal(size=(400, 784)) + 5 * rng.normal(size=(400, 1)) * direction
    x, labels = x.astype(np.float32), np.zeros(400, np.int64)
    network(x)
    first = network.layers[0].weight
    first.w.assign(np.tile(direction[:, None], [1, config.units]))
    found = training.covariances(config, network, x, labels)
    assert found["cosine"] > 0.5 > found["cosine_random"]
    assert found["share_projected"] < found["share"]


def test_a_network_whose_units_are_all_0_has_no_covariance():
    config = Config.of_preset("smoke")
    network = training.Network(config)
    x = np.ones([20, 784], np.float32)
    network(x)
    for layer in network.layers:
        layer.b.assign(tf.fill(layer.b.shape, -1e9))
    assert training.covariances(config, network, x, np.zeros(20, np.int64)) == {}
