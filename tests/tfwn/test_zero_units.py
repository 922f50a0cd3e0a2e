"""Tests units that are initialized to zero: w starts at zero, and they learn."""

import numpy as np
import pytest
import tensorflow as tf

import tfwn

LAYERS = {
    "dense": (lambda **o: tfwn.Dense(3, kernel_initializer="zeros", **o), [8, 4]),
    "conv": (lambda **o: tfwn.Conv2D(3, 2, kernel_initializer="zeros", **o), [8, 4, 4, 2]),
    "transposed": (
        lambda **o: tfwn.Conv1DTranspose(3, 2, kernel_initializer="zeros", **o),
        [8, 4, 2],
    ),
    "depthwise": (
        lambda **o: tfwn.DepthwiseConv2D(2, depthwise_initializer="zeros", **o),
        [8, 4, 4, 2],
    ),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def learns(layer, x, g, v):
    """Asserts that the layer returns 0, that a step moves g, and that the next one moves v."""
    assert not np.any(layer(x))
    assert np.any(v != 0)
    before = [g.numpy(), v.numpy()]
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((layer(x) - 1.0) ** 2)
        for variable, gradient in zip([g, v], tape.gradient(loss, [g, v]), strict=True):
            variable.assign_sub(0.1 * tf.convert_to_tensor(gradient))
    assert np.all(g.numpy() != before[0])
    assert np.any(v.numpy() != before[1])


@every_layer
@pytest.mark.parametrize("options", [{}, {"g_initializer": 2.0}], ids=["", "g_initializer"])
def test_an_initializer_of_zeros(make, shape, options):
    layer, x = make(**options), tf.random.stateless_normal(shape, [1, 2])
    layer(x)
    learns(layer, x, layer.weight.g, layer.weight.v)


@pytest.mark.parametrize("kind", [tfwn.SimpleRNN, tfwn.LSTM, tfwn.GRU])
def test_recurrent_layers_of_zeros(kind):
    layer = kind(4, kernel_initializer="zeros", recurrent_initializer="zeros")
    x = tf.random.stateless_normal([8, 5, 3], [1, 2])
    assert not np.any(layer(x))
    weight = layer.cell.weight
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((layer(x) - 1.0) ** 2)
    assert np.any(tape.gradient(loss, weight.g) != 0)


def test_an_embedding_of_zeros():
    layer, ids = tfwn.Embedding(5, 3, embeddings_initializer="zeros"), tf.range(5)
    layer(ids)
    learns(layer, ids, layer.weight.g, layer.weight.v)


@every_layer
def test_reparameterize(make, shape):
    layer, x = make(parameterization="normal"), tf.random.stateless_normal(shape, [1, 2])
    assert not np.any(layer(x))
    tfwn.reparameterize(layer)
    learns(layer, x, layer.weight.g, layer.weight.v)


def test_reparameterize_a_module_with_some_units_of_zeros():
    class Linear(tf.Module):
        def __init__(self):
            self.w = tf.Variable([[3.0, 0.0], [4.0, 0.0]])

        def __call__(self, x):
            return x @ self.w

    model = tfwn.reparameterize(Linear())
    np.testing.assert_allclose(model.w.numpy(), [[3, 0], [4, 0]], rtol=1e-6)
    np.testing.assert_array_equal(model.w.v[:, 0], [3, 4])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((model(tf.ones([1, 2])) - 1.0) ** 2)
    assert tape.gradient(loss, model.w.g)[1] != 0
    folded = tfwn.fold(model)
    np.testing.assert_allclose(folded.w, [[3, 0], [4, 0]], rtol=1e-6)


@every_layer
@pytest.mark.parametrize("parameterization", ["weight_norm", "normal"])
def test_data_dependent_init_keeps_them(make, shape, parameterization):
    layer = make(parameterization=parameterization)
    x = tf.random.stateless_normal(shape, [1, 2])
    assert not np.any(tfwn.data_dependent_init(layer, x))
    assert tfwn.is_initialized(layer)
    if parameterization == "weight_norm":
        learns(layer, x, layer.weight.g, layer.weight.v)


def test_data_dependent_init_gives_a_dead_unit_a_direction():
    layer, x = tfwn.Dense(2), tf.random.stateless_normal([50, 4], [1, 2])
    layer(x)
    layer.weight.v.assign(tf.zeros([4, 2]))  # As versions before 0.1.0's release saved it.
    layer.weight.g.assign([0.0, 3.0])
    assert not np.any(tfwn.data_dependent_init(layer, x))
    learns(layer, x, layer.weight.g, layer.weight.v)


def test_masked_units_stay_masked():
    mask = np.array([[1.0, 0.0], [0.0, 0.0]])
    layer = tfwn.Dense(2, kernel_initializer="zeros", kernel_mask=mask, exponential_g=False)
    layer(tf.ones([1, 2]))
    v = layer.weight.v.numpy()
    assert v[0, 0] != 0
    assert np.all(v[mask == 0] == 0)


def test_an_exponential_g_cannot_be_zero():
    message = r"g must be positive where g = exp\(s\): use exponential_g=False if a unit"
    layer = tfwn.Dense(2, kernel_initializer="zeros", exponential_g=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        layer(tf.ones([1, 3]))
    weight = tfwn.Weight([2, 2], exponential_g=True)
    before = weight().numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        weight.set_g([0.0, 1.0])
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        weight.assign([[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_array_equal(weight(), before)
    layer = tfwn.Dense(2, kernel_initializer="zeros", exponential_g=True, parameterization="normal")
    layer(tf.ones([1, 3]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        tfwn.reparameterize(layer)
    assert layer.weight.parameterization == "normal"
    assert not np.any(layer(tf.ones([1, 3])))
