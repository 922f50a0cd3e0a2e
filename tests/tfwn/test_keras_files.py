"""Tests saving and loading Keras models: wrapped and converted ones, and old files."""

import importlib.util
import json
import pathlib
import pickle
import tarfile
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import LAYERS, Attention, normal
from tfwn.keras import WeightNormalization

every_layer = pytest.mark.parametrize("name", LAYERS)
OLD = pathlib.Path(__file__).parents[1] / "data" / "keras_0_1_0"


@pytest.fixture(autouse=True)
def _classes():
    with keras.saving.custom_object_scope({"Attention": Attention, "Block": Block}):
        yield


def model_of(layer, x):
    inputs = keras.Input(x.shape[1:], dtype=x.dtype)
    return keras.Model(inputs, layer(inputs))


def move(model):
    for i, variable in enumerate(model.variables):
        if "float" in variable.dtype:
            variable.assign_add(0.3 * tf.random.stateless_normal(variable.shape, [i, 3]))


def version(text):
    return tuple(map(int, text.split(".")[:2]))


@pytest.fixture
def old(tmp_path):
    """The files that a version before 0.1.0's release saved, and the module that created them."""
    with tarfile.open(OLD / "saved.tar.xz") as files:
        files.extractall(tmp_path, filter="data")
    spec = importlib.util.spec_from_file_location("make", OLD / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tmp_path, module


@pytest.mark.parametrize("kind", ["keras", "weights.h5", "checkpoint"])
@pytest.mark.parametrize("name", ["feed_forward", "recurrent"])
def test_old_files_load(name, kind, old):
    folder, module = old
    x, expected = module.inputs_of_all(), np.load(folder / f"{name}.npz")
    if kind == "keras":
        with zipfile.ZipFile(folder / f"{name}.keras") as file:
            saved_by = json.loads(file.read("metadata.json"))["keras_version"]
        if version(saved_by) > version(keras.__version__):
            pytest.skip(f"Keras {keras.__version__} cannot load a file from Keras {saved_by}")
        model = keras.models.load_model(folder / f"{name}.keras")
    else:
        model = module.MODELS[name]()
    if kind == "weights.h5":
        model.load_weights(folder / f"{name}.weights.h5")
    if kind == "checkpoint":
        status = tf.train.Checkpoint(model=model).read(str(folder / name))
        status.assert_existing_objects_matched()
    np.testing.assert_allclose(model(x), expected["outputs"], rtol=1e-5, atol=1e-6)
    assert tfwn.is_initialized(model) == (name == "feed_forward")
    if name == "recurrent":
        assert model.layers[-1].trainable_variables == []
        model.layers[-1].trainable = True
        assert len(model.layers[-1].trainable_variables) == 3
        model.layers[-1].trainable = False
    if kind == "keras":  # Includes the state of the optimizer.
        model.train_on_batch(x, np.ones(expected["outputs"].shape, "float32"))
        np.testing.assert_allclose(model(x), expected["after_a_step"], rtol=1e-4, atol=1e-6)


@every_layer
@pytest.mark.parametrize("how", ["wrapper", "reparameterize"])
def test_every_kind_of_file(name, how, tmp_path):
    make, x, _ = LAYERS[name]

    def fresh():
        if how == "wrapper":
            return model_of(WeightNormalization(make()), x)
        return tfwn.reparameterize(model_of(make(), x))

    model = fresh()
    move(model)
    expected = model(x)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), expected)
    others = [fresh() for _ in range(3)]
    others[0].load_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model=others[1]).restore(path).assert_existing_objects_matched()
    others[2].set_weights(model.get_weights())
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    from_json = keras.models.model_from_json(model.to_json())
    from_json.set_weights(model.get_weights())
    for other in (*others, clone, from_json):
        np.testing.assert_array_equal(other(x), expected)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("kind", ["keras", "weights.h5", "checkpoint"])
@pytest.mark.parametrize("name", ["dense", "conv", "transposed", "einsum", "attention"])
def test_the_mark_is_saved(name, kind, built, tmp_path):
    make, x, _ = LAYERS[name]
    model = keras.Sequential([WeightNormalization(make())])
    model(x)
    if name == "attention":
        for one in model.layers[0].normalized:
            one.owner.bias.assign_add(tf.ones(one.owner.bias.shape))
        model.layers[0].initialized.assign(True)
    else:
        tfwn.data_dependent_init(model, x)
    other = keras.Sequential([WeightNormalization(make())])
    if built:
        other(x)
        assert not tfwn.is_initialized(other)
    if kind == "checkpoint":
        path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
        tf.train.Checkpoint(model=other).restore(path)
    elif kind == "keras":
        model.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
    else:
        other(x)
        model.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
    if not tfwn.is_initialized(other):
        tfwn.data_dependent_init(other, 2 * x)
    np.testing.assert_allclose(other(x), model(x), rtol=1e-6, atol=1e-6)


def test_restore_or_initialize(tmp_path):
    """The documented way to resume works for a model that is built in its first call."""
    x = normal(100, 6)
    outputs = []
    for factor in (1, 2):
        model = keras.Sequential([WeightNormalization(keras.layers.Dense(3)) for _ in range(2)])
        manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=model),
            str(tmp_path),
            max_to_keep=1,
            init_fn=lambda model=model, factor=factor: tfwn.data_dependent_init(model, factor * x),
        )
        manager.restore_or_initialize()
        outputs.append(model(x))
        assert tfwn.is_initialized(model)
        manager.save()
    np.testing.assert_array_equal(*outputs)


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A layer without build()."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.inner = layer

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        return super().get_config() | {"layer": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("layer")), **config)


@every_layer
@pytest.mark.parametrize("how", ["wrapped unbuilt", "wrapped built", "reparameterize"])
@pytest.mark.filterwarnings("ignore:.build\\(\\). was called on layer:UserWarning")
def test_layers_without_build(name, how, tmp_path):
    make, x, kernels = LAYERS[name]
    block = Block(Block(make()))
    if how == "reparameterize":
        model = tfwn.reparameterize(model_of(block, x))
        wrapper = model.layers[-1]
    else:
        expected = block(x) if how == "wrapped built" else None
        wrapper = WeightNormalization(block)
        np.testing.assert_allclose(wrapper(x), block(x), atol=2e-6)
        if expected is not None:
            np.testing.assert_allclose(wrapper(x), expected, atol=2e-6)
        model = model_of(wrapper, x)
    assert len(wrapper.normalized) == kernels
    move(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(x), model(x))


@pytest.mark.parametrize("name", ["dense", "einsum", "embedding", "conv"])
@pytest.mark.parametrize("first", ["wrapper", "lora"])
def test_lora(name, first, tmp_path):
    make, x, _ = LAYERS[name]
    layer = make()
    layer(x)
    if first == "lora":
        layer.enable_lora(2)
    model = model_of(WeightNormalization(layer), x)
    wrapper = model.layers[-1]
    wrapper.g.assign(wrapper.g * 2 + 1)
    if first == "wrapper":
        wrapper.enable_lora(2)
    factors = [v for v in layer.trainable_variables if "lora" in v.name]
    assert len(factors) == 2
    for v in factors:
        v.assign(tf.random.stateless_normal(v.shape, [4, 5]))
    # The frozen kernel has a frozen g.
    trained = {v.name for v in wrapper.trainable_variables}
    assert trained == {v.name for v in factors} | ({"bias"} if name != "embedding" else set())
    plain = getattr(make(), "kernel_regularizer", None)
    assert plain is None
    expected = model(x)
    # The low-rank part is added to w, not to v.
    kernel = np.asarray(wrapper.kernel if name != "embedding" else wrapper.embeddings)
    assert np.abs(kernel - np.asarray(wrapper.normalized[0].w())).max() > 0.1

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-5, atol=1e-5)
    without = model_of(WeightNormalization(make()), x)
    without.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(without(x), expected, rtol=1e-5, atol=1e-5)
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=loaded).restore(path).assert_existing_objects_matched()
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tfwn.fold(model)(x), expected, rtol=1e-5, atol=1e-5)


class Wraps(keras.layers.Layer):
    """A layer whose constructor wraps another layer."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = WeightNormalization(keras.layers.Dense(units))

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return super().get_config() | {"units": self.units}


class Net(keras.Model):
    """A subclassed model with its own constructor, which creates plain or wrapped layers."""

    def __init__(self, units, wrap=False, **kwargs):
        super().__init__(**kwargs)
        around = WeightNormalization if wrap else lambda layer: layer
        self.units, self.wrap = units, wrap
        self.first = around(keras.layers.Dense(units))
        self.blocks = [around(keras.layers.Dense(units)) for _ in range(2)]

    def call(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x

    def get_config(self):
        return super().get_config() | {"units": self.units, "wrap": self.wrap}


class OwnFunctional(keras.Model):
    """A functional model with its own constructor."""

    def __init__(self, units, **kwargs):
        inputs = keras.Input([8])
        x = keras.layers.Dense(units, name="hidden")(inputs)
        super().__init__(inputs, keras.layers.Dense(2)(x), **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units, "name": self.name}


OWN = {
    "layer that wraps": lambda: model_of(Wraps(4), normal(4, 8)),
    "model that wraps": lambda: Net(4, wrap=True),
    "model": lambda: Net(4),
    "functional": lambda: OwnFunctional(4),
}
# As in a script that registers them with Keras.
OWN_CLASSES = {"Wraps": Wraps, "Net": Net, "OwnFunctional": OwnFunctional}


@pytest.mark.parametrize("name", OWN)
def test_files_of_models_that_make_their_own_layers(name, tmp_path):
    """A file records that a model was converted, since the constructor creates plain layers."""
    x = normal(4, 8)
    model = OWN[name]()
    model(x)
    cls = type(model)
    if "wraps" not in name:
        assert tfwn.reparameterize(model) is model
    assert isinstance(model, cls)
    move(model)
    for _ in range(2):  # Normalized, then folded.
        model.compile("adam", "mse")
        model.fit(x, model(x) + 1, verbose=0)
        expected = model(x)
        model.save(tmp_path / "model.keras")
        with keras.saving.custom_object_scope(OWN_CLASSES):
            loaded = keras.models.load_model(tmp_path / "model.keras")
        assert isinstance(loaded, cls)
        assert len(loaded.trainable_variables) == len(model.trainable_variables)
        np.testing.assert_allclose(loaded(x), expected, rtol=1e-6)
        loaded.fit(x, model(x), verbose=0)
        tfwn.fold(model) if _ == 0 else None
    if "wraps" not in name:
        assert type(model) is cls


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_copies_of_models_that_make_their_own_layers(folded, registered, tmp_path):
    class Local(Net):
        def get_config(self):
            return super().get_config() | {"layer": 1}  # A name that tfwn might use.

        @classmethod
        def from_config(cls, config):
            config.pop("layer")
            return cls(**config)

    x = normal(4, 8)
    if registered:
        keras.saving.register_keras_serializable("tests")(Local)
    model = Local(4, wrap=folded)
    model(x)
    (tfwn.fold if folded else tfwn.reparameterize)(model)
    model.save(tmp_path / "model.keras")
    copies = [keras.models.clone_model(model)]
    for cls in (Local, type(model)):
        objects = {"Local": cls}
        copies.append(keras.models.load_model(tmp_path / "model.keras", custom_objects=objects))
    inputs = keras.Input([8])
    copies.append(keras.models.clone_model(keras.Model(inputs, model(inputs))).layers[1])
    for copy in copies:
        copy.set_weights(model.get_weights())
        np.testing.assert_allclose(copy(x), model(x), rtol=1e-6)
        assert type(copy.first) is type(model.first)


def test_models_whose_classes_have_the_same_name(tmp_path):
    """A class that is not registered cannot be found, and none may take its place."""

    def model(activation):
        class Same(keras.Model):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.layer = keras.layers.Dense(3, activation)

            def call(self, x):
                return self.layer(x)

        return Same()

    x = normal(4, 8)
    models = [model("relu"), model("tanh")]
    for one in models:
        one(x)
        tfwn.reparameterize(one)
    models[0].save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match="Could not locate class 'Same'"):
        keras.models.load_model(tmp_path / "model.keras")
    for one in models:
        clone = keras.models.clone_model(one)
        clone(x)
        clone.set_weights(one.get_weights())
        np.testing.assert_array_equal(clone(x), one(x))


@keras.saving.register_keras_serializable("tests")
class Pickled(Net):
    """A model that pickle finds in this module."""


@pytest.mark.parametrize("folded", [False, True])
def test_pickle(folded):
    x, model = normal(4, 8), Pickled(4, wrap=folded)
    model(x)
    (tfwn.fold if folded else tfwn.reparameterize)(model)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again(x), model(x), rtol=1e-6)
    assert type(again.first) is type(model.first)


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_a_file_of_a_plain_model_is_refused_by_a_normalized_one(tmp_path):
    x = normal(4, 8)
    plain = model_of(keras.layers.Dense(3), x)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = model_of(WeightNormalization(keras.layers.Dense(3)), x)
    with pytest.raises(ValueError, match=r"tfwn\.reparameterize"):
        model.load_weights(tmp_path / "plain.weights.h5")
