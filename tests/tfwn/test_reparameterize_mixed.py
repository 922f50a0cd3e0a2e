"""Tests tfwn.reparameterize and tfwn.fold on tf.Modules that contain Keras layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import normal
from tfwn.keras import WeightNormalization
from tfwn.normalized_variable import NormalizedVariable


class Mixed(tf.Module):
    """Has a variable, a Keras layer and a Keras model that also contains this layer."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(normal(3, 2), name="w")
        self.dense = keras.layers.Dense(3)
        self.parts = {"model": keras.Sequential([keras.Input([4]), self.dense])}

    def __call__(self, x):
        return self.parts["model"](x) @ self.w


def check_unchanged(model):
    assert isinstance(model.w, tf.Variable)
    assert isinstance(model.dense, keras.layers.Dense)
    assert model.parts["model"].layers == [model.dense]


def test_layers_of_a_module_are_changed_together():
    model, x = Mixed(), normal(5, 4)
    expected = model(x)
    assert tfwn.reparameterize(model) is model
    assert isinstance(model.w, NormalizedVariable)
    assert isinstance(model.dense, WeightNormalization)
    assert model.parts["model"].layers == [model.dense]
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    tfwn.fold(model)
    check_unchanged(model)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)


def test_a_module_whose_only_weights_are_in_a_keras_model():
    module = tf.Module()
    module.model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])
    tfwn.reparameterize(module)
    assert isinstance(module.model.layers[0], WeightNormalization)
    tfwn.fold(module)
    assert isinstance(module.model.layers[0], keras.layers.Dense)


def add_trace(model):
    model.forward = tf.function(lambda x: model(x))
    model.forward(normal(5, 4))


def add_unbuilt(model):
    model.last = keras.layers.Dense(2)


def add_constraint(model):
    model.last = keras.layers.Dense(2, kernel_constraint="non_neg")
    model.last.build([None, 2])


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (add_trace, {}, "'forward' of Mixed was traced"),
        (add_unbuilt, {}, "'Mixed' is not built: dense"),
        (add_constraint, {}, "has the constraint"),
        (None, {"select": lambda v: True}, "select and axis are for .* the Keras layer 'dense"),
        (None, {"axis": 0}, "select and axis are for .* the Keras layer 'dense"),
        (None, {"kernel_mask": lambda v: None}, "kernel_mask returned no mask"),
        (None, {"kernel_mask": lambda v: np.ones([7, 7])}, "mask"),
    ],
    ids=["trace", "unbuilt", "constraint", "select", "axis", "no mask", "mask"],
)
def test_a_refused_module_stays_as_it_was(prepare, options, message):
    model, x = Mixed(), normal(5, 4)
    if prepare:
        prepare(model)
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        tfwn.reparameterize(model, **options)
    check_unchanged(model)
    np.testing.assert_array_equal(model(x), expected)


def test_a_module_that_fold_refuses_stays_as_it_was():
    model, x = tfwn.reparameterize(Mixed()), normal(5, 4)
    v = model.w.v.numpy()
    model.w.g.assign([0.0, -1.0])
    expected = model(x)
    add_trace(model)
    with pytest.raises(ValueError, match="'forward' of Mixed was traced"):
        tfwn.fold(model)
    assert isinstance(model.dense, WeightNormalization)
    np.testing.assert_array_equal(model.w.v, v)
    np.testing.assert_array_equal(model(x), expected)


def test_select_works_beside_keras_layers_that_are_wrapped_or_have_no_kernel():
    model = tf.Module()
    model.w = tf.Variable(normal(3, 2))
    model.dropout = keras.layers.Dropout(0.1)
    model.norm = keras.layers.BatchNormalization()
    model.norm.build([None, 3])
    model.lstm = WeightNormalization(keras.layers.LSTM(2), weight_names=["kernel"])
    model.lstm(normal(2, 3, 4))
    tfwn.reparameterize(model, select=lambda v: True, axis=0)
    assert model.w.g.shape == [3]
    assert len(model.lstm.normalized) == 1
