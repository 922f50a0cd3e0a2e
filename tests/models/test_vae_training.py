"""Tests models/vae/training.py and the commands: learning, averaging, replicas, errors."""

import dataclasses
import math

import numpy as np
import pytest
import tensorflow as tf
from support import weights
from vaes import config_of, each_dataset, images_of, initialized

from models.common import command_line, metrics, runtime
from models.vae.__main__ import FUNCTIONS
from models.vae.config import Config
from models.vae.evaluation import bounds, make_evaluate_step, restore
from models.vae.model import initialize, make_network
from models.vae.training import make_optimizer, make_train_step


def first_losses(config, strategy=None, steps=3):
    strategy = strategy or tf.distribute.get_strategy()
    dtype, images = runtime.compute_dtype(config), images_of(config)
    with strategy.scope():
        network, averaged = (make_network(config, dtype) for _ in range(2))
        optimizer = make_optimizer(config, network.trainable_variables)
    initialize(config, network, images)
    for mean, p in zip(averaged.variables, network.variables, strict=True):
        mean.assign(p)
    step = make_train_step(config, strategy, network, averaged, optimizer, 10)
    losses = [step(images, tf.constant(i, tf.int64)).numpy()[0] / 100 for i in range(steps)]
    evaluate_step = make_evaluate_step(config, strategy, averaged)
    bound = bounds(config, evaluate_step, images[:99])["bound"]  # Shards differ in size.
    return [*losses, bound]


@pytest.mark.parametrize(
    ("dataset", "golden"),
    [
        ("synthetic_mnist", [545.12256, 544.52400, 543.84155, -543.31996]),
        ("synthetic_cifar10", [18110.5371, 18107.1992, 18106.1211, -18107.0112]),
    ],
)
def test_the_first_losses_and_bounds_are_golden(dataset, golden):
    assert first_losses(config_of(dataset=dataset)) == pytest.approx(golden, rel=1e-5)


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
def test_learns_as_fast_under_xla_and_in_bfloat16(dataset, options):
    config = config_of(dataset=dataset, learning_rate=0.05)
    expected = first_losses(config, steps=4)
    found = first_losses(dataclasses.replace(config, **options), steps=4)
    assert found[0] == pytest.approx(expected[0], rel=5e-4)
    # The tolerance is wide because XLA draws another z and bfloat16 rounds.
    assert found[0] - found[3] == pytest.approx(expected[0] - expected[3], rel=0.1)


def test_the_average_is_polyaks_with_a_warm_up():
    config = config_of(average_epochs=2.0, learning_rate=0.01)
    network, averaged = (initialized(config) for _ in range(2))
    optimizer = make_optimizer(config, network.trainable_variables)
    step = make_train_step(
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
    """The first skip has such units because images have one channel, MADE because of its masks."""
    config = config_of(learning_rate=0.01)
    network, averaged = (initialized(config) for _ in range(2))
    optimizer = make_optimizer(config, network.trainable_variables)
    strategy = tf.distribute.get_strategy()
    step = make_train_step(config, strategy, network, averaged, optimizer, per_epoch=10)
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
def test_a_run_learns_logs_and_its_commands_use_the_averaged_weights(command, tmp_path, dataset):
    folder = tmp_path / "a"
    status, out, _ = command(FUNCTIONS, 
        "--preset", "smoke", "--dataset", dataset, "--out", folder, "--epochs", 3,
        "--learning-rate", 0.01,
    )  # fmt: skip
    assert status == 0
    assert "a quick check that it runs" in out
    logged = metrics.read(folder)
    assert logged["epoch"] == [1, 2, 3]
    assert logged["train_bound"][0] < logged["train_bound"][1] < logged["train_bound"][2]
    assert logged["test_log_likelihood"][2] > logged["test_bound"][2]
    assert math.isnan(logged["test_log_likelihood"][1])
    assert ("test_bits_per_dim" in logged) == (dataset == "synthetic_cifar10")
    pictures = sorted(path.name for path in (folder / "samples").iterdir())
    assert pictures[0] == "reconstructions-000000010.png"
    assert len(pictures) == 6
    status, out, _ = command(FUNCTIONS, "evaluate", folder, "--eval-samples", 3)
    assert status == 0
    assert f"bound {logged['test_bound'][2]:.2f} nats" in out
    assert f"log-likelihood {logged['test_log_likelihood'][2]:.2f}" in out
    assert "synthetic" in out
    averaged = restore(folder)[1].trainable_variables
    saved = weights(folder)
    names = [name for name in saved if name.startswith("averaged/") and "/initialized/" not in name]
    assert sorted(map(float, (np.sum(saved[n]) for n in names))) == sorted(
        float(np.sum(v.numpy())) for v in averaged
    )
    status, _, err = command(
        FUNCTIONS, "sample", folder, "--out", folder / "metrics.csv" / "no" / "a.png"
    )
    assert (status, len(err.splitlines())) == (2, 1)
    assert "a.png: cannot write there (Not a directory); name another file" in err
    for name, picture in (("sample", "samples"), ("reconstruct", "reconstructions")):
        assert command(FUNCTIONS, name, folder)[1] == f"wrote {folder / 'samples' / picture}.png\n"
    for name, count in (("sample", 12), ("reconstruct", 12)):
        png = tmp_path / f"{name}.png"
        assert command(FUNCTIONS, name, folder, "--count", count, "--out", png)[0] == 0
        shape = tf.io.decode_png(png.read_bytes()).shape
        side, rows = 30 if "mnist" in dataset else 34, 4 if name == "reconstruct" else 2
        assert shape[:2] == [rows * side - 2, 10 * side - 2]


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_each_data_set_has_its_run_folder(dataset):
    config = command_line.parse(Config, ["--dataset", dataset, "--seed", "3"])
    assert config.out == f"runs/vae-{dataset}-paper-weight_norm-3"


# Mistakes


def test_a_learning_rate_that_is_too_high_is_named(command, tmp_path):
    argv = ["--preset", "smoke", "--learning-rate", 1e30, "--out", tmp_path / "a"]
    status, _, err = command(FUNCTIONS, *argv)
    assert status == 2
    assert "--learning-rate" in err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--dataset", "minst"], "--dataset"),
        (["--data-dir", "no/such/folder"], "--data-dir no/such/folder"),
        (["--maps", "16", "32"], "--maps"),
        (["--stochastic-layers", "4", "0"], "--stochastic-layers"),
        (["--stochastic-layers", *"111111"], "--stochastic-layers"),
        (["--stochastic-layers"], "--stochastic-layers takes 1 to 5 numbers"),
        (["--made"], "--made takes at least one number"),
        (["--epochs", "0"], "--epochs"),
        (["--flow-steps", "-1"], "--flow-steps"),
        (["--preset", "smoke", "--batch-size", "2000"], "--batch-size 2000"),
        (["--jit-compile", "--strategy", "mirrored"], "--jit-compile"),
        (
            ["--preset", "smoke", "--strategy", "mirrored", "--batch-size", "101"],
            "--batch-size 101",
        ),
    ],
)
def test_a_mistake_is_named_and_leaves_no_folder(command, tmp_path, argv, named):
    status, _, err = command(FUNCTIONS, *argv, "--out", tmp_path / "a")
    assert (status, named in err) == (2, True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["sample", "no/such/run"], "no/such/run"),
        (["sample", "no/such/run", "--count", "0"], "--count"),
        (["evaluate", "no/such/run", "--eval-samples", "0"], "--eval-samples"),
    ],
)
def test_a_mistake_of_a_command_is_named(command, argv, named):
    status, _, err = command(FUNCTIONS, *argv)
    assert (status, named in err) == (2, True)
