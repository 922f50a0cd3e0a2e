"""Tests CIFAR-10: the paper's network, its five parameterizations, replicas."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from support import finish, start, start_workers, weights

from models.cifar import images as cifar_images
from models.cifar import network as cifar
from models.cifar import training
from models.cifar.__main__ import FUNCTIONS
from models.cifar.batch_norm import BatchNormalization
from models.cifar.config import PAPER, Config
from models.common import data, metrics, run_folder, runtime

TABLE_A = [  # Each row after ZCA whitening: name, channels, and x, y dimension.
    ("Gaussian noise", 3, 32),
    ("3x3 conv leaky ReLU", 96, 32),
    ("3x3 conv leaky ReLU", 96, 32),
    ("3x3 conv leaky ReLU", 96, 32),
    ("2x2 max pool, str. 2", 96, 16),
    ("dropout", 96, 16),
    ("3x3 conv leaky ReLU", 192, 16),
    ("3x3 conv leaky ReLU", 192, 16),
    ("3x3 conv leaky ReLU", 192, 16),
    ("2x2 max pool, str. 2", 192, 8),
    ("dropout", 192, 8),
    ("3x3 conv leaky ReLU", 192, 6),
    ("1x1 conv leaky ReLU", 192, 6),
    ("1x1 conv leaky ReLU", 192, 6),
    ("global average pool", 192, 1),
    ("softmax output", 10, 1),
]


def config_of(**values):
    return Config.of_preset("smoke", **values)


def images_of(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 32, 32, 3)).astype(np.float32)


def initialized(config, images):
    network = cifar.Network(config)
    network(images[:1])
    cifar.initialize(config, network, images)
    return network


def layers_of(network):
    return [row for _, row in network.rows if isinstance(row, cifar.Layer)]


@pytest.fixture
def run(command):
    """A function that runs the command line and returns (exit status, stdout, stderr)."""
    return lambda *argv: command(FUNCTIONS, *argv)


def assert_same_run_but_for_rounding(one, other):
    """Asserts that two runs in float64 differ only by the rounding of float32 variables."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        error = np.linalg.norm(np.subtract(theirs[name], value, dtype=np.float64))
        assert error <= 1e-5 * np.linalg.norm(value), name
    losses = [metrics.read(folder)["loss"] for folder in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_network_is_table_a_row_by_row():
    network = cifar.Network(Config())
    x = tf.zeros([2, 32, 32, 3])
    for (name, row), (paper_name, channels, size) in zip(network.rows, TABLE_A, strict=True):
        x = row(x, False, None)
        assert name == paper_name
        assert x.shape == ([2, channels] if size == 1 else [2, size, size, channels])
    sizes = [layer.linear.weight.shape.num_elements() for layer in layers_of(network)]
    assert sum(sizes) == 1_405_344
    assert all(
        layer.linear.weight.parameterization == "weight_norm" for layer in layers_of(network)
    )


def test_all_five_begin_as_the_same_function_and_weights():
    images, seed = images_of(100), tf.constant([0, 0], tf.int64)
    outputs, effective = {}, {}
    for kind in PAPER:
        config = config_of(parameterization=kind, bn_epsilon=1e-12)  # The default would show.
        network = initialized(config, images)
        outputs[kind] = network(images, training=True, seed=seed)
        effective[kind] = [layer.linear.weight() for layer in layers_of(network)]
    mean, variance = tf.nn.moments(outputs["normal"], [0])
    np.testing.assert_allclose(mean, 0, atol=1e-4)
    np.testing.assert_allclose(variance, 1, atol=1e-3)
    for kind, output in outputs.items():
        np.testing.assert_allclose(output, outputs["normal"], atol=2e-4, err_msg=kind)
        if kind != "batch_norm":
            for ours, theirs in zip(effective[kind], effective["normal"], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=kind)


# Losses of three training steps and of an evaluation after them, recorded from the first version
# that passed all other tests. Rounding differs between processors and grows with the steps.
GOLDEN = {
    "mean_only_bn": [2.48198, 2.85851, 2.76108, 2.70499],
    "weight_norm": [2.48198, 3.74960, 3.99680, 4.57869],
    "normal": [2.48198, 2.90424, 2.82694, 4.59286],
    "batch_norm": [2.47969, 2.81726, 2.60756, 2.30059],
    "weight_norm_mean_only_bn": [2.48198, 2.74727, 2.56468, 2.46380],
}


@pytest.mark.parametrize("kind", PAPER)
def test_first_losses(kind):
    assert first_losses(kind, tf.distribute.get_strategy()) == pytest.approx(GOLDEN[kind], rel=1e-3)


def first_losses(kind, strategy, steps=3, **values):
    config = config_of(parameterization=kind, **values)
    images = data.load("synthetic_cifar10")
    x = (images.train_images[:100].astype(np.float32) - 127.5) / 128
    with strategy.scope():
        network = cifar.Network(config)
        network(x[:1])
        optimizer = training.make_optimizer(config, network.trainable_variables)
    cifar.initialize(config, network, x)
    train_step, evaluate_step = training.make_steps(config, strategy, network, optimizer)
    losses = [
        float(train_step(x, images.train_labels[:100], tf.constant([0, step], tf.int64))[0]) / 100
        for step in range(steps)
    ]
    # 99 images give two replicas shards of different sizes.
    return [*losses, float(evaluate_step(x[:99], images.train_labels[:99])[0]) / 99]


@pytest.mark.parametrize("kind", PAPER)
def test_two_replicas_train_as_one(kind):
    mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    # Only two steps, because Adam's first steps turn even rounding errors into full-size steps.
    options = {"steps": 2, "learning_rate": 1e-3}
    one = first_losses(kind, tf.distribute.get_strategy(), **options)
    assert first_losses(kind, mirrored, **options) == pytest.approx(one, rel=2e-4)


@pytest.mark.parametrize("kind", ["batch_norm", "weight_norm_mean_only_bn"])
def test_replicas_may_keep_their_own_moments(kind):
    mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    one = first_losses(kind, tf.distribute.get_strategy(), steps=1)
    own = first_losses(kind, mirrored, steps=1, synchronized=False)
    assert own[0] != pytest.approx(one[0], rel=2e-4)
    assert own[0] == pytest.approx(one[0], rel=0.2)


@pytest.mark.parametrize("kind", ["weight_norm_mean_only_bn", "batch_norm"])
@pytest.mark.parametrize("options", [{"jit_compile": True}, {"mixed_precision": "bfloat16"}])
def test_first_loss_under_xla_and_in_bfloat16(kind, options):
    # No noise or dropout, because XLA draws different random numbers from the same seed.
    config = config_of(parameterization=kind, noise=0.0, dropout=0.0, **options)
    images = images_of(100)
    network = cifar.Network(config, runtime.compute_dtype(config))
    network(images[:1])
    cifar.initialize(config, network, images)
    plain = dataclasses.replace(config, jit_compile=False, mixed_precision="none")
    reference = initialized(plain, images)
    step, _ = training.make_steps(
        config, tf.distribute.get_strategy(), network,
        training.make_optimizer(config, network.trainable_variables),
    )  # fmt: skip
    labels, seed = np.arange(100) % 10, tf.constant([0, 1], tf.int64)
    logits = reference(images, training=True, seed=seed)
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    rel = 1e-4 if config.jit_compile else 3e-2
    assert float(step(images, labels, seed)[0]) == pytest.approx(
        float(tf.reduce_sum(expected)), rel=rel
    )
    assert all(variable.dtype == tf.float32 for variable in network.trainable_variables)


def test_zca_whitens(rng):
    mixing = rng.normal(size=(12, 12))
    images = (rng.normal(size=(4000, 12)) @ mixing + 3).reshape(-1, 2, 2, 3).astype(np.float32)
    whitening = cifar_images.zca(images, 1e-12)
    whitened = (images.reshape(4000, 12) - whitening["mean"]) @ whitening["w"]
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(whitened.T @ whitened / 4000, np.eye(12), atol=1e-6)
    np.testing.assert_allclose(whitening["w"], whitening["w"].T, atol=1e-9)
    assert np.linalg.eigvalsh(whitening["w"]).min() > 0  # ZCA: the symmetric positive root.


def test_the_network_sees_whitened_images(monkeypatch, tmp_path, rng):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    raw = rng.integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    raw = data.Images(raw[:500], np.zeros(500, int), raw[500:], np.zeros(100, int))
    monkeypatch.setattr(data, "load", lambda *_: raw)
    loaded = cifar_images.load(config_of(whiten=True))
    x = loaded.train_images.reshape(500, 48).astype(np.float64)
    np.testing.assert_allclose(x.T @ x / 500, np.eye(48), atol=1e-3)
    whitening = cifar_images.zca((raw.train_images.astype(np.float32) - 127.5) / 128, 1e-5)
    test = (raw.test_images.reshape(100, 48) - 127.5) / 128
    np.testing.assert_allclose(
        loaded.test_images.reshape(100, 48), (test - whitening["mean"]) @ whitening["w"], atol=1e-4
    )


def test_schedule():
    config = Config()
    assert training.schedule(config, 0) == (0.003, 0.9)
    assert training.schedule(config, 99) == (0.003, 0.9)
    assert training.schedule(config, 100) == (0.003, 0.5)
    assert training.schedule(config, 150) == (0.003 * 0.5, 0.5)
    assert training.schedule(config, 199) == pytest.approx((0.003 * 0.01, 0.5))
    normal = dataclasses.replace(config, parameterization="normal")
    assert training.schedule(normal, 0) == (0.0003, 0.9)
    assert training.schedule(dataclasses.replace(normal, learning_rate=0.01), 0) == (0.01, 0.9)
    assert training.schedule(dataclasses.replace(config, epochs=8), 6) == (0.003 * 0.5, 0.5)


@pytest.mark.parametrize("inside", [False, True])
def test_adam_keeps_its_slots_when_beta_1_is_switched(rng, inside):
    """Against Adam in NumPy, with a switch of beta_1 and the rate during training."""
    config = Config(epsilon_inside_root=inside, epsilon=1e-4)
    start = rng.normal(size=5)
    variable = tf.Variable(start, dtype=tf.float32)
    adam = training.make_optimizer(config, [variable])
    update = tf.function(lambda grad: adam.apply_gradients([(grad, variable)]))
    w, m, v = start.copy(), np.zeros(5), np.zeros(5)
    for t in range(1, 9):
        beta_1, rate = (0.9, 0.003) if t < 5 else (0.5, 0.001)
        adam.beta_1.assign(beta_1)
        adam.learning_rate.assign(rate)
        grad = rng.normal(size=5) * 0.01
        update(tf.constant(grad, tf.float32))
        m = beta_1 * m + (1 - beta_1) * grad
        v = 0.999 * v + 0.001 * grad**2
        c1, c2 = 1 - beta_1**t, 1 - 0.999**t
        if inside:
            w -= rate * (m / c1) / np.sqrt(v / c2 + 1e-4)
        else:
            w -= rate * np.sqrt(c2) * (m / c1) / (np.sqrt(v) + 1e-4)
    np.testing.assert_allclose(variable, w, rtol=2e-5)
    assert np.abs(w - start).min() > 1e-4


@pytest.mark.parametrize("kind", ["normal", "mean_only_bn"])
def test_frozen_g_keeps_glorots_w_and_trains_it_alone(kind):
    """With frozen_g, w starts from Glorot's range, g is set from data, and only w trains."""
    images = images_of(200)
    config = config_of(parameterization=kind, frozen_g=True, init_examples=200)
    network = initialized(config, images)
    logits = network(images, training=True, seed=tf.constant([0, 0], tf.int64))
    np.testing.assert_allclose(tf.math.reduce_variance(logits, 0), 1, atol=1e-3)
    first = layers_of(network)[1].linear.weight
    limit = np.sqrt(6 / (9 * 4 + 9 * 4))
    assert 0.9 * limit < np.abs(first.weight.w).max() <= limit
    assert not any("g:0" in variable.name for variable in network.trainable_variables)
    assert (first.g.numpy() != 1).all()


def test_noise_and_dropout(rng):
    x = rng.normal(size=(100, 8, 8, 6)).astype(np.float32)
    seed = tf.constant([3, 4], tf.int64)
    noise = (cifar.GaussianNoise(0.15)(x, True, seed) - x).numpy()
    assert noise.std() == pytest.approx(0.15, rel=0.02)
    assert abs(noise.mean()) < 0.003
    dropped = cifar.Dropout(0.25)(x, True, seed).numpy()
    kept = dropped != 0
    assert kept.mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(dropped[kept], x[kept] / 0.75, rtol=1e-6)
    for row in (cifar.GaussianNoise(0.15), cifar.Dropout(0.25)):
        np.testing.assert_array_equal(row(x, False, None), x)
        np.testing.assert_array_equal(row(x, True, seed), row(x, True, seed))
        assert (row(x, True, seed) != row(x, True, seed + 1)).numpy().any()


@pytest.mark.parametrize("slope", [0.1, 0.5])
def test_leaky_relu_and_its_gradient_from_the_output(rng, slope):
    t = tf.constant(np.append(rng.normal(size=50), [0.0, -0.0]), tf.float32)
    outcomes = []
    for function in (cifar.leaky_relu, tf.nn.leaky_relu):
        with tf.GradientTape() as tape:
            tape.watch(t)
            y = function(t, slope)
        outcomes.append((y, tape.gradient(y, t)))
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 3, 3, 5), (7, 5)])
def test_batch_norm_against_its_definition(rng, shape):
    norm = BatchNormalization(5, momentum=0.9, epsilon=1e-6)
    gamma, beta = rng.normal(size=5), rng.normal(size=5)
    norm.gamma.assign(gamma)
    norm.beta.assign(beta)
    t = rng.normal(3, 2, shape)
    axes = tuple(range(len(shape) - 1))
    mean, variance = t.mean(axes), t.var(axes)
    expected = gamma * (t - mean) / np.sqrt(variance + 1e-6) + beta
    np.testing.assert_allclose(norm(tf.constant(t, tf.float32), True), expected, atol=1e-5)
    np.testing.assert_allclose(norm.moving_mean, 0.1 * mean, rtol=1e-5)
    n = t.size / t.shape[-1]
    running = 0.9 + 0.1 * variance * n / (n - 1)  # As in the paper's code.
    np.testing.assert_allclose(norm.moving_variance, running, rtol=1e-5)
    scale = gamma / np.sqrt(running + 1e-6)
    tested = norm(tf.constant(t, tf.float32), False)
    np.testing.assert_allclose(tested, (t - 0.1 * mean) * scale + beta, atol=1e-5)


def test_a_run_on_two_replicas_is_the_run_on_one(run, tmp_path, monkeypatch):
    # In float32, rounding errors grow to 1% of the gradients within ten steps.
    monkeypatch.setattr(runtime, "compute_dtype", lambda config: tf.float64)
    for strategy in ("none", "mirrored"):
        out = tmp_path / strategy
        assert run("--preset", "smoke", "--epochs", 1, "--strategy", strategy, "--out", out)[0] == 0
    assert_same_run_but_for_rounding(tmp_path / "none", tmp_path / "mirrored")


def test_a_run_learns_logs_and_evaluates(run, tmp_path):
    status, out, _ = run("--preset", "smoke", "--out", tmp_path / "a", "--width", 8, "--epochs", 3)
    assert status == 0
    assert "a quick check that it runs" in out
    logged = metrics.read(tmp_path / "a")
    assert logged["epoch"] == [1, 2, 3]
    assert logged["loss"][2] < logged["loss"][0]
    assert logged["learning_rate"] == pytest.approx([0.003, 0.003, 0.002])
    status, out, _ = run("evaluate", tmp_path / "a")
    assert (status, out.split(" (")[0]) == (0, f"test error {logged['test_error'][2]:.2%}")
    assert "; step-30; " in out
    assert "synthetic" in out


IN_FLOAT64 = """
import runpy, sys
import tensorflow as tf
from models.common import runtime
runtime.compute_dtype = lambda config: tf.float64
sys.argv[0] = "models.cifar"
runpy.run_module("models.cifar", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_two_workers_train_as_one(tmp_path):
    """Weights, running means and Adam's slots agree to float32 rounding after ten steps."""
    program = ("-c", IN_FLOAT64)
    options = ["--preset", "smoke", "--epochs", "1", "--out"]
    options = ["--parameterization", "weight_norm_mean_only_bn", *options]
    finish(start(*options, tmp_path / "single", program=program))
    finish(*start_workers(*options, tmp_path / "pair", program=program))
    assert_same_run_but_for_rounding(tmp_path / "single", tmp_path / "pair")


@pytest.mark.slow
def test_two_workers_train_with_batch_norm(tmp_path):
    # Batch norm's moments are float32, and their rounding errors grow with the steps.
    options = ["--preset", "smoke", "--epochs", "1", "--parameterization", "batch_norm", "--out"]
    finish(start(*options, tmp_path / "single"))
    finish(*start_workers(*options, tmp_path / "pair"))
    one, two = metrics.read(tmp_path / "single"), metrics.read(tmp_path / "pair")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)


def test_a_sweep(run, tmp_path):
    status, out, err = run(
        "--preset", "smoke", "--epochs", 1, "--sweep", "--arms", "normal_frozen_g", "weight_norm",
        "--learning-rates", 1e30, 0.001, "--seeds", 0, "--jobs", 2, "--out", tmp_path / "grid",
    )  # fmt: skip
    assert status == 0, err
    assert out.count("diverged: ") == 2
    config = run_folder.load_config(tmp_path / "grid" / "normal_frozen_g-0.001-0", Config)
    assert (config.arm, metrics.last(config.out, "epoch")) == ("normal_frozen_g", 1)


def test_a_learning_rate_that_is_too_high_ends_with_its_step(run, tmp_path):
    status, _, err = run("--preset", "smoke", "--learning-rate", 1e30, "--out", tmp_path / "a")
    assert status == 2
    assert "is nan at step" in err or "is not finite at step" in err
    assert "lower --learning-rate" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parameterization", "weightnorm"], "--parameterization"),
        (["--jit-compile", "--deterministic"], "--deterministic"),
        (["--data-dir", "no/such/folder"], "--data-dir no/such/folder"),
        (["--preset", "smoke", "--batch-size", "2000"], "--batch-size"),
    ],
)
def test_a_mistake_names_the_flag_and_leaves_nothing(run, tmp_path, argv, message):
    status, _, err = run(*argv, "--out", tmp_path / "a")
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_a_batch_that_replicas_cannot_share(run, tmp_path):
    status, _, err = run(
        "--preset", "smoke", "--strategy", "mirrored", "--batch-size", 101, "--out", tmp_path / "a"
    )
    assert status == 2
    assert "--batch-size 101 must be a multiple of the 2 replicas" in err
