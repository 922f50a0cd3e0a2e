"""Tests tfwn.data_dependent_init on wrapped Keras layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.standard import check_standard, images
from tfwn.keras import WeightNormalization

# A function that creates the layer, and the axes of its output that index units.
KERAS_LAYERS = {
    "dense": (lambda: keras.layers.Dense(5, activation="relu"), -1),
    "conv": (lambda: keras.layers.Conv2D(4, 3, groups=2, activation="relu"), -1),
    "transpose": (lambda: keras.layers.Conv2DTranspose(4, 3), -1),
    "depthwise": (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2), -1),
    "einsum": (
        lambda: keras.layers.EinsumDense("abcd,dxy->abcyx", (None, None, 5, 2), bias_axes="yx"),
        (-2, -1),
    ),
    "einsum_ellipsis": (
        lambda: keras.layers.EinsumDense("...d,de->...e", 3, bias_axes="e"),
        -1,
    ),
    "einsum_grouped": (
        lambda: keras.layers.EinsumDense("abcd,cde->abce", (None, 10, 3), bias_axes="ce"),
        (-2, -1),
    ),
}


@pytest.mark.parametrize("name", KERAS_LAYERS)
def test_keras_layers(name):
    make, axis = KERAS_LAYERS[name]
    layer, x = WeightNormalization(make()), images(channels=4)
    y = tfwn.data_dependent_init(layer, x)
    np.testing.assert_allclose(layer(x), y, atol=1e-6)
    assert tfwn.is_initialized(layer)
    assert "call" not in vars(layer.layer)
    if getattr(layer.layer, "activation", None) is keras.activations.relu:
        assert np.min(y) == 0
        layer.layer.activation = None
    check_standard(layer(x), axis)
    check_standard(layer.fold()(x), axis)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["dense", "conv", "einsum"])
def test_mixed_precision(name, policy):
    keras.config.set_dtype_policy(policy)
    try:
        make, axis = KERAS_LAYERS[name]
        layer = WeightNormalization(make())
    finally:
        keras.config.set_dtype_policy("float32")
    tfwn.data_dependent_init(layer, images(channels=4))
    assert {variable.dtype for variable in layer.trainable_variables} == {"float32"}
    if name != "einsum":
        layer.layer.activation = None
    y = np.asarray(tf.cast(layer(images(channels=4)), tf.float64))
    others = tuple(a for a in range(y.ndim) if a - y.ndim not in np.atleast_1d(axis))
    np.testing.assert_allclose(y.mean(others), 0, atol=0.03)
    np.testing.assert_allclose(y.std(others), 1, atol=0.02)


@pytest.mark.parametrize("container", [list, dict])
def test_keras_model_with_several_inputs(container):
    inputs = {"left": keras.Input((3,), name="left"), "right": keras.Input((4,), name="right")}
    branches = [WeightNormalization(keras.layers.Dense(5))(x) for x in inputs.values()]
    batch = {"left": images()[:, 0, 0], "right": images(channels=4)[:, 0, 0]}
    if container is list:
        inputs, batch = list(inputs.values()), list(batch.values())
    for t in tfwn.data_dependent_init(keras.Model(inputs, branches), batch):
        check_standard(t)


def test_keras_bias_that_is_not_one_per_unit_is_refused():
    layer = WeightNormalization(
        keras.layers.EinsumDense("abcd,dxy->abcyx", (None, None, 5, 2), bias_axes="x")
    )
    with pytest.raises(RuntimeError, match="bias_axes 'x' are not the axes 'xy'"):
        tfwn.data_dependent_init(layer, images())


def test_keras_model_with_attention_is_initialized_inside(tmp_path):
    inputs = keras.Input((10, 10, 3))
    x = WeightNormalization(keras.layers.Conv2D(8, 3, activation="relu"))(inputs)
    x = keras.layers.Dropout(0.1)(keras.layers.Reshape((64, 8))(x))
    attention = WeightNormalization(keras.layers.MultiHeadAttention(2, 4))
    model = keras.Model(inputs, attention(x, x))
    check_standard(tfwn.data_dependent_init(model, images()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert tfwn.is_initialized(loaded)
    np.testing.assert_array_equal(loaded(images()), model(images()))
    with pytest.raises(RuntimeError, match="initialized already"):
        tfwn.data_dependent_init(loaded, images())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.layers.LSTM(3), r"layer 'lstm.* \(LSTM\)\."),
        (lambda: keras.layers.Embedding(3, 3), r"layer 'embedding.* \(Embedding\)\."),
        (lambda: keras.layers.SeparableConv1D(3, 3), "layer 'separable.* are unknown"),
    ],
    ids=["lstm", "embedding", "separable"],
)
def test_keras_layers_that_cannot_be_initialized(make, message):
    x = tf.ones([4]) if "embedding" in message else tf.ones([4, 5, 3])
    model = keras.Sequential([WeightNormalization(make())])
    with pytest.raises(RuntimeError, match=message):
        tfwn.data_dependent_init(model, x)


@pytest.mark.parametrize("outer", [True, False], ids=["around", "inside"])
def test_time_distributed_counts_all_steps(outer):
    steps = tf.stack([images() * 0.2, images() ** 2, -images()], 1)
    layer = keras.layers.Conv2D(4, 3)
    if outer:
        layer = WeightNormalization(keras.layers.TimeDistributed(layer))
    else:
        layer = keras.layers.TimeDistributed(WeightNormalization(layer))
    y = tfwn.data_dependent_init(layer, steps)
    check_standard(y)
    assert y.shape == [32, 3, 8, 8, 4]
    np.testing.assert_allclose(layer(steps), y, atol=1e-5)  # With one call per step again.
    assert tfwn.is_initialized(layer)


def test_batch_normalization_in_time_distributed_stays_per_step():
    inner = keras.Sequential(
        [
            keras.Input([4]),
            keras.layers.BatchNormalization(),
            WeightNormalization(keras.layers.Dense(3)),
        ]
    )
    model = keras.Sequential([keras.Input([6, 4]), keras.layers.TimeDistributed(inner)])
    steps = images(channels=4)[:, 0, :6] + tf.reshape(tf.range(6.0), [6, 1])
    y = tfwn.data_dependent_init(model, steps)
    check_standard(y[:, 0])  # Set from the first step.
    np.testing.assert_allclose(model(steps, training=True), y, atol=1e-5)


def test_init_scale_receives_the_layers_of_the_model():
    attention = WeightNormalization(keras.layers.MultiHeadAttention(2, 4))
    last = WeightNormalization(keras.layers.Dense(3))
    inputs = keras.Input([6, 5])
    model = keras.Model(inputs, last(attention(inputs, inputs)))
    seen = []

    def scale(layer):
        seen.append(layer)
        return 0.1 if layer is model.layers[-1] else 1.0

    y = tfwn.data_dependent_init(model, images(channels=5)[:, 0, :6], init_scale=scale)
    check_standard(y, scale=0.1)
    inside = attention.layer
    expected = [inside.query_dense, inside.key_dense, inside.value_dense, inside.output_dense, last]
    assert {id(layer) for layer in seen} == {id(layer) for layer in expected}


def test_a_subclassed_model_that_is_not_built():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = WeightNormalization(keras.layers.Conv2D(4, 3, activation="relu"))
            self.norm = keras.layers.BatchNormalization()
            self.last = WeightNormalization(keras.layers.Conv2D(2, 1))

        def call(self, x, training=False):
            return self.last(self.norm(self.first(x), training=training))

    model, x = Model(), images()
    y = tfwn.data_dependent_init(model, x)
    check_standard(y)
    assert tfwn.is_initialized(model)
    np.testing.assert_allclose(model(x, training=True), y, atol=1e-5)
