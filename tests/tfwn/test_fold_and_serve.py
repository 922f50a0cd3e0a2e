"""Tests that SavedModels of folded models serve where tfwn is not installed."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import normal

LOAD = """
import sys
sys.modules["tfwn"] = None  # An import fails, where tfwn is installed too.
import numpy as np
import tensorflow as tf
folder, = sys.argv[1:]
model = tf.saved_model.load(folder)
serve = model.signatures["serving_default"]
(name,) = serve.structured_input_signature[1]
(y,) = serve(**{name: tf.constant(np.load(folder + "/x.npy"))}).values()
np.testing.assert_allclose(y, np.load(folder + "/y.npy"), rtol=1e-5, atol=1e-6)
print("served")
"""


def check_serves_without_tfwn(folder, x, y):
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    command = [sys.executable, "-I", "-c", LOAD, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "served\n", result.stderr[-2000:]


@pytest.mark.parametrize("kind", ["module", "layers"])
def test_a_folded_saved_model_serves_without_tfwn(kind, tmp_path):
    class Network(tf.Module):
        def __init__(self):
            self.w = tf.Variable(normal(4, 6))
            self.hidden = [tf.Variable(normal(6, 6) / 2)]

        @tf.function
        def __call__(self, x):
            return tf.tanh(tf.matmul(x, self.w)) @ self.hidden[0]

    class Layers(tf.Module):
        def __init__(self):
            self.layers = [tfwn.Dense(6, activation="relu"), tfwn.Dense(4)]

        @tf.function
        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    x = normal(5, 4)
    if kind == "layers":
        model = Layers()
        tfwn.data_dependent_init(model, x)
    else:
        model = tfwn.reparameterize(Network())
        model.w.g.assign(model.w.g * 2)
    y = model(x)
    tfwn.fold(model)
    signature = model.__call__.get_concrete_function(tf.TensorSpec([None, 4]))
    tf.saved_model.save(model, str(tmp_path / "saved"), signatures=signature)
    check_serves_without_tfwn(tmp_path / "saved", x, y)


def keras_model():
    kernel = keras.layers.Input((6, 4))
    x = keras.layers.Conv1D(8, 3, activation="relu")(kernel)
    x = keras.layers.BatchNormalization()(x)
    shared = keras.layers.Dense(8)
    x = shared(shared(x))
    x = keras.Sequential([keras.layers.Dense(5), keras.layers.Dropout(0.1)])(x)
    x = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))(x)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(kernel, keras.layers.Dense(2)(keras.layers.Flatten()(x)))


def test_functional_keras_model(tmp_path):
    x = normal(3, 6, 4)
    model = keras_model()
    expected = model(x)
    count = len(model.trainable_variables)
    types = [type(layer) for layer in model.layers]
    assert tfwn.reparameterize(model) is model
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    # conv, shared, inner dense, 4 of the LSTMs, 4 of attention, dense
    assert len(model.trainable_variables) == count + 12
    model.compile("adam", "mse")
    model.fit(x, tf.zeros([3, 2]), epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    y = model(x)
    assert tfwn.fold(model) is model
    np.testing.assert_allclose(model(x), y, rtol=1e-4, atol=1e-5)
    assert [type(layer) for layer in model.layers] == types
    model.export(tmp_path / "export", verbose=False)
    check_serves_without_tfwn(tmp_path / "export", x, y)
