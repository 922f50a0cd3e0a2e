"""Tests that a reparameterized variable acts like a tf.Variable or raises a clear error."""

import copy

import keras
import numpy as np
import pytest
import sonnet as snt
import tensorflow as tf

import tfwn

W = np.array([[3.0, 0.5, 1.0], [4.0, 1.0, -2.0]], np.float32)


def kernel_of_keras(axis=-1):
    """The kernel of a wrapped Keras layer, as a caller reads it."""
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    layer.kernel.assign(W)
    wrapper = tfwn.keras.WeightNormalization(layer, axis=axis)
    wrapper.build((None, 2))
    return wrapper.kernel


class Module(tf.Module):
    def __init__(self, w=W):
        self.w = tf.Variable(w, name="w")

    def __call__(self, function):
        return function(self.w)


@tf.function
def outer_product(w):
    return tf.einsum("ij,kj->ik", w, w)


@tf.function
def loop(w):
    total = tf.zeros([3])
    for row in w:
        total += row
    return total


USES = {
    "iteration": lambda w: tf.add_n([row**3 for row in w]),
    "unpacking": lambda w: (lambda a, b: a - b)(*w),
    "indexing": lambda w: w[0, 1:] + w[1, tf.newaxis, 1:],
    "operators": lambda w: (1 - w) * 2 / (w + 10) ** 2 @ tf.transpose(-w),
    "equality": lambda w: tf.cast(w == w, tf.float32) + tf.cast(w != w + 1, tf.float32),
    "gather": lambda w: tf.gather(w, [1, 0, 1]),
    "lookup": lambda w: tf.nn.embedding_lookup(w, [[1], [0]]),
    "sparse_read": lambda w: w.sparse_read([[1], [0]]),
    "gather_nd": lambda w: w.gather_nd([[1, 2]]),
    "value": lambda w: w.read_value() + (w.value() if callable(w.value) else w.value),
    "stack": lambda w: tf.stack([w, w]),
    "argument": outer_product,
    "keyword": lambda w: outer_product(w=w),
    "loop": loop,
    "map": lambda w: tf.map_fn(lambda row: 2 * row, w),
    "shape": lambda w: tf.reshape(w, [w.get_shape()[1], w.shape[0]]),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("of", ["module", "keras"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_user_code(use, of, axis, graph):
    module = Module()
    expected = use(module.w)
    if of == "module":
        tfwn.reparameterize(module, axis=axis)
    else:
        module.w = kernel_of_keras(axis)
    call = tf.function(lambda: module(use)) if graph else lambda: module(use)
    variables = [getattr(v, "_value", v) for v in (module.w.v, module.w.g)]
    with tf.GradientTape() as tape:
        actual = call()
        loss = tf.reduce_sum(actual)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    if use is not USES["equality"]:
        of_v, of_g = map(tf.convert_to_tensor, tape.gradient(loss, variables))
        assert np.any(of_v != 0)
        assert np.all(np.isfinite(of_g))


@pytest.mark.parametrize("of", ["module", "keras"])
def test_attributes(of):
    w = tfwn.reparameterize(Module()).w if of == "module" else kernel_of_keras()
    assert w.shape == w.get_shape() == [2, 3]
    name = "w:0" if of == "module" else "kernel"
    assert (w.dtype, w.name, w.trainable, len(w)) == ("float32", name, True, 2)
    assert w.device == tf.convert_to_tensor(w.v).device
    w.set_shape([2, None])
    with pytest.raises(ValueError, match="incompatible"):
        w.set_shape([3, 3])
    np.testing.assert_allclose(np.asarray(w), W, rtol=1e-6)
    assert hash(w) == hash(w)
    if of == "module":
        np.testing.assert_allclose(copy.deepcopy(w).numpy(), W, rtol=1e-6)
    with pytest.raises(ValueError, match="truth value"):
        bool(w)


@pytest.mark.parametrize("of", ["module", "keras"])
def test_assignments(of):
    w = tfwn.reparameterize(Module()).w if of == "module" else kernel_of_keras()
    w.assign(2 * W).assign_add(W).assign_sub(tf.ones([2, 3]))
    np.testing.assert_allclose(w.numpy(), 3 * W - 1, rtol=1e-5)
    np.testing.assert_allclose(w.g, np.linalg.norm(3 * W - 1, axis=0), rtol=1e-5)
    w.assign(0 * W)
    np.testing.assert_array_equal(w.numpy(), 0 * W)
    assert np.all(w.v.numpy() != 0)
    with pytest.raises(ValueError, match=r"w must have shape \(2, 3\), got \(3,\)"):
        w.assign([1.0, 2.0, 3.0])


@pytest.mark.parametrize("name", ["scatter_update", "ref", "initializer", "handle", "_unique_id"])
@pytest.mark.parametrize("of", ["module", "keras"])
def test_what_it_cannot_do_it_says(name, of):
    """The errors for unsupported uses point to .v and .g, or to tfwn.fold."""
    w = tfwn.reparameterize(Module()).w if of == "module" else kernel_of_keras()
    with pytest.raises(AttributeError, match=rf"has no '{name}': .*its \.v and \.g.*tfwn\.fold"):
        getattr(w, name)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = w.other
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.convert_to_tensor(w))
    with pytest.raises((TypeError, AttributeError), match=r"variables.* \.v and \.g"):
        tape.gradient(loss, w)


SONNET = {
    "linear": (lambda: snt.Linear(3), [4, 5]),
    "conv": (lambda: snt.Conv2D(3, 2), [2, 5, 5, 2]),
    "transposed": (lambda: snt.Conv1DTranspose(3, 2, stride=2), [2, 5, 2]),
    "depthwise": (lambda: snt.DepthwiseConv2D(2), [2, 5, 5, 2]),
    "mlp": (lambda: snt.nets.MLP([4, 3]), [4, 5]),
    "unrolled_lstm": (lambda: Unrolled(), [5, 2, 3]),
    "gru": (lambda: Dynamic(snt.GRU(4)), [5, 2, 3]),
    "conv_lstm": (lambda: Dynamic(snt.Conv2DLSTM([4, 4, 2], 3, 2)), [3, 2, 4, 4, 2]),
}


class Unrolled(snt.Module):
    def __init__(self):
        super().__init__()
        self.core = snt.UnrolledLSTM(4)

    def __call__(self, x):
        return self.core(x, self.core.initial_state(x.shape[1]))[0]


class Dynamic(snt.Module):
    def __init__(self, core):
        super().__init__()
        self.core = core

    def __call__(self, x):
        return snt.dynamic_unroll(self.core, x, self.core.initial_state(x.shape[1]))[0]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("make", "shape"), SONNET.values(), ids=SONNET.keys())
def test_sonnet(make, shape, graph):
    module, x = make(), tf.random.stateless_normal(shape, [1, 2])
    expected = module(x)
    tfwn.reparameterize(module)
    call = tf.function(lambda x: module(x)) if graph else module
    with tf.GradientTape() as tape:
        y = call(x)
        loss = tf.reduce_sum(y**2)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    gradients = tape.gradient(loss, module.trainable_variables)
    assert all(gradient is not None for gradient in gradients)
    np.testing.assert_allclose(tfwn.fold(module)(x), expected, rtol=1e-4, atol=1e-5)


class Decorated(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(W, name="w")

    @tf.Module.with_name_scope
    @tf.function
    def __call__(self, x):
        return x @ self.w


def test_traces_that_would_keep_the_old_weights_are_refused():
    x = tf.ones([1, 2])
    module = Decorated()
    module(x)
    with pytest.raises(ValueError, match="outermost decorator"):
        tfwn.reparameterize(module)
    assert isinstance(module.w, tf.Variable)
    for keep in (lambda f: [f], lambda f: {"f": f}, lambda f: f.get_concrete_function(x)):
        module = Module()
        function = tf.function(lambda x, module=module: x @ module.w)
        function(x)
        module.kept = keep(function)
        with pytest.raises(ValueError, match="'kept' of Module was traced already"):
            tfwn.reparameterize(module)


def test_g_is_made_in_the_scope_of_v():
    """g must be a variable of the same strategy as v, inside or outside of its scope."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        module = Module()
        layer = tfwn.Dense(2, parameterization="normal")
        layer(tf.ones([1, 3]))
    tfwn.reparameterize(module)
    tfwn.reparameterize(layer)
    with strategy.scope():
        inside = tfwn.reparameterize(Module())
    for g in (module.w.g, layer.weight.g, inside.w.g):
        assert g.distribute_strategy is strategy
    outside = Module()
    with strategy.scope(), pytest.raises(ValueError, match="outside the scope of the current Mirr"):
        tfwn.reparameterize(outside)
    assert isinstance(outside.w, tf.Variable)
