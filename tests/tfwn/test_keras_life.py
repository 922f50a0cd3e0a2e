"""Tests wrapped Keras layers in later use: frozen, zero, rematerialized, mixed precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import LAYERS, Attention, normal
from tfwn.keras import WeightNormalization

every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def _classes():
    with keras.saving.custom_object_scope({"Attention": Attention}):
        yield


def wrapped(name, **options):
    make, x, _ = LAYERS[name]
    wrapper = WeightNormalization(make(), **options)
    return wrapper, x, wrapper(x)


@every_layer
@pytest.mark.parametrize(
    "switch", ["before", "after", "inner", "saved", "cloned", "reparameterize"]
)
def test_g_trains_when_its_v_does(name, switch, tmp_path):
    make, x, kernels = LAYERS[name]
    layer = make()
    if switch in ("before", "reparameterize"):
        layer.trainable = False
    if switch == "reparameterize":
        layer(x)
        wrapper = tfwn.reparameterize(layer)
    else:
        wrapper = WeightNormalization(layer)
    wrapper(x)
    if switch in ("after", "saved", "cloned"):
        wrapper.trainable = False
    if switch == "inner":
        wrapper.layer.trainable = False
    if switch in ("saved", "cloned"):
        model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), wrapper])
        if switch == "saved":
            model.save(tmp_path / "model.keras")
            model = keras.models.load_model(tmp_path / "model.keras")
        else:
            model = keras.models.clone_model(model)
        wrapper = model.layers[0]
    assert wrapper.trainable_variables == []
    # Keras ignores setting `trainable` to the value that the outer layer already has.
    (wrapper.layer if switch == "inner" else wrapper).trainable = True
    assert len(wrapper.trainable_variables) == len(wrapper.weights)
    gains = [one.g for one in wrapper.normalized]
    assert len(gains) == kernels
    optimizer = keras.optimizers.SGD(0.1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(wrapper(x) + 1))
    variables = wrapper.trainable_variables
    before = [g.numpy() for g in gains]
    optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
    for g, old in zip(gains, before, strict=True):
        assert np.any(g.numpy() != old)


def test_a_frozen_layer_or_wrapper():
    wrapped = WeightNormalization(keras.layers.Dense(3))
    wrapped(normal(4, 8))
    wrapped.trainable = False
    assert wrapped.trainable_variables == []
    frozen = keras.layers.Dense(3, trainable=False)
    wrapped = WeightNormalization(frozen)
    wrapped(normal(4, 8))
    assert wrapped.trainable_variables == []
    frozen = WeightNormalization(keras.layers.Dense(3), trainable=False)
    model = keras.Sequential([keras.Input((8,)), frozen])
    assert model.trainable_variables == []
    assert tfwn.fold(model).trainable_variables == []


@every_layer
def test_weights_are_numbers(name):
    """Code that averages or rescales all weights as floats must work on a wrapped layer."""
    wrapper, x, y = wrapped(name)
    for variables in (wrapper.weights, wrapper.variables):
        assert {v.dtype for v in variables if "seed" not in v.name} == {"float32"}
    plain = LAYERS[name][0]()
    plain(x)
    gains = sum(int(np.prod(one.g.shape)) for one in wrapper.normalized)
    assert wrapper.count_params() == plain.count_params() + gains
    wrapper.set_weights([0.5 * (a + a) for a in wrapper.get_weights()])
    np.testing.assert_array_equal(wrapper(x), y)
    wrapper.set_weights([a + 1 for a in wrapper.get_weights()])
    assert not tfwn.is_initialized(wrapper)


@every_layer
@pytest.mark.parametrize("how", ["wrapper", "reparameterize"])
def test_zero_kernels_learn(name, how):
    make, x, _ = LAYERS[name]
    layer = make()
    layer(x)
    kernels = [one.v for one in wrapped(name)[0].normalized]
    names = {v.name for v in kernels}
    for v in layer.weights:
        if v.name in names:
            v.assign(tf.zeros(v.shape))
    expected = layer(x)
    wrapper = WeightNormalization(layer) if how == "wrapper" else tfwn.reparameterize(layer)
    np.testing.assert_array_equal(wrapper(x), expected)
    for one in wrapper.normalized:
        assert np.all(one.v.numpy() != 0)
        np.testing.assert_array_equal(one.g, np.zeros(one.g.shape))
        np.testing.assert_array_equal(one.w(), np.zeros(one.v.shape))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(wrapper(x) + 1))
    gradients = tape.gradient(loss, [one.g.value for one in wrapper.normalized])
    # Attention with all kernels at zero has no gradient, with or without weight normalization.
    assert name == "attention" or any(
        np.any(tf.convert_to_tensor(gradient) != 0) for gradient in gradients
    )
    # The directions are the same in each run.
    again = WeightNormalization(make())
    again(x)
    for other in again.normalized:
        other.v.assign(tf.zeros(other.v.shape))
    again = tfwn.reparameterize(again.fold())
    for one, other in zip(wrapper.normalized, again.normalized, strict=True):
        np.testing.assert_array_equal(one.v, other.v)


@pytest.mark.parametrize("name", ["dense", "conv", "transposed", "einsum"])
@pytest.mark.parametrize("zero_at", ["start", "later"])
def test_data_dependent_init_leaves_zero_units_at_zero(name, zero_at):
    make, x, _ = LAYERS[name]
    layer = make()
    layer(x)
    units = np.ones(layer.kernel.shape, np.float32)
    units[..., 0, :] = 0 if name == "transposed" else 1
    units[..., 0] *= 0 if name != "transposed" else 1
    if zero_at == "start":
        layer.kernel.assign(layer.kernel * units)
    wrapper = WeightNormalization(layer)
    wrapper(x)
    if zero_at == "later":
        layer.kernel.assign(layer.kernel * units)
    tfwn.data_dependent_init(wrapper, x)
    (one,) = wrapper.normalized
    g = one.g.numpy()
    others = tuple(a for a in range(units.ndim) if a not in one.axis)
    zero = np.all(units == 0, others)
    assert zero.any()
    assert not zero.all()
    np.testing.assert_array_equal(g == 0, zero)
    assert np.all(np.any(one.v.numpy() != 0, others))


@every_layer
@pytest.mark.parametrize("mode", ["full", "activations", "larger_than", "list_of_layers"])
def test_remat_gives_the_same_gradients(name, mode):
    if mode == "activations" and name in ("lstm", "bidirectional"):
        pytest.skip("Keras cannot replace the activation of a recurrent layer")
    make, x, _ = LAYERS[name]
    found = []
    for rematerialize in (False, True):
        keras.utils.set_random_seed(1)
        scope = keras.RematScope(
            mode=mode if rematerialize else None, output_size_threshold=1, layer_names=["it"]
        )
        with scope:
            layer = make()
            layer.name = "it"
            wrapper = WeightNormalization(layer)
        wrapper(x)

        @tf.function
        def gradients(wrapper=wrapper):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(wrapper(x) + 1))
            return tape.gradient(loss, [v.value for v in wrapper.trainable_variables])

        found.append([tf.convert_to_tensor(gradient) for gradient in gradients()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "conv", "transposed", "einsum", "attention"])
def test_a_float32_layer_in_a_mixed_one_keeps_float32(name):
    class Outer(keras.layers.Layer):
        def __init__(self, layer):
            super().__init__(dtype="mixed_float16")
            self.inner = layer

        def call(self, x):
            return self.inner(x)

    make, x, _ = LAYERS[name]
    outer = Outer(make())
    expected = outer(x)
    assert expected.dtype == tf.float32
    got = WeightNormalization(outer)(x)
    assert got.dtype == tf.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
@every_layer
def test_every_policy(name, policy):
    make, x, _ = LAYERS[name]
    keras.config.set_dtype_policy(policy)
    try:
        layer = make()
        expected = layer(x)
        got = WeightNormalization(layer)(x)
    finally:
        keras.config.set_dtype_policy("float32")
    assert got.dtype == expected.dtype
    tolerance = {"float16": 5e-3, "bfloat16": 4e-2}.get(expected.dtype.name, 1e-5)
    got, expected = (tf.cast(t, "float64") for t in (got, expected))
    np.testing.assert_allclose(got, expected, tolerance, tolerance)


def test_a_layer_that_does_not_autocast():
    class Wide(keras.layers.Layer):
        def __init__(self):
            super().__init__(autocast=False, dtype="mixed_float16")

        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel", autocast=False)

        def call(self, x):
            return tf.cast(x, tf.float32) @ self.kernel

    layer, x = Wide(), normal(4, 5)
    expected = layer(x)
    np.testing.assert_allclose(WeightNormalization(layer)(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize(
    "cell", [keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell]
)
def test_cells(cell, unroll, tmp_path):
    """Wrapped cells work in keras.layers.RNN, and are saved and loaded with it."""
    cells = [cell(4), cell(3)]
    x = normal(2, 5, 3)
    expected = keras.layers.RNN(cells)(x)
    rnn = keras.layers.RNN([WeightNormalization(one) for one in cells], unroll=unroll)
    np.testing.assert_allclose(rnn(x), expected, atol=1e-6)
    one = WeightNormalization(cell(4))
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.RNN(one, unroll=unroll)])
    one.normalized[0].g.assign(one.normalized[0].g * 2)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), model(x))


def test_dropout_of_a_cell_is_the_same_at_all_steps():
    class Probe(keras.layers.SimpleRNNCell):
        def call(self, x, states, training=False):
            mask = self.get_dropout_mask(x)
            _y, states = super().call(x, states, training=training)
            return mask[:, :3], states

    rnn = keras.layers.RNN(WeightNormalization(Probe(3, dropout=0.5)), return_sequences=True)
    first, second = (rnn(normal(4, 6, 3), training=True).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, np.repeat(first[:, :1], 6, 1))
    assert np.any(first != second)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a .quantize:UserWarning")
def test_quantize_comes_after_fold():
    model = keras.Sequential([keras.Input([6]), WeightNormalization(keras.layers.Dense(3))])
    with pytest.raises(ValueError, match=r"tfwn\.fold first"):
        model.layers[0].quantize("int8")
    model.quantize("int8")
    for use in (lambda: model(tf.ones([1, 6])), lambda: tfwn.fold(model)):
        with pytest.raises(RuntimeError, match=r"tfwn\.fold first"):
            use()
    model = keras.Sequential([keras.Input([6]), WeightNormalization(keras.layers.Dense(3))])
    model.layers[0].g.assign([1.0, 5.0, 20.0])
    expected = model(tf.ones([1, 6]))
    tfwn.fold(model).quantize("int8")
    np.testing.assert_allclose(model(tf.ones([1, 6])), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: keras.layers.Dense(3, dtype=dtype),
        lambda dtype: keras.layers.EinsumDense("ab,bc->ac", (3,), dtype=dtype),
        lambda dtype: keras.layers.Embedding(5, 3, dtype=dtype),
    ],
)
@pytest.mark.parametrize("dtype", ["int8_from_float32", "float8_from_float32"])
def test_quantized_dtypes_are_refused(make, dtype):
    if dtype.startswith("float8") and isinstance(make("float32"), keras.layers.Embedding):
        pytest.skip("Keras has no float8 embedding")
    with pytest.raises(ValueError, match=f"quantized dtype '{dtype}'"):
        WeightNormalization(make(dtype))
