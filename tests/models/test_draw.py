"""Tests DRAW against NumPy, and how it starts, trains and samples."""

import dataclasses

import draw_reference as reference
import numpy as np
import pytest
import tensorflow as tf
from support import assert_same_run

from models.common import data, metrics, runtime
from models.draw import network as draw
from models.draw import pictures, training
from models.draw.__main__ import FUNCTIONS
from models.draw.config import Config

SIDE = 7
ATTENTION = pytest.mark.parametrize("attention", [True, False], ids=["attention", "whole images"])
KINDS = pytest.mark.parametrize("kind", ["normal", "weight_norm"])


def config_of(**values):
    return Config.of_preset("smoke", **values)


def tiny(attention=True, **values):
    return config_of(
        attention=attention, glimpses=3, encoder_units=5, decoder_units=6, latent_units=4,
        read_size=2, write_size=3, batch_size=4, initial_stddev=0.5, **values,
    )  # fmt: skip


def inputs_of(config, count=4, seed=0):
    random = np.random.default_rng(seed)
    x = random.integers(0, 2, (count, SIDE, SIDE)).astype(np.float32)
    u = random.normal(size=(config.glimpses, count, config.latent_units)).astype(np.float32)
    return tf.constant(x), tf.constant(u)


def with_random_biases(network, seed=1):
    """Sets the biases, which start at 0, to random values so that they are tested too."""
    random = np.random.default_rng(seed)
    for variable in network.trainable_variables:
        if variable.name.endswith("b:0"):
            variable.assign(random.normal(0, 0.5, variable.shape))
    return network


@pytest.fixture
def run(command):
    """A function that runs the command line and returns (exit status, stdout, stderr)."""
    return lambda *argv: command(FUNCTIONS, *argv)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of two epochs."""
    out = tmp_path_factory.mktemp("trained") / "run"
    training.train(config_of(out=str(out)))
    return out


def gradients_of(network, x, u):
    """Returns the sum of all losses and its gradients."""
    with tf.GradientTape() as tape:
        total = sum(tf.reduce_sum(losses) for losses in network(x, u))
    return total, tape.gradient(total, network.trainable_variables)


@KINDS
@ATTENTION
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_the_bound_is_that_of_the_whole_model_in_numpy(attention, kind, jit):
    config = tiny(attention, parameterization=kind)
    network = with_random_biases(draw.Network(config, SIDE))
    x, u = inputs_of(config)
    cross_entropy, kl = tf.function(network, jit_compile=jit)(x, u)
    assert kl.shape == [3, 4]
    for image in range(4):
        expected = reference.losses(
            network, x[image].numpy().astype(np.float64), u[:, image].numpy()
        )
        np.testing.assert_allclose(cross_entropy[image], expected[0], rtol=2e-5)
        np.testing.assert_allclose(kl[:, image], expected[1], rtol=2e-5)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    "parameters",
    [
        (0, 0, 0, 0, 0),
        (0.3, -0.4, -1.5, -2, 1),  # Small.
        (0.9, -1.1, 0.5, 3, -1),  # Partly outside, blurred.
        (6, 0.1, -1, 0, 0),  # All rows below the image.
    ],
)
def test_filterbanks_against_numpy(size, parameters):
    seen = draw.window(tf.constant([parameters], tf.float32), size, SIDE)
    f_y, f_x = draw.filterbanks(seen, size, SIDE)
    expected_y, expected_x, gamma = reference.window(parameters, size, SIDE)
    np.testing.assert_allclose(f_y[0], expected_y, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(f_x[0], expected_x, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(seen.gamma[0], gamma, rtol=1e-6)


def test_a_window_of_the_images_size_sees_the_image():
    """With delta = 1 and small sigma, filter i lies on pixel i + 1/2 + center - size/2."""
    size = 6
    parameters = [[-1 / size, -1 / size, 0, -8, 0]]  # The center lies between pixels 2 and 3.
    seen = draw.window(tf.constant(parameters, tf.float32), size, size)
    f_y, _ = draw.filterbanks(seen, size, size)
    np.testing.assert_allclose(f_y[0], np.eye(size), atol=2e-4)


@pytest.mark.parametrize("size", [25, 45])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("which", range(5))
def test_gradients_are_finite_at_the_attentions_borders(which, sign, size):
    """Borders: a window far outside; delta, sigma or gamma very small or very large."""
    config = tiny()
    network = draw.Network(config, SIDE)
    for layer in (network.reader, network.writer):
        b = layer.b.numpy()
        b[which] = sign * size if which < 4 else sign * 12
        layer.b.assign(b)
    x, u = inputs_of(config)
    total, gradients = gradients_of(network, x, u)
    assert np.isfinite(total)
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        assert np.isfinite(gradient).all(), variable.name


@KINDS
@ATTENTION
def test_gradients_against_differences_of_the_bound(attention, kind, rng):
    config = tiny(attention, parameterization=kind)
    network = with_random_biases(draw.Network(config, SIDE))
    x, u = inputs_of(config)
    _, gradients = gradients_of(network, x, u)

    def total():
        """The total loss, computed by NumPy in float64."""
        return sum(
            np.sum(
                np.concatenate([np.ravel(part) for part in reference.losses(network, image, noise)])
            )
            for image, noise in zip(x.numpy().astype(float), np.swapaxes(u, 0, 1), strict=True)
        )

    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        value, direction = variable.numpy(), rng.normal(size=variable.shape)
        step = 2e-3
        outcomes = []
        for sign in (1, -1):
            variable.assign(value + sign * step * direction)
            outcomes.append(total())
        variable.assign(value)
        slope = (outcomes[0] - outcomes[1]) / (2 * step)
        expected = np.sum(gradient * direction)
        size = np.linalg.norm(gradient)  # The slope's standard deviation over random directions.
        assert abs(slope - expected) < 1e-2 * size, variable.name


# Training


@ATTENTION
def test_both_begin_as_the_same_function_and_weights(attention):
    outcomes, weights = [], []
    for kind in ("normal", "weight_norm"):
        config = config_of(parameterization=kind, attention=attention, seed=3)
        network = draw.Network(config, SIDE)
        outcomes.append(network(*inputs_of(config)))
        weights.append(tf.nest.flatten(network.weights()))
        v = [variable for variable in network.trainable_variables if variable.name[-3] in "vw"]
        assert np.std(np.concatenate([np.ravel(x) for x in v])) == pytest.approx(0.01, rel=0.02)
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_every_matrix_has_a_g_for_each_column():
    network = draw.Network(Config())
    shapes = [(v.name.split("/")[-1], v.shape.as_list()) for v in network.trainable_variables]
    g, v = (sorted(shape for name, shape in shapes if name == letter) for letter in ("g:0", "v:0"))
    assert g == [[5], [30], [200], [1024], [1024], [1024], [1024]]
    assert v == [
        [100, 1024],
        [256, 5],
        [256, 30],
        [256, 200],
        [256, 1024],
        [256, 1024],
        [264, 1024],
    ]
    assert sum(name == "peephole:0" for name, _ in shapes) == 2


def losses_of(strategy=None, steps=3, **values):
    """Returns the sums from `steps` training steps and, last, those from a test step."""
    strategy = strategy or tf.distribute.get_strategy()
    config = config_of(**values)
    images = training.load(config).train_images[:100]
    with strategy.scope():
        network = draw.Network(config, dtype=runtime.compute_dtype(config))
        optimizer = training.make_optimizer(config, network.trainable_variables)
    train_step, evaluate_step = training.make_steps(config, strategy, network, optimizer)
    seeds = [tf.constant([config.seed, step], tf.int64) for step in range(steps + 1)]
    sums = [train_step(images, seed) for seed in seeds[:-1]]
    return np.array([*sums, evaluate_step(images, seeds[-1])])


def test_jit_compile_changes_nothing():
    options = {"initial_stddev": 0.1}
    plain, compiled = losses_of(**options), losses_of(**options, jit_compile=True)
    np.testing.assert_allclose(compiled, plain, rtol=1e-3)


@KINDS
def test_two_replicas_train_as_one(kind):
    mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    options = {"parameterization": kind, "initial_stddev": 0.1, "clip_norm": 1.0}
    np.testing.assert_allclose(losses_of(mirrored, **options), losses_of(**options), rtol=1e-3)


def test_bfloat16_is_near():
    options = {"initial_stddev": 0.1, "steps": 1}
    half, exact = losses_of(mixed_precision="bfloat16", **options), losses_of(**options)
    np.testing.assert_allclose(half, exact, rtol=2e-2)
    assert np.any(half != exact)  # It does compute in bfloat16.


def test_the_gradient_is_clipped_as_a_whole():
    config = config_of(clip_norm=0.01, initial_stddev=0.1)
    images = training.load(config).train_images[:100]
    network = draw.Network(config)
    sgd = tf.keras.optimizers.SGD(1.0)
    sgd.build(network.trainable_variables)
    train_step, _ = training.make_steps(config, tf.distribute.get_strategy(), network, sgd)
    before = [variable.numpy() for variable in network.trainable_variables]
    train_step(images, tf.constant([0, 0], tf.int64))
    moved = [v.numpy() - b for v, b in zip(network.trainable_variables, before, strict=True)]
    assert tf.linalg.global_norm(moved).numpy() == pytest.approx(0.01, rel=1e-3)


def test_every_glimpse_and_image_has_noise_of_its_own():
    u = training.noise(config_of(glimpses=8), tf.zeros([50, 2, 2]), tf.constant([0, 1], tf.int64))
    assert u.shape == [8, 50, 10]
    assert len(np.unique(u)) > 0.999 * 8 * 50 * 10
    assert np.std(u) == pytest.approx(1, rel=0.03)
    assert abs(np.corrcoef(u[0].numpy().ravel(), u[1].numpy().ravel())[0, 1]) < 0.15


def test_weights_and_noise_have_different_seeds(normal_seeds):
    draw.Network(config_of(), SIDE)
    weights = set(normal_seeds)
    normal_seeds.clear()
    for seed in map(list, weights):
        training.noise(config_of(), tf.zeros([1, 2, 2]), tf.constant(seed, tf.int64))
    pictures.sample_noise(config_of())
    assert len(normal_seeds) == len(weights) > 4
    assert not weights & normal_seeds


def test_adam_is_the_codes():
    adam = training.make_optimizer(Config(), [])
    assert float(adam.learning_rate) == pytest.approx(3e-4)
    assert (adam.beta_1, adam.beta_2, adam.epsilon) == (0.9, 0.999, 1e-8)


# Data


def test_synthetic_images_are_binary_and_the_binarization_is_that_of_its_seed():
    images = training.load(config_of(train_images=500))
    assert images.train_images.shape == (500, 28, 28)
    assert images.test_images.shape == (200, 28, 28)
    np.testing.assert_array_equal(np.unique(images.train_images), [0, 1])
    assert "synthetic" in images.caveat


def test_mnist_is_binarized_once_in_the_files_order(data_dir):
    raw = data.load("mnist", str(data_dir))
    config = Config(data_dir=str(data_dir))
    one, two = training.load(config), training.load(dataclasses.replace(config, seed=5))
    other = training.load(dataclasses.replace(config, binarization_seed=1))
    assert one.train_images.shape == (50_000, 28, 28)
    assert one.test_images.shape == (10_000, 28, 28)
    np.testing.assert_array_equal(one.train_images, two.train_images)
    assert 0.01 < np.mean(one.train_images != other.train_images) < 0.1
    gray = raw.train_images[:50_000, ..., 0]
    assert (one.train_images[gray == 255] == 1).all()
    assert (one.train_images[gray == 0] == 0).all()
    assert one.train_images[gray == 128].mean() == pytest.approx(128 / 255, abs=0.02)


# Runs


def test_a_run_learns_logs_and_evaluates(run, trained):
    logged = metrics.read(trained)
    assert logged["epoch"] == [1, 2]
    assert logged["loss"][1] < logged["loss"][0] - 5
    assert logged["test_bound"][1] > logged["test_bound"][0] + 5
    kl = sum(logged[f"kl/{t:02}"][1] for t in range(1, 5))
    assert logged["test_cross_entropy"][1] + kl == pytest.approx(-logged["test_bound"][1], rel=1e-6)
    events = [
        value
        for path in (trained / "tensorboard").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    tags = {value.tag for value in events}
    assert {"test_bound", "kl/01", "kl/04", "samples"} <= tags
    status, out, _ = run("evaluate", trained)
    assert status == 0
    said = f"bound {logged['test_bound'][1]:.2f} nats = -(cross-entropy "
    assert out.startswith(f"test {said}{logged['test_cross_entropy'][1]:.2f} + KL {kl:.2f}) (")
    assert "synthetic" in out
    status, out, _ = run("evaluate", trained, "--draws", 3)
    several = float(out.split("test bound ")[1].split()[0])
    assert several == pytest.approx(logged["test_bound"][1], abs=1)
    assert several != pytest.approx(logged["test_bound"][1], abs=1e-4)


def test_the_same_seed_gives_the_same_run(trained, tmp_path):
    training.train(config_of(out=str(tmp_path / "again")))
    assert_same_run(trained, tmp_path / "again")
    training.train(config_of(out=str(tmp_path / "other"), seed=1, epochs=1))
    assert metrics.read(tmp_path / "other")["loss"][0] != metrics.read(trained)["loss"][0]


def frames_of(path):
    from PIL import Image

    with Image.open(path) as gif:
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    return frames


def red(picture):
    return (picture[..., 0] > 150) & (picture[..., 1] < 100) & (picture[..., 2] < 100)


def test_sample_writes_a_grid_and_the_drawing_with_its_windows(run, trained, tmp_path):
    status, out, _ = run("sample", trained, "--out", tmp_path / "a", "--scale", 3)
    assert status == 0
    assert str(tmp_path / "a" / "samples.png") in out
    grid = tf.io.decode_png((tmp_path / "a" / "samples.png").read_bytes()).numpy()
    assert grid.shape[0] == grid.shape[1] > 10 * 28
    assert grid.std() > 20
    frames = frames_of(tmp_path / "a" / "drawing.gif")
    assert len(frames) > 4
    assert red(frames[0]).any()
    assert red(frames[3]).any()
    assert not red(frames[-1]).any()  # The finished images, without windows.
    run("sample", trained, "--out", tmp_path / "b", "--scale", 3)
    run("sample", trained, "--out", tmp_path / "c", "--scale", 3, "--seed", 1)
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_frame_lies_where_the_window_does():
    config = config_of(write_size=5)
    # The center is pixel (14, 7), so the filters lie at 10 to 18 and at 3 to 11.
    parameters = np.array([0, -0.5, np.log(2 * 4 / 27), -20, 0], np.float32)
    picture = pictures.with_window(np.zeros((28, 28)), parameters, config, scale=4)
    rows, columns = np.nonzero(red(picture.astype(int)))
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [42, 74, 14, 46]
    assert not red(pictures.with_window(np.ones((28, 28)), [], config, scale=4).astype(int)).any()


def test_whole_images_are_drawn_without_windows(run, tmp_path):
    argv = ["--preset", "smoke", "--no-attention", "--epochs", 1, "--out", tmp_path / "a"]
    assert run(*argv)[0] == 0
    assert run("sample", tmp_path / "a")[0] == 0
    frames = frames_of(tmp_path / "a" / "samples" / "drawing.gif")
    assert not any(red(frame).any() for frame in frames)


def test_the_presets_are_the_codes():
    paper, other = Config(), Config.of_preset("no-attention")
    assert (paper.attention, paper.glimpses, paper.learning_rate) == (True, 64, 3e-4)
    assert (paper.read_size, paper.write_size, paper.epochs) == (2, 5, 100)
    assert (other.attention, other.glimpses, other.learning_rate) == (False, 10, 1e-3)
    assert Config.of_preset("cpu").glimpses == 16


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--write-size", "1"], "--write-size must be at least 2, got 1"),
        (["--train-images", "50"], "--train-images"),
        (["--strategy", "mirrored", "--jit-compile"], "--jit-compile"),
        (["--strategy", "mirrored", "--batch-size", "51"], "--batch-size"),
        (["--data-dir", "no/such/folder", "--dataset", "mnist"], "--data-dir no/such/folder"),
    ],
)
def test_a_mistake_names_the_flag_and_leaves_nothing(run, tmp_path, argv, message):
    status, _, err = run("--preset", "smoke", *argv, "--out", tmp_path / "a")
    assert (status, message in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--draws", 0], "--draws"),
        (["sample", "--scale", 0], "--scale"),
        (["sample", "--out", __file__ + "/a"], "--out"),
    ],
)
def test_a_mistake_of_a_command_is_told_in_one_line(run, trained, argv, message):
    status, _, err = run(argv[0], trained, *argv[1:])
    assert (status, message in err, err.count("\n")) == (2, True, 1), err


def test_a_learning_rate_that_is_too_high_ends_with_its_step(run, tmp_path):
    status, _, err = run("--preset", "smoke", "--learning-rate", 1e20, "--out", tmp_path / "a")
    assert status == 2
    assert "is nan at step" in err or "is not finite at step" in err or "is inf at step" in err
    assert "lower --learning-rate" in err


def test_dtype_of_the_weights_under_bfloat16():
    network = draw.Network(config_of(mixed_precision="bfloat16"), dtype=tf.bfloat16)
    assert all(variable.dtype == tf.float32 for variable in network.trainable_variables)
    assert network.weights()["q"].dtype == tf.bfloat16
    assert runtime.compute_dtype(config_of(mixed_precision="bfloat16")) == tf.bfloat16
