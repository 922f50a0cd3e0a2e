"""Tests tfwn.reparameterize and tfwn.fold on modules, Sonnet, tfwn's layers and Keras models."""

import copy
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tfwn.keras import WeightNormalization
from tfwn.normalized_variable import NormalizedVariable


def inputs(*shape):
    return tf.random.stateless_normal(shape or (5, 4), [1, 2])


class Network(tf.Module):
    """A user's module with variables as attributes, in a list and in a dict; tied and traced."""

    def __init__(self):
        self.w = tf.Variable(inputs(4, 6), name="w")
        self.b = tf.Variable(inputs(6), name="b")
        self.hidden = [tf.Variable(inputs(6, 6) / 2, name=f"hidden_{i}") for i in range(2)]
        self.out = {"w": tf.Variable(inputs(6, 4), name="out_w"), "b": tf.Variable(tf.ones([1, 4]))}
        self.tied = self.w
        self.steps = tf.Variable(tf.zeros([2, 2]), trainable=False)

    @tf.function
    def __call__(self, x):
        x = tf.nn.relu(tf.matmul(x, self.w) + self.b)
        for w in self.hidden:
            x = tf.tanh(x @ w)
        x = x @ self.out["w"] * 2.0 + self.out["b"]
        return tf.matmul(x, self.tied)


def test_a_module_of_ones_own():
    model, x = Network(), inputs()
    expected = model(x)
    w = model.w
    assert tfwn.reparameterize(model) is model
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model.w.v is w
    assert model.tied is model.w
    names = sorted(variable.name for variable in model.trainable_variables)
    assert len(names) == 4 * 2 + 2
    assert sum("g:" in name for name in names) == 4
    np.testing.assert_allclose(model.w.g, np.linalg.norm(w.numpy(), axis=0), rtol=1e-6)

    # The function that was traced earlier reads g now.
    model.w.g.assign(2 * model.w.g)
    assert not np.allclose(model(x), expected)
    assert tfwn.fold(model) is model
    assert isinstance(model.w, tf.Variable)
    assert model.w is w
    assert len(model.trainable_variables) == 6
    assert not np.allclose(model(x), expected)


def test_fold_is_the_inverse_and_keeps_outputs():
    model, x = Network(), inputs()
    before = [variable.numpy() for variable in model.variables]
    tfwn.reparameterize(model)
    tfwn.fold(model)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_allclose(variable, old, rtol=1e-6, atol=1e-7)
    tfwn.reparameterize(model)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * tf.random.stateless_normal(variable.shape, [3, 4]))
    expected = model(x)
    tfwn.fold(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-6, atol=1e-6)


def test_gradients_reach_v_and_g_and_one_step_is_that_of_a_layer():
    class Linear(tf.Module):
        def __init__(self, w):
            self.w = tf.Variable(w)

        def __call__(self, x):
            return tf.matmul(x, self.w)

    w, x = inputs(4, 3), inputs()
    layer = tfwn.Dense(3, use_bias=False)
    layer.build(x.shape)
    layer.weight.assign(w)
    model = tfwn.reparameterize(Linear(w))
    for module, v, g in ((layer, layer.weight.v, layer.weight.g), (model, model.w.v, model.w.g)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(module(x) ** 2)
        for variable, gradient in zip((v, g), tape.gradient(loss, (v, g)), strict=True):
            variable.assign_sub(0.1 * gradient)
    np.testing.assert_allclose(model.w.v, layer.weight.v, rtol=1e-6)
    np.testing.assert_allclose(model.w.g, layer.weight.g, rtol=1e-6)


def test_what_stands_for_the_variable_reads_like_one():
    model = Network()
    w = model.w.numpy()
    tfwn.reparameterize(model)
    for value in (
        model.w.numpy(),
        np.asarray(model.w),
        tf.convert_to_tensor(model.w),
        model.w.value(),
        model.w.read_value(),
        model.w * 1.0,
        1.0 * model.w,
        model.w[:],
        tf.transpose(tf.transpose(model.w)),
        tf.stack([model.w])[0],
    ):
        np.testing.assert_allclose(value, w, rtol=1e-6)
    assert model.w.shape == w.shape
    assert model.w.dtype == tf.float32
    model.w.assign(2 * w)
    np.testing.assert_allclose(model.w.numpy(), 2 * w, rtol=1e-6)
    assert tf.cast(model.w, tf.float16).dtype == tf.float16


def test_select_and_axis():
    model = Network()
    tfwn.reparameterize(model, select=lambda v: v.name == "w:0", axis=0)
    assert model.w.g.shape == [4]
    assert all(isinstance(w, tf.Variable) for w in model.hidden)
    model = Network()
    tfwn.reparameterize(model, axis=lambda v: None if "hidden" in v.name else -1)
    assert model.hidden[0].g.shape == []
    assert model.w.g.shape == [6]


def test_units_of_one_element_are_not_normalized():
    class Depthwise(tf.Module):
        def __init__(self):
            self.pointwise = tf.Variable(inputs(1, 1, 4, 2))
            self.spatial = tf.Variable(inputs(3, 1, 4, 2))

    class Embed(tf.Module):
        def __init__(self):
            self.scalars, self.table = tf.Variable(inputs(5, 1)), tf.Variable(inputs(5, 2))

    model = tfwn.reparameterize(Depthwise())
    assert isinstance(model.pointwise, tf.Variable)
    assert model.spatial.g.shape == [4, 2]
    model = tfwn.reparameterize(Embed())
    assert isinstance(model.scalars, tf.Variable)
    assert model.table.g.shape == [5]
    assert tfwn.reparameterize(Depthwise(), axis=-1).pointwise.g.shape == [2]
    assert tfwn.reparameterize(Embed(), select=lambda v: v.shape[-1] == 1).scalars.g.shape == [5]


def test_dicts_keep_their_type(tmp_path):
    model = tf.Module()
    model.ordered = OrderedDict(a=tf.Variable(inputs()), b=tf.Variable(inputs()))
    model.counted = defaultdict(list, a=tf.Variable(inputs()))
    for change, cls in ((tfwn.reparameterize, NormalizedVariable), (tfwn.fold, tf.Variable)):
        change(model)
        model.ordered.move_to_end("a")
        assert [type(value) for value in model.counted["new"]] == []
        assert all(isinstance(value, cls) for value in model.ordered.values())
        assert isinstance(model.counted["a"], cls)
        path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
        tf.train.Checkpoint(model=model).restore(path).assert_consumed()


class Pair(NamedTuple):
    a: Any
    b: Any


def test_named_tuples_keep_their_type():
    model = tf.Module()
    model.pair = Pair(tf.Variable(inputs()), [tf.Variable(inputs())])
    for change, cls in ((tfwn.reparameterize, NormalizedVariable), (tfwn.fold, tf.Variable)):
        change(model)
        assert isinstance(model.pair, Pair)
        assert isinstance(model.pair.a, cls)
        assert isinstance(model.pair.b[0], cls)


def test_dicts_and_named_tuples_of_a_keras_model_keep_their_type():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = OrderedDict(a=keras.layers.Dense(3), b=keras.layers.Dense(3))
            self.pair = Pair(keras.layers.Dense(3), (keras.layers.Dense(3),))

        def call(self, x):
            return self.pair.b[0](self.pair.a(self.parts["b"](self.parts["a"](x))))

    model = Model()
    expected = model(inputs())
    for change in (tfwn.reparameterize, tfwn.fold):
        change(model)
        model.parts.move_to_end("a")
        assert isinstance(model.pair, Pair)
        for layer in (model.parts["a"], model.pair.a, model.pair.b[0]):
            assert isinstance(layer, WeightNormalization) == (change is tfwn.reparameterize)
        np.testing.assert_allclose(model(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_checkpoint_round_trip_and_conversion_from_a_plain_one(tmp_path):
    x = inputs()
    plain = Network()
    plain.w.assign_add(tf.ones([4, 6]))
    path = tf.train.Checkpoint(model=plain).save(tmp_path / "plain")
    model = Network()
    tf.train.Checkpoint(model=model).restore(path).assert_consumed()
    tfwn.reparameterize(model)
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-5, atol=1e-6)
    model.w.g.assign(model.w.g * 3)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "normalized")
    again = tfwn.reparameterize(Network())
    tf.train.Checkpoint(model=again).restore(path).assert_consumed()
    np.testing.assert_array_equal(again(x), model(x))


def test_sonnet():
    snt = pytest.importorskip("sonnet", exc_type=ImportError)

    class Model(snt.Module):
        def __init__(self):
            super().__init__()
            self.conv = snt.Conv2D(6, 3)
            self.norm = snt.BatchNorm(True, True)
            self.depthwise = snt.DepthwiseConv2D(3, channel_multiplier=2)
            self.up = snt.Conv2DTranspose(5, 3, stride=2)
            self.lstm = snt.LSTM(7)
            self.mlp = snt.nets.MLP([8, 3])
            self.embed = snt.Embed(5, 3)

        def __call__(self, x):
            x = self.depthwise(tf.nn.relu(self.norm(self.conv(x), is_training=False)))
            x = tf.reduce_mean(self.up(x), [1, 2])
            x, _ = snt.static_unroll(self.lstm, x[None], self.lstm.initial_state(x.shape[0]))
            return self.mlp(x[0]) + self.embed(tf.constant([1, 2]))

    model, x = Model(), inputs(2, 8, 8, 3)
    expected = model(x)
    count = len(model.trainable_variables)
    tfwn.reparameterize(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    # conv, depthwise, up, two of the LSTM, two of the MLP, embed; not batch norm.
    assert len(model.trainable_variables) == count + 8
    assert model.depthwise.w.g.shape == [6, 2]
    assert model.up.w.g.shape == [5]
    assert model.embed.embeddings.g.shape == [5]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(gradient is not None for gradient in gradients)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        variable.assign_sub(0.01 * tf.convert_to_tensor(gradient))
    expected = model(x)
    tfwn.fold(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(model.trainable_variables) == count


@pytest.mark.parametrize("exponential_g", [False, True])
def test_layers_of_tfwn(exponential_g, tmp_path):
    class Model(tf.Module):
        def __init__(self, parameterization):
            super().__init__()
            options = {"parameterization": parameterization, "exponential_g": exponential_g}
            mask = np.tril(np.ones([6, 5]))
            self.conv = tfwn.Conv2DTranspose(6, 3, compute_dtype=tf.float32, **options)
            self.masked = tfwn.Dense(5, kernel_mask=mask, activation="relu", **options)
            self.gru = tfwn.GRU(3, **options)

        @tf.function
        def __call__(self, x):
            x = self.masked(self.conv(x))
            return self.gru(tf.reshape(x, [x.shape[0], -1, 5]))

    x = inputs(2, 4, 4, 3)
    model = Model("normal")
    expected = model(x)
    tfwn.reparameterize(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model.masked.weight.parameterization == "weight_norm"
    assert len(model.trainable_variables) == 4 * 2 + 3
    names = {variable.name.rpartition("/")[2] for variable in model.gru.trainable_variables}
    assert names >= ({"s:0"} if exponential_g else {"g:0"})
    # Its checkpoint fits a model that was created with weight normalization.
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    other = Model("weight_norm")
    other(x)
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    np.testing.assert_allclose(other(x), expected, rtol=1e-5, atol=1e-6)

    for variable in model.trainable_variables:
        variable.assign_add(0.1 * tf.random.stateless_normal(variable.shape, [3, 4]))
    expected = model(x)
    tfwn.fold(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(model.trainable_variables) == 4 + 3
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    other = Model("normal")
    other(x)
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    np.testing.assert_array_equal(other(x), model(x))


def test_keras_models_with_operations():
    """A residual connection is an operation in the graph, not a layer."""
    kernel = keras.Input([6])
    hidden = keras.ops.relu(keras.layers.Dense(6)(kernel)) + kernel
    model = keras.Model(kernel, hidden * keras.layers.Dense(6)(hidden))
    x = inputs(4, 6)
    expected, count = model(x), len(model.trainable_variables)
    tfwn.reparameterize(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(model.trainable_variables) == count + 2
    tfwn.fold(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(model.trainable_variables) == count


def test_folding_a_keras_layer_leaves_its_wrapper_the_same_function():
    """This holds for g < 0 too, and the wrapper can be folded again."""
    wrapper = WeightNormalization(keras.layers.Dense(3))
    x = inputs(5, 4)
    wrapper(x)
    wrapper.g.assign([1.0, -2.0, 0.0])
    y = wrapper(x)
    for _ in range(2):
        np.testing.assert_allclose(tfwn.fold(wrapper)(x), y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(wrapper(x), y, rtol=1e-5, atol=1e-6)


def test_subclassed_keras_model_in_place():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(4)
            self.blocks = [keras.layers.Dense(4) for _ in range(2)]
            self.norm = keras.layers.LayerNormalization()

        def call(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    model, x = Model(), inputs()
    expected = model(x)
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)
    assert tfwn.reparameterize(model) is model
    assert isinstance(model.first, WeightNormalization)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(model.trainable_variables) == 3 * 3 + 2
    model.first.g.assign(2 * model.first.g)
    model.blocks[0].normalized[0].g.assign([1.0, 2.0, 3.0, 4.0])
    expected = model(x)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5)
    assert tfwn.fold(model) is model
    assert [type(layer) for layer in model.layers][:1] == [keras.layers.Dense]
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)


def test_keras_layers_around_wrappers_are_folded():
    inner = keras.layers.TimeDistributed(WeightNormalization(keras.layers.Dense(3)))
    model = keras.Sequential([inner, keras.layers.Dense(2)])
    x = inputs(2, 3, 4)
    expected = model(x)
    folded = tfwn.fold(model)
    assert isinstance(folded.layers[0].layer, keras.layers.Dense)
    np.testing.assert_allclose(folded(x), expected, rtol=1e-5, atol=1e-6)


def test_single_keras_layer():
    layer, x = keras.layers.Dense(3), inputs()
    expected = layer(x)
    wrapped = tfwn.reparameterize(layer)
    np.testing.assert_allclose(wrapped(x), expected, rtol=1e-5, atol=1e-6)
    assert tfwn.fold(wrapped) is layer


def test_under_a_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = Network()
    expected = model(inputs())
    tfwn.reparameterize(model)
    assert model.w.g.distribute_strategy is strategy
    np.testing.assert_allclose(model(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_deepcopy_of_a_reparameterized_module():
    model, x = tfwn.reparameterize(Network()), inputs()
    copied = copy.deepcopy(model)
    np.testing.assert_array_equal(copied(x), model(x))
    copied.w.g.assign(2 * copied.w.g)
    assert not np.allclose(copied(x), model(x))


def test_errors():
    for function in (tfwn.reparameterize, tfwn.fold):
        with pytest.raises(ValueError, match=r"needs a tf.Module or a Keras layer, got 3"):
            function(3)

    class Empty(tf.Module):
        def __init__(self):
            self.b = tf.Variable(tf.ones([4]), name="b")

    with pytest.raises(ValueError, match=r"no weight in Empty, whose variables are \['b:0'\]"):
        tfwn.reparameterize(Empty())
    with pytest.raises(ValueError, match="nothing weight-normalized in Network"):
        tfwn.fold(Network())
    for function, options in (
        (tfwn.fold, {}),
        (tfwn.reparameterize, {"parameterization": "normal"}),
    ):
        model = Network()
        model.layers = [tfwn.Dense(3, **options), tfwn.LSTM(2, **options)]
        model.layers[0](inputs())
        with pytest.raises(ValueError, match="'lstm_cell' in Network has no variables yet: call"):
            function(model)
        assert isinstance(model.w, tf.Variable)
        expected = options.get("parameterization", "weight_norm")
        assert model.layers[0].weight.parameterization == expected
    with pytest.raises(ValueError, match="nothing weight-normalized in 'dense"):
        tfwn.fold(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="is not built"):
        tfwn.reparameterize(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match=r"select and axis are for tf.Modules"):
        tfwn.reparameterize(keras.layers.Dense(3), axis=0)
    with pytest.raises(ValueError, match="found no weight"):  # Twice.
        tfwn.reparameterize(tfwn.reparameterize(Network()))
    model = Network()
    with pytest.raises(ValueError, match="axis must lie in"):
        tfwn.reparameterize(model, axis=5)
    assert isinstance(model.w, tf.Variable)
    model.forward = tf.function(lambda x: x @ model.w)
    model.forward(inputs())
    with pytest.raises(ValueError, match=r"the tf.function 'forward' of Network was traced"):
        tfwn.reparameterize(model)
    assert isinstance(model.w, tf.Variable)
