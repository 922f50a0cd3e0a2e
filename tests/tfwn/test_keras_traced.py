"""Tests the weight normalization of layers that trace or write their own kernels."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.keras_layers import LAYERS, Attention, normal
from tfwn.keras import WeightNormalization

every_layer = pytest.mark.parametrize("name", LAYERS)


def traced(make, how):
    """Returns a layer with a tf.function as its `call`, as a method, or as an attribute."""
    cls = type(make())
    if how == "call":
        made = type(cls.__name__, (cls,), {"call": tf.function(cls.call)})
        config = make().get_config()
        return made.from_config(config) if cls is not Attention else made()

    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = make()
            if how == "attribute":
                self.function = tf.function(lambda x: self.inner(x))

        def build(self, shape):
            self.inner.build(shape)

        @tf.function
        def method(self, x):
            return self.inner(x)

        def call(self, x):
            return self.method(x) if how == "method" else self.function(x)

    return Outer()


def sorted_kernels(wrapper):
    """Sorts by path within the innermost layer, because outer layers differ in their order."""

    def key(one):
        return [part.rstrip("_0123456789") for part in one.v.path.split("/")[-3:]]

    return sorted(wrapper.normalized, key=key)


@every_layer
@pytest.mark.parametrize("before", ["nothing", "call"])
@pytest.mark.parametrize("how", ["call", "method", "attribute"])
def test_a_trace_follows_v_and_g(name, how, before):
    """Eager and traced calls have the outputs and gradients of a layer that traces nothing."""
    make, x, _ = LAYERS[name]
    layer = traced(make, how)
    if before == "call":
        layer(x)
        if how == "attribute":
            with pytest.raises(ValueError, match=r"the tf\.function 'function' .* was traced"):
                WeightNormalization(layer)(x)
            return
    wrapper = WeightNormalization(layer)
    wrapper(x)
    plain = make()
    plain(x)
    plain.set_weights(wrapper.layer.get_weights())
    expected = WeightNormalization(plain)
    expected(x)
    pairs = list(zip(*map(sorted_kernels, (wrapper, expected)), strict=True))
    calls = [wrapper, tf.function(lambda: wrapper(x)), tf.function(lambda: wrapper(x) * 1)]
    for factor in (1.0, 2.0, 3.0):
        for one, other in pairs:
            for of in (one, other):
                of.g.assign(of.g * factor)
                of.v.assign(of.v * factor + 0.1)
        for call in calls:
            with tf.GradientTape(persistent=True) as tape:
                y = call(x) if call is wrapper else call()
                z = expected(x)
                losses = [tf.reduce_sum(t**2) for t in (y, z)]
            np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
            for one, other in pairs:
                for a, b in ((one.v, other.v), (one.g, other.g)):
                    a = tf.convert_to_tensor(tape.gradient(losses[0], a.value))
                    b = tf.convert_to_tensor(tape.gradient(losses[1], b.value))
                    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    if how == "attribute":
        with pytest.raises(ValueError, match="was traced already"):
            wrapper.fold()
        return
    plain = wrapper.fold()
    for one in wrapper.normalized:
        one.v.assign(one.v * 0.5)
    folded = expected.fold()
    for one in expected.normalized:
        one.v.assign(one.v * 0.5)
    np.testing.assert_allclose(plain(x), folded(x), rtol=1e-4, atol=1e-5)


def test_w_is_computed_once_outside_of_a_loop():
    """Computing w inside the loop over time would repeat it at every step."""
    wrapper = WeightNormalization(keras.layers.LSTM(3))
    x = normal(4, 6, 8)
    wrapper(x)
    graph = tf.function(lambda: wrapper(x)).get_concrete_function().graph
    functions = graph.as_graph_def().library.function
    assert [op.type for op in graph.get_operations()].count("Tfwn>WeightNorm") == 2
    assert not any("WeightNorm" in node.op for f in functions for node in f.node_def)


class WithCustomGradient(keras.layers.Layer):
    """Multiplies by a layer's kernel; only if `how` is "plain", without a custom gradient."""

    def __init__(self, how, layer):
        super().__init__()
        self.how, self.layer = how, layer

    def build(self, shape):
        self.layer.build(shape)

    def call(self, x):
        if self.how == "plain":
            return self.layer(x)
        if self.how == "remat":
            return keras.remat(self.layer)(x)
        if self.how == "tensor":
            return keras.remat(tf.matmul)(x, tf.convert_to_tensor(self.layer.kernel))
        if self.how == "argument":  # As in quantization-aware training.
            return tf.matmul(x, tf.grad_pass_through(lambda w: 1.0 * w)(self.layer.kernel))
        if self.how == "keyword":  # In a graph, TensorFlow allows none.
            through = tf.grad_pass_through(lambda w: 1.0 * w)
            kernel = self.layer.kernel
            return tf.matmul(x, through(w=kernel) if tf.executing_eagerly() else through(kernel))
        if self.how == "remat argument":
            return keras.remat(lambda x, kernel: tf.matmul(x, kernel))(x, self.layer.kernel)

        @tf.custom_gradient
        def product(x):
            kernel = tf.convert_to_tensor(self.layer.kernel)

            def grad(grad_y, variables=()):
                grad_x = tf.matmul(grad_y, kernel, transpose_b=True)
                return grad_x, [tf.matmul(x, grad_y, transpose_a=True) for _ in variables]

            return tf.matmul(x, kernel), grad

        return product(x)


def without_bias():
    return keras.layers.Dense(3, use_bias=False)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("how", ["remat", "custom"])
def test_kernels_read_in_a_custom_gradient_are_refused(how, graph):
    """Refused without a tape, too, because a trace may be differentiated later."""
    wrapper = WeightNormalization(WithCustomGradient(how, without_bias()))
    call = tf.function(wrapper) if graph else wrapper
    with pytest.raises(RuntimeError, match=r"kernel is read in a function with a custom gradient"):
        call(normal(4, 8))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("how", ["inside", "outside", "tensor", "argument", "keyword"])
def test_custom_gradients_elsewhere_work(how, graph):
    def gradients(how):
        keras.utils.set_random_seed(1)
        if how == "inside":
            layer = WithCustomGradient("remat", WeightNormalization(without_bias()))
        else:
            mode = "plain" if how == "outside" else how
            layer = WeightNormalization(WithCustomGradient(mode, without_bias()))
        x = normal(4, 8)
        layer(x)
        wrapper = layer.layer if how == "inside" else layer
        wrapper.g.assign(wrapper.g * 3)
        call = keras.remat(layer) if how == "outside" else layer

        def run():
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(call(x) ** 2)
            return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

        return tf.function(run)() if graph else run()

    found, expected = gradients(how), gradients("plain")
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class MaskedByItself(keras.layers.Layer):
    """Multiplies its kernel by a mask in each call, like keras.io's PixelCNN."""

    def __init__(self, layer, axis):
        super().__init__()
        self.layer, self.axis = layer, axis

    def build(self, shape):
        self.layer.build(shape)
        self.mask = np.ones(self.layer.kernel.shape, np.float32)
        self.mask[:1] = 0

    def call(self, x):
        self.layer.kernel.assign(self.layer.kernel * self.mask)
        return self.layer(x)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ["dense", "conv", "transposed", "einsum"])
def test_what_a_call_writes_to_the_kernel_is_w(name, graph):
    """If a call assigns the kernel, w must follow the assigned values."""
    make, x, _ = LAYERS[name]
    layer = MaskedByItself(make(), name)
    layer.build(x.shape)
    kernel = layer.layer.kernel
    before = kernel.numpy()
    wrapper = WeightNormalization(layer)
    wrapper.build(x.shape)
    (one,) = wrapper.normalized
    one.g.assign(one.g * 2)
    call = tf.function(wrapper) if graph else wrapper
    for _ in range(2):
        y = call(x)
        np.testing.assert_allclose(one.w(), 2 * before * layer.mask, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(kernel, 2 * before * layer.mask, rtol=1e-5, atol=1e-6)
    wrapper.fold()
    np.testing.assert_allclose(layer(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("name", ["dense", "conv", "transposed", "embedding"])
def test_spectral_normalization(name, order):
    """SpectralNormalization reads its layer's kernel and overwrites it in training."""
    make, x, _ = LAYERS[name]
    plain = keras.layers.SpectralNormalization(make())
    plain.build(x.shape)
    kernel = plain.kernel
    before, u = kernel.numpy(), plain.vector_u.numpy()
    expected = plain(x, training=True)
    if order == "inside":
        layer = WeightNormalization(plain)
        kernel.assign(before)
        layer.build(x.shape)
        wrapper = layer
    else:
        inner = make()
        inner.build(x.shape)
        inner.set_weights([before, *plain.layer.get_weights()[1:]])
        wrapper = WeightNormalization(inner)
        layer = keras.layers.SpectralNormalization(wrapper)
        layer.build(x.shape)
    vector_u = plain.vector_u if order == "inside" else layer.vector_u
    vector_u.assign(u)
    np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-4, atol=1e-5)
    (one,) = wrapper.normalized
    assert one.axis == {"transposed": (2,), "embedding": (0,)}.get(name, (len(before.shape) - 1,))
    np.testing.assert_allclose(one.w(), kernel if order == "inside" else plain.kernel, rtol=1e-4)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
