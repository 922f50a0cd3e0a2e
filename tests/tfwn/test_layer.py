"""Tests what layers share: errors, effective weights passed in, data-dependent initialization."""

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tfwn.layer import initializing, is_initializing

ERRORS = {
    "units must be a positive integer, got 0": lambda: tfwn.Dense(0),
    "units must be a positive integer, got 2.5": lambda: tfwn.Dense(2.5),
    "units must be a positive integer, got True": lambda: tfwn.GRU(True),
    "parameterization must be one of": lambda: tfwn.Dense(3, parameterization="batch_norm"),
    "dtype must be float16": lambda: tfwn.LSTM(3, dtype=tf.int8),
    "compute_dtype must be float16": lambda: tfwn.Embedding(3, 4, compute_dtype=tf.int8),
    "filters must be a positive integer, got -1": lambda: tfwn.Conv2D(-1, 3),
    "kernel_size must be .* of 2, each at least 1, got 0": lambda: tfwn.Conv2D(4, 0),
    r"strides must be .* of 2, each at least 1, got \(1, 2, 3\)": lambda: tfwn.Conv2D(
        4, 3, (1, 2, 3)
    ),
    r"padding must be one of \('valid', 'same'\), got 'causal'": lambda: tfwn.Conv2D(
        4, 3, padding="causal"
    ),
    "data_format must be one of .*, got 'NCHW'": lambda: tfwn.Conv2D(4, 3, data_format="NCHW"),
    r"strides and dilation_rate must not both exceed 1, got strides=\(2,\)": lambda: tfwn.Conv1D(
        4, 3, 2, dilation_rate=2
    ),
    "filters must be a multiple of groups=3, got 4": lambda: tfwn.Conv2D(4, 3, groups=3),
    "kernel_size must be an integer or a sequence of 2.*got 3.0": lambda: tfwn.Conv2D(4, 3.0),
    "an initializer must be a number.*got one of type ndarray": (
        lambda: tfwn.Dense(3, kernel_initializer=np.ones([5, 3]))(tf.ones([1, 5]))
    ),
    r"output_padding must lie in \[0, 2\) along axis 0 for a window of 3": (
        lambda: tfwn.Conv2DTranspose(4, 3, 2, output_padding=2)
    ),
    r"output_padding must lie in \[1, 3\) along axis 1 for a window of 4": (
        lambda: tfwn.Conv2DTranspose(4, (3, 4), 2, "same", output_padding=0)
    ),
    "strides must be the same along both axes": lambda: tfwn.DepthwiseConv2D(3, (1, 2)),
    "depth_multiplier must be a positive integer": lambda: tfwn.DepthwiseConv2D(
        3, depth_multiplier=0
    ),
    "input_dim must be a positive integer": lambda: tfwn.Embedding(0, 4),
    "inputs of 'dense' must have rank at least 2": lambda: tfwn.Dense(3)(tf.ones([4])),
    "inputs of 'conv2d' must have rank 4": lambda: tfwn.Conv2D(4, 3)(tf.ones([8, 8, 3])),
    r"inputs of 'conv2d' must have a number of channels that is a multiple of groups=2, got 3": (
        lambda: tfwn.Conv2D(4, 3, groups=2)(tf.ones([1, 8, 8, 3]))
    ),
    "inputs of 'embedding' must be integers, got float32": lambda: tfwn.Embedding(3, 4)([[1.0]]),
    "mask must broadcast to the weight's shape": lambda: tfwn.Dense(3, kernel_mask=np.ones(2))(
        tf.ones([1, 2])
    ),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=range(len(ERRORS)))
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_may_be_numpys():
    """NumPy integers are valid sizes."""
    layer = tfwn.Conv2D(np.int64(4), np.int32(3), strides=[np.int64(2), 1])
    assert layer(tf.ones([1, 9, 9, 2])).shape == [1, 4, 7, 4]


def test_misspelt_arguments_are_refused_at_once():
    with pytest.raises(TypeError, match="parametrization"):
        tfwn.Dense(3, parametrization="normal")
    with pytest.raises(TypeError, match="kernel_initialiser"):
        tfwn.LSTM(3, kernel_initialiser="zeros")


@pytest.mark.parametrize(
    ("layer", "first", "later"),
    [
        (tfwn.Dense(3), [2, 5], [2, 4]),
        (tfwn.Conv2D(4, 3), [1, 8, 8, 3], [1, 8, 8, 6]),
        (tfwn.Conv2D(4, 3, data_format="channels_first"), [1, 3, 8, 8], [1, 6, 8, 8]),
    ],
)
def test_other_number_of_channels_than_built_with(layer, first, later):
    layer(tf.ones(first))
    with pytest.raises(ValueError, match="channels, as when the layer was built"):
        layer(tf.ones(later))


def test_unknown_number_of_channels():
    layer = tfwn.Dense(3)

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def call(x):
        return layer(x)

    with pytest.raises(
        ValueError, match=r"must have a known number of channels .* tf\.ensure_shape"
    ):
        call(tf.ones([2, 3]))
    layer.build([None, 3])
    assert call(tf.ones([2, 3])).shape == [2, 3]
    with pytest.raises(tf.errors.InvalidArgumentError):
        call(tf.ones([2, 4]))


def test_a_failed_first_call_leaves_the_layer_usable():
    layer = tfwn.Conv2D(4, 3, groups=2)
    with pytest.raises(ValueError, match="groups"):
        layer(tf.ones([1, 8, 8, 3]))
    assert layer(tf.ones([1, 8, 8, 4])).shape == [1, 6, 6, 4]


def test_effective_weight_from_outside_the_layer():
    layer = tfwn.Dense(3, "relu")
    x = tf.ones([2, 5])
    y = layer(x)
    w = layer.weight()
    np.testing.assert_array_equal(layer(x, w), y)
    np.testing.assert_array_equal(tf.nn.relu(layer.pre_activation(x, w)), y)
    np.testing.assert_array_equal(layer.pre_activation(x, 0 * w), [[0.0] * 3] * 2)


@pytest.mark.parametrize("dtype", [tf.uint8, tf.int16, tf.int32, tf.uint64], ids=lambda t: t.name)
def test_embeddings_of_any_integers(dtype):
    layer = tfwn.Embedding(5, 3)
    np.testing.assert_array_equal(layer(tf.constant([1, 4], dtype)), layer([1, 4]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_grouped_convolutions_in_half_precision(dtype):
    x = tf.random.stateless_normal([2, 8, 8, 4], [1, 2])
    layers = [tfwn.Conv2D(4, 3, groups=2, compute_dtype=one) for one in ("float32", dtype)]
    found = []
    for layer in layers:
        layer(x)
        for variable, value in zip(layer.variables, layers[0].variables, strict=True):
            variable.assign(value)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(layer(x), tf.float32) ** 2)
        found.append(tape.gradient(loss, layer.trainable_variables))
    for exact, rounded in zip(*found, strict=True):
        np.testing.assert_allclose(rounded, exact, atol=0.02 * np.abs(exact).max())


def test_inputs_are_cast():
    y = tfwn.Dense(3)(np.ones([2, 5], np.uint8))
    assert y.dtype == tf.float32
    assert tfwn.Dense(3, dtype="float64")([[1.0, 2.0]]).dtype == tf.float64


# Feed-forward layers, their input shapes, and the axis of their output that indexes units.
FEED_FORWARD = [
    (tfwn.Dense(4), [6, 5], -1),
    (tfwn.Conv1D(4, 3), [6, 5, 2], -1),
    (tfwn.Conv2D(4, 3, groups=2), [6, 5, 5, 2], -1),
    (tfwn.Conv2D(4, 3, data_format="channels_first"), [6, 2, 5, 5], 1),
    (tfwn.DepthwiseConv2D(3, depth_multiplier=2), [6, 5, 5, 2], -1),
    (tfwn.Conv2DTranspose(4, 3, 2), [6, 3, 3, 2], -1),
    (tfwn.Conv2DTranspose(4, 3, parameterization="normal"), [6, 3, 3, 2], -1),
    (tfwn.Dense(4, "relu", exponential_g=True), [6, 5], -1),
]


@pytest.mark.parametrize(("layer", "shape", "axis"), FEED_FORWARD, ids=range(len(FEED_FORWARD)))
def test_initialization_is_given_what_it_needs(layer, shape, axis, rng):
    """A callback can compute from t the g and b that give mean 0 and variance 1."""

    def standardize(layer, t):
        mean, variance = tf.nn.moments(t, list(range(t.shape.rank - 1)))
        layer.weight.set_g(1 / tf.sqrt(variance))
        layer.b.assign(-mean / tf.sqrt(variance))

    x = tf.constant(rng.normal(2, 3, shape), tf.float32)
    assert not is_initializing()
    with initializing(standardize):
        assert is_initializing()
        during = layer(x)
    assert not is_initializing()
    np.testing.assert_array_equal(layer(x), during)
    y = layer.pre_activation(x).numpy()
    others = tuple(a for a in range(y.ndim) if a != axis % y.ndim)
    np.testing.assert_allclose(y.mean(others), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(others), 1, atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tfwn.LSTM(3)(tf.ones([1, 2, 3])),
        lambda: tfwn.GRUCell(3)(tf.ones([1, 2]), [tf.ones([1, 3])]),
        lambda: tfwn.Embedding(3, 4)(tf.constant([1])),
    ],
)
def test_initialization_is_refused(call):
    call()
    with (
        initializing(lambda layer, t: None),
        pytest.raises(RuntimeError, match="Recurrent layers and embeddings cannot"),
    ):
        call()
