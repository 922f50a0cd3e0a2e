"""Tests which variables a wrapper normalizes, and how it passes on the layer's attributes."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import LAYERS, normal
from tfwn.keras import WeightNormalization

every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.parametrize("axis", [0, (0, 1), None])
def test_axis(axis):
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    before = np.asarray(layer.kernel)
    wrapped = WeightNormalization(layer, axis=axis)
    wrapped.build((None, 4))
    (normalized,) = wrapped.normalized
    shape = () if axis is None else tuple(np.atleast_1d((4, 3))[list(np.atleast_1d(axis))])
    assert tuple(normalized.g.shape) == shape
    np.testing.assert_allclose(normalized.w(), before, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="layer must be a Keras layer, got 3"):
        WeightNormalization(3)
    with pytest.raises(ValueError, match=r"tfwn.data_dependent_init\(model, batch\)"):
        WeightNormalization(keras.layers.Dense(3), data_init=True)
    with pytest.raises(ValueError, match="already"):
        WeightNormalization(WeightNormalization(keras.layers.Dense(3)))
    with pytest.raises(ValueError, match=r"no variable to normalize.*gamma"):
        WeightNormalization(keras.layers.BatchNormalization()).build((4, 3))
    with pytest.raises(ValueError, match=r"no variable to normalize.*weight_names"):
        WeightNormalization(keras.layers.Dense(3), weight_names=["w"]).build((4, 3))
    with pytest.raises(ValueError, match="constraint"):
        WeightNormalization(keras.layers.Dense(3, kernel_constraint="max_norm")).build((4, 3))
    with pytest.raises(ValueError, match="sums over no axis of its kernel"):
        WeightNormalization(keras.layers.EinsumDense("ab,b->ab", (3,))).build((4, 3))
    inner = keras.layers.TimeDistributed(WeightNormalization(keras.layers.Dense(3)))
    with pytest.raises(ValueError, match="wrap only one of the two"):
        WeightNormalization(inner).build((4, 3, 2))
    with pytest.raises(ValueError, match=r"axis must lie in \[-2, 2\)"):
        WeightNormalization(keras.layers.Dense(3), axis=2).build((4, 3))


def test_building_twice_is_refused():
    wrapper = WeightNormalization(keras.layers.Dense(3))
    wrapper.build((None, 4))
    with pytest.raises(ValueError, match=r"'dense.*' is built already"):
        wrapper.build((None, 4))


def test_names_that_no_variable_has_are_refused():
    lstm = dict(weight_names=["kernel", "recurent_kernel"])
    with pytest.raises(ValueError, match=r"names recurent_kernel, which.*recurrent_kernel"):
        WeightNormalization(keras.layers.LSTM(3), **lstm).build((2, 4, 3))
    with pytest.raises(ValueError, match=r"axis names kernal, which.*kernel, recurrent_kernel"):
        WeightNormalization(keras.layers.LSTM(3), axis={"kernal": 0}).build((2, 4, 3))
    axis = {"kernel": -1, "recurrent_kernel": -1}  # One table may serve several selections.
    wrapper = WeightNormalization(keras.layers.LSTM(3), weight_names=["kernel"], axis=axis)
    wrapper.build((2, 4, 3))
    assert [one.v.name for one in wrapper.normalized] == ["kernel"]


def test_a_replaced_kernel_is_refused():
    wrapper = WeightNormalization(keras.layers.Dense(3))
    x = normal(4, 8)
    wrapper(x)
    wrapper.g.assign(wrapper.g * 3)
    wrapper.layer.quantize("int8")
    with pytest.raises(RuntimeError, match=r"another variable than the .*kernel.*tfwn\.fold"):
        wrapper(x)


class InContainers(keras.layers.Layer):
    """A layer whose kernels are in a list and in a dict."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def build(self, shape):
        def kernel(name, rows):
            return self.add_weight((rows, 3), name=name)

        self.first = [kernel(self.names[0], shape[-1])]
        self.others = {"one": kernel(self.names[1], 3), "two": (kernel(self.names[2], 3),)}

    def call(self, x):
        return x @ self.first[0] @ self.others["one"] @ self.others["two"][0]


@pytest.mark.parametrize("selected", [["kernel_0", "kernel_2"], "kernel_1", None])
@pytest.mark.parametrize("how", ["wrapper", "reparameterize"])
def test_kernels_in_lists_and_dicts(selected, how):
    names = [f"kernel_{i}" for i in range(3)] if selected else ["kernel"] * 3
    layer, x = InContainers(names), normal(4, 8)
    expected = layer(x)
    if how == "wrapper":
        wrapper = WeightNormalization(layer, weight_names=selected)
    elif selected is None:
        wrapper = tfwn.reparameterize(layer)
    else:
        with pytest.raises(ValueError, match="found no weight"):
            tfwn.reparameterize(layer)
        return
    np.testing.assert_allclose(wrapper(x), expected, rtol=1e-4, atol=1e-5)
    wanted = 1 if isinstance(selected, str) else len(selected or names)
    assert len(wrapper.normalized) == wanted
    for one in wrapper.normalized:
        one.g.assign(one.g * 2)
    factor = 2**wanted
    np.testing.assert_allclose(wrapper(x), factor * expected, rtol=1e-4, atol=1e-5)
    w = x @ wrapper.first[0] @ wrapper.others["one"] @ wrapper.others["two"][0]
    np.testing.assert_allclose(w, factor * expected, rtol=1e-4, atol=1e-5)
    wrapper.layer.first = None
    if selected != "kernel_1":
        with pytest.raises(RuntimeError, match="another variable than"):
            wrapper(x)


def test_a_kernel_has_one_wrapper_at_a_time():
    layer = keras.layers.Dense(3, kernel_regularizer="l2")
    first, second = WeightNormalization(layer), WeightNormalization(layer)
    x = normal(4, 6)
    first(x)
    for use in (lambda: second(x), lambda: tfwn.reparameterize(layer)):
        with pytest.raises(ValueError, match=r"is normalized by the wrapper '.*fold\(\)"):
            use()
    first(x)
    copied = copy.deepcopy(first)
    tfwn.fold(copied)
    first.fold()
    second(x)
    tfwn.fold(second)
    wrapper = WeightNormalization(layer)
    wrapper(x)
    del wrapper  # Without fold(), which the next wrapper does not need then.
    last = WeightNormalization(layer)
    last(x)
    last.g.assign(last.g * 2)
    np.testing.assert_allclose(last.losses, [0.01 * 4 * tf.reduce_sum(layer.kernel**2)], rtol=1e-5)
    assert isinstance(last.fold().kernel.regularizer, keras.regularizers.L2)


# How a model reads the kernel w of one of its layers, in the dtype of the model's computation.
READS = {
    "transpose": lambda h, w, ids: h @ tf.transpose(w),
    "matmul": lambda h, w, ids: tf.matmul(h, w, transpose_b=True),
    "ops": lambda h, w, ids: keras.ops.matmul(h, keras.ops.transpose(w)),
    "value": lambda h, w, ids: h @ tf.transpose(w.value),
    "gather": lambda h, w, ids: h * tf.gather(w, ids),
    "dtype": lambda h, w, ids: tf.cast(h, w.dtype) * w.ndim,
    "assign": lambda h, w, ids: h + (w.assign(w * 2), tf.gather(w, ids))[1],
}


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_kernel_that_the_model_reads_is_autocast(how, policy):
    class Tied(keras.Model):
        def __init__(self):
            super().__init__(dtype=policy)
            self.embedding = keras.layers.Embedding(7, 4, dtype=policy)

        def call(self, ids):
            return READS[how](self.embedding(ids), self.embedding.embeddings, ids)

    model, ids = Tied(), tf.constant([[1, 2]])
    model(ids)
    before = model.embedding.embeddings.numpy()
    expected = model(ids)
    model.embedding.embeddings.assign(before)  # Undoes the assignment in the call.
    tfwn.reparameterize(model)
    (one,) = model.embedding.normalized
    one.v.assign(one.v * 1e-9)  # w stays the same, although this v would be 0 in float16.
    found = model(ids)
    assert found.dtype == expected.dtype
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}.get(expected.dtype.name, 1e-5)
    a, b = (tf.cast(t, "float32") for t in (found, expected))
    np.testing.assert_allclose(a, b, tolerance, tolerance)
    assert model.embedding.embeddings.dtype == "float32"
    if how != "assign":
        np.testing.assert_allclose(one.w(), before, rtol=1e-6)


@every_layer
def test_attributes_of_the_layer(name):
    """The wrapper passes on the layer's attributes, properties and methods, which see w."""

    class Extended(type(LAYERS[name][0]())):
        receptive_field = 7

        @property
        def total(self):
            return sum(float(tf.reduce_sum(v)) for v in self.weights)

        def method(self):
            return self.total

    make, x, _ = LAYERS[name]
    plain = make()
    plain.__class__ = Extended
    wrapper = WeightNormalization(plain)
    wrapper(x)
    for one in wrapper.normalized:
        one.g.assign(one.g * 2)
    kernels = sum(float(tf.reduce_sum(one.v)) for one in wrapper.normalized)
    assert wrapper.receptive_field == 7
    # Each kernel is twice v.
    np.testing.assert_allclose(wrapper.total, plain.total + kernels, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(wrapper.method(), wrapper.total)
    if name in ("dense", "conv"):
        np.testing.assert_allclose(wrapper.kernel, 2 * wrapper.layer.kernel.numpy(), rtol=1e-5)
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018


@every_layer
def test_attributes_are_set_in_the_layer(name):
    class Extended(type(LAYERS[name][0]())):
        axis, g, extra = "the layer's", "the layer's", 0

    layer = LAYERS[name][0]()
    layer.__class__ = Extended
    wrapper = WeightNormalization(layer)
    wrapper(LAYERS[name][1])
    wrapper.extra = 2
    assert layer.extra == 2
    assert (layer.axis, layer.g, wrapper.axis) == ("the layer's", "the layer's", "auto")
    wrapper.another = 3
    assert not hasattr(layer, "another")


def test_a_set_activation_is_used():
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3, activation="softmax")])
    x = normal(4, 6)
    tfwn.reparameterize(model)
    model.layers[-1].activation = keras.activations.linear
    expected = tf.matmul(x, tf.convert_to_tensor(model.layers[-1].kernel))
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable("tests")
class Doubled(WeightNormalization):
    """A subclass with its own `call`."""

    def call(self, x):
        return 2 * super().call(x)


class Own(WeightNormalization):
    """A subclass with attributes that the layer has, too."""

    def __init__(self, layer, **kwargs):
        super().__init__(layer, **kwargs)
        self.units, self.activation = 7, None


def test_attributes_of_a_subclass_are_its_own():
    wrapper = Own(keras.layers.Dense(3, "relu"))
    assert wrapper(normal(4, 6)).shape == (4, 3)
    assert (wrapper.units, wrapper.activation) == (7, None)
    assert (wrapper.layer.units, wrapper.layer.activation) == (3, keras.activations.relu)


def test_subclasses_may_have_their_own_call(tmp_path):
    x = normal(4, 6)
    model = keras.Sequential([keras.Input([6]), Doubled(keras.layers.Dense(3))])
    wrapper = model.layers[0]
    wrapper.g.assign(wrapper.g * 3)
    plain = tf.matmul(x, tf.convert_to_tensor(wrapper.kernel))
    np.testing.assert_allclose(model(x), 2 * plain, rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), model(x))
