"""Tests each layer's outputs and gradients against its Keras counterpart with the folded weight.

In float64, agreement to 1e-9 rules out any other formula. The expected gradients of v and g come
from Keras' gradient of w by eq. 3 of the paper, computed in NumPy.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn


def compare(layer, peer, inputs, rng, **call):
    """Gives both layers the same random weights and compares them, called with `**call`."""
    layer.build(inputs.shape)
    peer.build(inputs.shape)
    parts = layer_parts(layer)
    weights = peer.weights
    assert len(parts) == len(weights)
    for part, weight in zip(parts, weights, strict=True):
        if isinstance(part, tfwn.Weight):
            for variable in part.trainable_variables:
                variable.assign(rng.normal(size=variable.shape))
            weight.assign(fold(part))
        else:
            part.assign(rng.normal(size=part.shape))
            weight.assign(part)

    y, grad_x, gradients = run(layer, inputs, layer.trainable_variables, call)
    peer_y, peer_grad_x, peer_gradients = run(peer, inputs, [w.value for w in weights], call)
    tf.nest.map_structure(assert_equal, y, peer_y)
    if grad_x is not None:
        assert_equal(grad_x, peer_grad_x)
    got = {id(v): dense(g) for v, g in zip(layer.trainable_variables, gradients, strict=True)}
    for part, grad_w in zip(parts, peer_gradients, strict=True):
        variables = part.trainable_variables if isinstance(part, tfwn.Weight) else [part]
        for variable, expected in zip(variables, eq_3(part, dense(grad_w)), strict=True):
            assert_equal(got[id(variable)], expected)


def layer_parts(layer):
    """Returns a layer's weights and bias in Keras' order."""
    cell = getattr(layer, "cell", layer)
    parts = [cell.weight, getattr(cell, "recurrent_weight", None), getattr(cell, "b", None)]
    return [part for part in parts if part is not None]


def fold(weight):
    if weight.parameterization == "normal":
        return weight.w.numpy()
    v, g, norm = numbers(weight)
    return g * v / norm


def numbers(weight):
    """Returns v, g and ||v|| in float64; g and ||v|| broadcast against v."""
    v = weight.v.numpy()
    others = tuple(a for a in range(v.ndim) if a not in weight.axis)
    norm = np.sqrt(np.sum(v**2, others, keepdims=True))
    g = np.exp(weight.s.numpy()) if weight.exponential_g else weight.g.numpy()
    return v, g.reshape(norm.shape), norm


def eq_3(part, grad_w):
    """Returns the gradients of a part's variables, sorted by name (g or s, v), from that of w."""
    if not isinstance(part, tfwn.Weight) or part.parameterization == "normal":
        return [grad_w]
    v, g, norm = numbers(part)
    others = tuple(a for a in range(v.ndim) if a not in part.axis)
    grad_g = np.sum(grad_w * v, others, keepdims=True) / norm
    grad_v = g / norm * (grad_w - grad_g / norm * v)
    grad_g = (grad_g * g if part.exponential_g else grad_g).reshape(part.g_shape)
    return [grad_g, grad_v]


def run(layer, inputs, variables, call):
    with tf.GradientTape() as tape:
        if inputs.dtype.is_floating:
            tape.watch(inputs)
        y = layer(inputs, **call)
        # A loss that depends differently on each output.
        loss = tf.add_n(
            [tf.reduce_sum(tf.sin(t) * (i + 1)) for i, t in enumerate(tf.nest.flatten(y))]
        )
    gradients = tape.gradient(loss, [inputs, *variables])
    return y, gradients[0], gradients[1:]


def dense(x):
    return np.asarray(tf.convert_to_tensor(x))


def assert_equal(actual, expected):
    np.testing.assert_allclose(dense(actual), dense(expected), rtol=1e-9, atol=1e-9)


# Keras' arguments and the input shape for each layer. Every argument occurs in some row.
GRID = {
    "Dense": [
        (dict(units=4), (3, 5)),
        (dict(units=1, activation="tanh", use_bias=False), (2, 3, 4, 5)),
        (dict(units=4, activation="softmax"), (2, 3, 5)),
    ],
    "Conv1D": [
        (dict(filters=4, kernel_size=3), (2, 9, 3)),
        (dict(filters=4, kernel_size=3, padding="causal", dilation_rate=2), (2, 9, 3)),
        (dict(filters=6, kernel_size=2, strides=2, groups=3, padding="same"), (2, 9, 6)),
        (dict(filters=4, kernel_size=3, use_bias=False, activation="elu"), (2, 9, 3)),
    ],
    "Conv2D": [
        (dict(filters=4, kernel_size=3), (2, 7, 8, 3)),
        (dict(filters=4, kernel_size=(1, 3), strides=(2, 1), padding="same"), (2, 7, 8, 3)),
        (dict(filters=4, kernel_size=3, dilation_rate=(2, 1)), (2, 7, 8, 3)),
        (dict(filters=4, kernel_size=3, dilation_rate=2, padding="same"), (2, 7, 8, 3)),
        (dict(filters=6, kernel_size=3, groups=3, activation="relu"), (2, 7, 8, 6)),
        (dict(filters=4, kernel_size=3, use_bias=False), (2, 7, 8, 3)),
    ],
    "Conv3D": [
        (dict(filters=4, kernel_size=2), (2, 4, 5, 6, 3)),
        (dict(filters=4, kernel_size=(1, 2, 3), strides=2, padding="same"), (2, 4, 5, 6, 3)),
        (dict(filters=4, kernel_size=2, dilation_rate=2, activation="tanh"), (2, 4, 5, 6, 3)),
        (dict(filters=4, kernel_size=2, groups=2, use_bias=False), (2, 4, 5, 6, 2)),
    ],
    "Conv1DTranspose": [
        (dict(filters=4, kernel_size=3), (2, 5, 3)),
        (dict(filters=4, kernel_size=3, strides=2, padding="same", activation="elu"), (2, 5, 3)),
        (dict(filters=4, kernel_size=4, strides=3, output_padding=2, use_bias=False), (2, 5, 3)),
    ],
    "Conv2DTranspose": [
        (dict(filters=4, kernel_size=3), (2, 5, 6, 3)),
        (dict(filters=4, kernel_size=(2, 5), strides=(3, 2)), (2, 5, 6, 3)),
        (dict(filters=4, kernel_size=4, strides=2, padding="same", activation="elu"), (2, 5, 6, 3)),
        (dict(filters=4, kernel_size=3, strides=2, padding="same", output_padding=1), (2, 5, 6, 3)),
        (dict(filters=4, kernel_size=4, strides=2, padding="same", output_padding=1), (2, 5, 6, 3)),
    ],
    "Conv3DTranspose": [
        (dict(filters=4, kernel_size=2), (2, 2, 3, 4, 3)),
        (dict(filters=4, kernel_size=(1, 2, 3), strides=2, padding="same"), (2, 2, 3, 4, 3)),
        (dict(filters=4, kernel_size=2, output_padding=(0, 1, 1), strides=2), (2, 2, 3, 4, 3)),
    ],
    "DepthwiseConv2D": [
        (dict(kernel_size=3), (2, 7, 8, 3)),
        (dict(kernel_size=(2, 3), depth_multiplier=2, strides=2, padding="same"), (2, 7, 8, 3)),
        (dict(kernel_size=3, depth_multiplier=2, dilation_rate=2, activation="elu"), (2, 7, 8, 3)),
    ],
}


def rows(grid):
    for name, cases in grid.items():
        for i, (options, shape) in enumerate(cases):
            yield pytest.param(name, options, shape, id=f"{name}-{i}")


@pytest.mark.parametrize(("name", "options", "shape"), list(rows(GRID)))
def test_feed_forward(name, options, shape, rng):
    layer = getattr(tfwn, name)(**options, dtype=tf.float64)
    peer = getattr(keras.layers, name)(**options, dtype="float64")
    compare(layer, peer, tf.constant(rng.normal(size=shape)), rng)


@pytest.mark.parametrize("name", [name for name in GRID if "Conv" in name])
def test_channels_first(name, rng):
    """Compares with transposed channels_last, because Keras supports few such layers on a CPU."""
    options, shape = GRID[name][1]
    rank = len(shape)
    layer = getattr(tfwn, name)(**options, data_format="channels_first")
    peer = getattr(tfwn, name)(**options)
    x = tf.constant(rng.normal(size=shape), tf.float32)
    y = layer(tf.transpose(x, [0, rank - 1, *range(1, rank - 1)]))
    peer.build(shape)
    for variable, value in zip(peer.variables, layer.variables, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(tf.transpose(y, [0, *range(2, rank), 1]), peer(x), rtol=1e-5)


DILATED = {
    "Conv1DTranspose": (2, 5, 3),
    "Conv2DTranspose": (2, 5, 4, 3),
    "Conv3DTranspose": (2, 2, 3, 4, 3),
}


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("name", DILATED)
def test_dilated_transpose_is_the_transpose_of_the_kernel_with_zeros(name, strides, padding, rng):
    """In float32, the only type that TensorFlow's CPU kernels, and thus Keras, support here."""
    shape = DILATED[name]
    rank = len(shape) - 2
    layer = getattr(tfwn, name)(4, 3, strides, padding, dilation_rate=2)
    x = tf.constant(rng.normal(size=shape), tf.float32)
    y = layer(x)
    w = layer.weight().numpy()
    holes = np.zeros([5] * rank + list(w.shape[-2:]), np.float32)
    holes[(slice(None, None, 2),) * rank] = w
    peer = getattr(tfwn, name)(4, 5, strides, padding, parameterization="normal")
    peer.build(shape)
    peer.weight.assign(holes)
    np.testing.assert_allclose(y, peer(x), rtol=1e-4, atol=1e-5)


RECURRENT = {
    "SimpleRNN": [{}, dict(activation="relu", use_bias=False)],
    "LSTM": [{}, dict(activation="relu", recurrent_activation="hard_sigmoid", use_bias=False)],
    "GRU": [{}, dict(reset_after=False), dict(use_bias=False, activation="softsign")],
}
LOOPS = {
    "last": {},
    "all": dict(return_sequences=True),
    "state": dict(return_state=True, go_backwards=True),
    "unrolled": dict(return_sequences=True, return_state=True, unroll=True, go_backwards=True),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_loops(name, loop, masked, rng):
    layer = getattr(tfwn, name)(4, **loop, dtype=tf.float64)
    peer = getattr(keras.layers, name)(4, **loop, dtype="float64")
    # The two examples mask the first step, a middle step and the last step.
    mask = tf.constant([[0, 1, 1, 0, 1], [1, 1, 0, 1, 0]]) == 1 if masked else None
    states = [tf.constant(rng.normal(size=[2, 4])) for _ in range(2 if name == "LSTM" else 1)]
    inputs = tf.constant(rng.normal(size=[2, 5, 3]))
    compare(layer, peer, inputs, rng, mask=mask, initial_state=states)


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, all in RECURRENT.items() for options in all]
)
def test_recurrent_options(name, options, rng):
    layer = getattr(tfwn, name)(4, **options, dtype=tf.float64)
    peer = getattr(keras.layers, name)(4, **options, dtype="float64")
    compare(layer, peer, tf.constant(rng.normal(size=[2, 5, 3])), rng)


@pytest.mark.parametrize("name", ["SimpleRNNCell", "LSTMCell", "GRUCell"])
def test_cells(name, rng):
    layer = getattr(tfwn, name)(4, dtype=tf.float64)
    peer = getattr(keras.layers, name)(4, dtype="float64")
    states = [tf.constant(rng.normal(size=[2, 4])) for _ in range(2 if name == "LSTMCell" else 1)]
    compare(layer, peer, tf.constant(rng.normal(size=[2, 3])), rng, states=states)


def test_embedding(rng):
    layer = tfwn.Embedding(6, 4, mask_zero=True, dtype=tf.float64)
    peer = keras.layers.Embedding(6, 4, mask_zero=True, dtype="float64")
    ids = tf.constant([[0, 3, 3], [5, 1, 3]])
    compare(layer, peer, ids, rng)
    assert_equal(layer.compute_mask(ids), peer.compute_mask(ids))


@pytest.mark.parametrize(
    "options", [dict(exponential_g=True), dict(parameterization="normal")], ids=["exp", "normal"]
)
@pytest.mark.parametrize("name", [*GRID, "Embedding", "SimpleRNN", "LSTM", "GRU"])
def test_parameterizations(name, options, rng):
    arguments, shape = GRID[name][0] if name in GRID else ({}, (2, 3, 5))
    positional = {"Embedding": (6, 4)}.get(name, () if name in GRID else (4,))
    layer = getattr(tfwn, name)(*positional, **arguments, **options, dtype=tf.float64)
    peer = getattr(keras.layers, name)(*positional, **arguments, dtype="float64")
    inputs = rng.integers(0, 6, shape) if name == "Embedding" else rng.normal(size=shape)
    compare(layer, peer, tf.constant(inputs), rng)


@pytest.mark.parametrize("name", [*GRID, "Embedding", "SimpleRNNCell", "LSTMCell", "GRUCell"])
def test_arguments_have_keras_names_order_and_defaults(name):
    peer = inspect.signature(getattr(keras.layers, name)).parameters
    for ours in inspect.signature(getattr(tfwn, name)).parameters.values():
        if ours.kind is ours.POSITIONAL_OR_KEYWORD:
            assert ours.name in peer
    if name == "Conv3DTranspose":
        return  # Keras has output_padding after data_format here, but before it in 1D and 2D.
    common = [n for n in inspect.signature(getattr(tfwn, name)).parameters if n in peer]
    assert common == [n for n in peer if n in common]
