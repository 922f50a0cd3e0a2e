"""Tests mean-only batch normalization (paper, section 4): formula, gradient, replicas."""

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tfwn.layer import initializing


def test_formula_and_running_mean(rng):
    layer = tfwn.MeanOnlyBatchNormalization(dtype=tf.float64)
    layer.build([None, 3])
    layer.b.assign([1.0, 2.0, 3.0])
    running = np.zeros(3)
    for _ in range(3):
        t = rng.normal(size=[4, 5, 3])
        np.testing.assert_allclose(layer(t), t - running + [1, 2, 3])
        mean = t.mean((0, 1))
        np.testing.assert_allclose(layer(t, training=True), t - mean + [1, 2, 3])
        running = 0.9 * running + 0.1 * mean
        np.testing.assert_allclose(layer.moving_mean, running)
    assert [v.name.split("/")[-1] for v in layer.trainable_variables] == ["b:0"]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends(momentum):
    layer = tfwn.MeanOnlyBatchNormalization(momentum=momentum)
    layer(tf.constant([[2.0], [4.0]]), training=True)
    np.testing.assert_allclose(layer.moving_mean, [3.0 * (1 - momentum)])


def test_channels_first(rng):
    t = rng.normal(size=[2, 3, 4, 5]).astype(np.float32)
    first = tfwn.MeanOnlyBatchNormalization(axis=1)(t, training=True)
    last = tfwn.MeanOnlyBatchNormalization()(t.transpose(0, 2, 3, 1), training=True)
    np.testing.assert_allclose(tf.transpose(first, [0, 2, 3, 1]), last, rtol=1e-5, atol=1e-6)


def test_gradient_is_centered(rng):
    """Eq. 8: the gradient of t is the output's gradient minus its mean over the batch."""
    layer = tfwn.MeanOnlyBatchNormalization(dtype=tf.float64)
    t = tf.constant(rng.normal(size=[6, 3]))
    grad_output = rng.normal(size=[6, 3])
    with tf.GradientTape() as tape:
        tape.watch(t)
        loss = tf.reduce_sum(layer(t, training=True) * grad_output)
    grad_t, grad_b = tape.gradient(loss, [t, layer.b])
    np.testing.assert_allclose(grad_t, grad_output - grad_output.mean(0), rtol=1e-12)
    np.testing.assert_allclose(grad_b, grad_output.sum(0), rtol=1e-12)


def plain(t, b, axis):
    """Eq. 7 in plain TensorFlow ops, which TensorFlow differentiates."""
    others = [a for a in range(t.shape.rank) if a != axis % t.shape.rank]
    return t - tf.reduce_mean(t, others, keepdims=True) + b


def derivatives(f, t, b, c):
    """Returns first and second derivatives, and forward-mode ones of f and its gradients."""
    with tf.GradientTape() as outer:
        outer.watch([t, b])
        with tf.GradientTape() as tape:
            tape.watch([t, b])
            loss = tf.reduce_sum(c * tf.sin(f(t, b)))
        first = tape.gradient(loss, [t, b])
        squares = tf.reduce_sum(first[0] ** 2) + tf.reduce_sum(first[1] ** 2)
    second = outer.gradient(squares, [t, b])
    with tf.autodiff.ForwardAccumulator([t, b], [c, tf.ones_like(b)]) as accumulator:
        with tf.GradientTape() as tape:
            tape.watch([t, b])
            y = f(t, b)
            loss = tf.reduce_sum(c * tf.sin(y))
        gradients = tape.gradient(loss, [t, b])
    return [*first, *second, accumulator.jvp(y), *map(accumulator.jvp, gradients)]


@pytest.mark.parametrize("mode", ["eager", "function", "xla"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 3), -1), ((2, 4, 5, 3), -1), ((2, 3, 4, 5), 1), ((2, 5, 3), 0)]
)
def test_derivatives_of_autodiff(shape, axis, mode, rng):
    layer = tfwn.MeanOnlyBatchNormalization(axis, dtype=tf.float64)
    along = [n if a == axis % len(shape) else 1 for a, n in enumerate(shape)]
    t, c = (tf.constant(rng.normal(size=shape)) for _ in "tc")
    b = tf.constant(rng.normal(size=along))

    def ours(t, b):
        layer.b = tf.reshape(b, [-1])
        return layer(t, training=True)

    layer.build(shape)
    wrap = {"eager": lambda f: f, "function": tf.function, "xla": tf.function(jit_compile=True)}
    found = wrap[mode](lambda *inputs: derivatives(ours, *inputs))(t, b, c)
    expected = derivatives(lambda t, b: plain(t, b, axis), t, b, c)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_gradients_in_half_precision(dtype, rng):
    layer = tfwn.MeanOnlyBatchNormalization(compute_dtype=dtype)
    t = tf.cast(rng.normal(3, 1, [50, 8, 4]), dtype)
    grad_y = tf.cast(rng.normal(2, 1, [50, 8, 4]), dtype)
    layer.build(t.shape)
    with tf.GradientTape() as tape:
        tape.watch(t)
        y = layer(t, training=True)
    grad_t, grad_b = tape.gradient(y, [t, layer.b], output_gradients=grad_y)
    assert (grad_t.dtype, grad_b.dtype) == (dtype, tf.float32)
    exact = grad_y.numpy().astype(np.float64)
    np.testing.assert_allclose(grad_b, exact.sum((0, 1)), rtol=1e-6)
    spacing = {tf.float16: 2.0**-10, tf.bfloat16: 2.0**-7}[dtype]
    np.testing.assert_allclose(
        grad_t.numpy().astype(np.float64), exact - exact.mean((0, 1)), atol=4 * spacing
    )


def test_a_large_mean_is_exact(rng):
    t = rng.normal(1000, 1, [100, 32, 32, 2]).astype(np.float32)
    layer = tfwn.MeanOnlyBatchNormalization(momentum=0.0)
    layer(t, training=True)
    np.testing.assert_allclose(layer.moving_mean, t.mean((0, 1, 2), np.float64), rtol=5e-7)


def test_mean_in_half_precision_is_taken_in_float32():
    layer = tfwn.MeanOnlyBatchNormalization(compute_dtype=tf.float16)
    t = tf.fill([4096, 1], tf.constant(100.0, tf.float16))  # The sum, 409600, is beyond float16.
    y = layer(t, training=True)
    assert y.dtype == tf.float16
    np.testing.assert_array_equal(y, tf.zeros_like(t))
    np.testing.assert_allclose(layer.moving_mean, [10.0], rtol=1e-5)


def replicas(rng, sizes, synchronized):
    """Runs a training step on replicas with shards of these sizes; returns inputs and results."""
    batch = rng.normal(size=[sum(sizes), 3])
    grad_output = rng.normal(size=[sum(sizes), 3])
    cuts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(len(sizes))])
    with strategy.scope():
        layer = tfwn.MeanOnlyBatchNormalization(synchronized=synchronized, dtype=tf.float64)

    def piece(values):
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(values[cuts[context.replica_id_in_sync_group]])
        )

    @tf.function
    def step(t, grad_output):
        def replica(t, grad_output):
            with tf.GradientTape() as tape:
                tape.watch(t)
                y = layer(t, training=True)
                loss = tf.reduce_sum(y * grad_output)
            grad_t, grad_b = tape.gradient(loss, [t, layer.b])
            return y, grad_t, grad_b[tf.newaxis]

        return strategy.run(replica, (t, grad_output))

    outputs = step(piece(batch), piece(grad_output))
    y, grad_t, grad_b = (np.concatenate(strategy.experimental_local_results(o)) for o in outputs)
    # Each replica computes the gradient of b from its own outputs. Optimizers add them up.
    np.testing.assert_allclose(grad_b, [grad_output[c].sum(0) for c in cuts], rtol=1e-12)
    return batch, grad_output, y, grad_t, layer


@pytest.mark.parametrize("sizes", [[4, 4], [5, 2]])
def test_synchronized_replicas_equal_one_device(sizes, rng):
    batch, grad_output, y, grad_t, layer = replicas(rng, sizes, synchronized=True)
    np.testing.assert_allclose(y, batch - batch.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad_t, grad_output - grad_output.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.1 * batch.mean(0), rtol=1e-6)


def test_replicas_of_their_own(rng, tmp_path):
    """With synchronized=False, each replica subtracts its own mean."""
    batch, _, y, _, layer = replicas(rng, [4, 4], synchronized=False)
    means = batch.reshape(2, 4, 3).mean(1)
    np.testing.assert_allclose(y, batch - np.repeat(means, 4, 0), rtol=1e-12, atol=1e-12)
    # Outside the replicas, as in a checkpoint, the running mean is the average over replicas.
    path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "checkpoint"))
    single = tfwn.MeanOnlyBatchNormalization(dtype=tf.float64)
    single.build([None, 3])
    tf.train.Checkpoint(layer=single).read(path).assert_consumed()
    np.testing.assert_allclose(single.moving_mean, 0.1 * batch.mean(0), rtol=1e-6)


def test_training_across_replicas():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = tfwn.MeanOnlyBatchNormalization()
        y = layer(tf.constant([[2.0], [4.0]]), training=True)
    np.testing.assert_allclose(y, [[-1.0], [1.0]])
    np.testing.assert_allclose(layer.moving_mean.numpy(), [0.3], rtol=1e-6)


def test_initialization_centers_and_changes_nothing():
    """During data-dependent initialization, outputs are centered but no variable changes."""
    layer = tfwn.MeanOnlyBatchNormalization()
    t = tf.constant([[2.0], [4.0]])
    with initializing(lambda layer, t: None):
        for training in (False, True):
            np.testing.assert_allclose(layer(t, training=training), [[-1.0], [1.0]])
    assert layer.moving_mean.numpy() == 0
    assert layer.b.numpy() == 0


ERRORS = {
    r"momentum must lie in \[0, 1\], got 1.5": lambda: tfwn.MeanOnlyBatchNormalization(
        momentum=1.5
    ),
    r"axis must lie in \[-2, 2\)": lambda: tfwn.MeanOnlyBatchNormalization(axis=2)(tf.ones([2, 3])),
    "must have a known number of features": lambda: tfwn.MeanOnlyBatchNormalization().build(
        [3, None]
    ),
    "must have a known rank": lambda: tfwn.MeanOnlyBatchNormalization().build(None),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=range(len(ERRORS)))
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_synchronized_across_replicas_is_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = tfwn.MeanOnlyBatchNormalization(synchronized=True)
        with pytest.raises(RuntimeError, match=r"must be called in a replica, as in strategy\.run"):
            layer(tf.ones([2, 3]), training=True)
