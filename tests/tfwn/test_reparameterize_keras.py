"""Tests that tfwn.reparameterize and tfwn.fold change any kind of Keras model in place."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import LAYERS, normal
from tfwn.keras import WeightNormalization


def net(kind):
    inputs = keras.Input((8,))
    hidden, last = keras.layers.Dense(6, "relu", name="hidden"), keras.layers.Dense(1)

    class Own(keras.Model):
        @tf.function
        def infer(self, x):
            return self(x)

        def train_step(self, data):
            self.steps = getattr(self, "steps", 0) + 1
            return super().train_step(data)

    class Subclassed(Own):
        def __init__(self):
            super().__init__()
            self.parts = [hidden, last]

        def call(self, x):
            return self.parts[1](self.parts[0](x))

    if kind == "sequential":
        return keras.Sequential([inputs, hidden, last])
    if kind == "functional":
        return keras.Model(inputs, last(hidden(inputs)))
    if kind == "own functional":
        return Own(inputs, last(hidden(inputs)))
    return Subclassed()


@pytest.mark.parametrize("kind", ["sequential", "functional", "own functional", "subclassed"])
def test_a_model_is_changed_in_place(kind):
    model, x = net(kind), normal(16, 8)
    expected = model(x)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, x[:, :1], verbose=0)
    expected = model(x)
    own = "infer" in dir(model)
    if own:
        model.infer(x)
    cls = type(model)
    tfwn.reparameterize(model)  # The result need not be used.
    assert isinstance(model, cls)
    wrappers = [layer for layer in model.layers if isinstance(layer, WeightNormalization)]
    assert len(wrappers) == 2
    assert len(model.trainable_variables) == 6
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    gains = [wrapper.g.numpy() for wrapper in wrappers]
    model.fit(x, x[:, :1], epochs=2, verbose=0)
    assert all(np.any(w.g.numpy() != g) for w, g in zip(wrappers, gains, strict=True))
    if kind != "subclassed":
        assert isinstance(model.get_layer("hidden"), WeightNormalization)
        inner = keras.Model(model.inputs, model.get_layer("hidden").output)
        np.testing.assert_allclose(inner(x), wrappers[0](x), rtol=1e-6)
    wrappers[0].g.assign(wrappers[0].g * 3)
    expected = model(x)
    if own:
        np.testing.assert_allclose(model.infer(x), expected, rtol=1e-5, atol=1e-6)
        assert model.steps > 1
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    tfwn.fold(model)
    assert type(model) is cls
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    hidden = model.parts[0] if kind == "subclassed" else model.get_layer("hidden")
    hidden.kernel.assign(hidden.kernel * 2)
    if own:
        np.testing.assert_allclose(model.infer(x), model(x), rtol=1e-5, atol=1e-6)
    model.fit(x, x[:, :1], verbose=0)
    assert len(model.trainable_variables) == 4


def test_a_model_without_call_whose_parts_are_built():
    """Like keras.io's VAE and GAN, whose parts are models that train_step calls."""

    class Gan(keras.Model):
        def __init__(self, generator, discriminator):
            super().__init__()
            self.generator, self.discriminator = generator, discriminator

    generator = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8)])
    discriminator = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    gan = Gan(generator, discriminator)
    expected = discriminator(generator(normal(4, 3)))
    assert tfwn.reparameterize(gan) is gan
    assert gan.generator is generator
    assert isinstance(generator.layers[0], WeightNormalization)
    assert len(gan.trainable_variables) == 6
    np.testing.assert_allclose(discriminator(generator(normal(4, 3))), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="is not built"):
        tfwn.reparameterize(Gan(keras.Sequential([keras.layers.Dense(8)]), discriminator))


def test_two_models_of_one_graph():
    """Converting one of two models with a shared layer converts that layer for both."""
    inputs = keras.Input((8,))
    code = keras.layers.Dense(3)(inputs)
    encoder, whole = keras.Model(inputs, code), keras.Model(inputs, keras.layers.Dense(8)(code))
    tfwn.reparameterize(whole)
    whole.layers[1].g.assign(whole.layers[1].g * 2)
    np.testing.assert_allclose(encoder(normal(4, 8)), whole.layers[1](normal(4, 8)), rtol=1e-6)
    tfwn.reparameterize(encoder)
    assert encoder.layers[1] is whole.layers[1]
    assert len(encoder.trainable_variables) == 3


def test_a_refused_model_stays_as_it_was():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(3, kernel_regularizer="l2"),
            keras.layers.Dense(3, kernel_constraint="max_norm"),
        ]
    )
    with pytest.raises(ValueError, match="constraint"):
        tfwn.reparameterize(model)
    assert all(isinstance(layer, keras.layers.Dense) for layer in model.layers)
    assert isinstance(model.layers[0].kernel.regularizer, keras.regularizers.L2)
    with pytest.raises(ValueError, match="found no weight"):
        tfwn.reparameterize(keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5)]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_a_strategy_wrapped_outside_of_its_scope(name):
    make, x, _ = LAYERS[name]
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = make()
        layer(x)
    wrapper = tfwn.reparameterize(layer)
    for one in wrapper.normalized:
        assert one.g.value.distribute_strategy is strategy
    outputs = strategy.experimental_local_results(strategy.run(wrapper, (x,)))
    np.testing.assert_allclose(outputs[0], outputs[1])


@keras.saving.register_keras_serializable("tests")
class Transposed(keras.layers.Layer):
    """Multiplies x by the transposed kernel of another layer."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def call(self, x):
        kernel = getattr(self.layer, "embeddings", None)
        return keras.ops.matmul(
            x, keras.ops.transpose(self.layer.kernel if kernel is None else kernel)
        )


class Tied(keras.Model):
    def __init__(self, make):
        super().__init__()
        self.layer = make()
        self.head = Transposed(self.layer)

    def call(self, x):
        return self.head(self.layer(x))


TIED = {
    "dense": (lambda: keras.layers.Dense(5, use_bias=False), normal(4, 8)),
    "embedding": (lambda: keras.layers.Embedding(9, 3), tf.constant([[1, 2, 1]])),
}


@pytest.mark.parametrize("kind", ["functional", "subclass"])
@pytest.mark.parametrize("name", TIED)
def test_tied_kernels_have_one_g(name, kind):
    make, x = TIED[name]
    if kind == "subclass":
        model = Tied(make)
    else:
        layer = make()
        inputs = keras.Input(x.shape[1:], dtype=x.dtype)
        model = keras.Model(inputs, Transposed(layer)(layer(inputs)))
    expected = model(x)
    assert tfwn.reparameterize(model) is model
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    v, g = sorted(model.trainable_variables, key=lambda v: -len(v.shape))
    g.assign(g * 2)
    np.testing.assert_allclose(model(x), 4 * expected, rtol=1e-4, atol=1e-5)
    model.compile("sgd", "mse")
    model.fit(x, expected, verbose=0)
    expected = model(x)
    tfwn.fold(model)
    assert [one.path for one in model.trainable_variables] == [v.path]
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


class Borrowed(keras.layers.Layer):
    """Uses the kernel of another layer as its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, shape):
        self.kernel = self.layer.kernel

    def call(self, x):
        return x @ self.kernel


def test_a_kernel_that_two_layers_have_as_their_own_is_refused():
    layer, x = keras.layers.Dense(5), normal(2, 5)
    model = keras.Sequential([keras.Input([5]), layer, Borrowed(layer)])
    expected = model(x)
    with pytest.raises(ValueError, match=r"is a kernel of .*: let one layer have the kernel"):
        tfwn.reparameterize(model)
    np.testing.assert_array_equal(model(x), expected)
