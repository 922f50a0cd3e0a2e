"""Tests tfwn's own layers with any Keras: Keras' names, other backends, Keras 2."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tfwn.activations import _ACTIVATIONS, get_activation
from tfwn.initializers import _INITIALIZERS, initial_value

X = np.linspace(-7, 7, 96, dtype=np.float32).reshape(2, 6, 8)


@pytest.mark.parametrize("name", sorted(_ACTIVATIONS.keys() - {"sparsemax"}))
def test_activations_are_those_of_keras(name):
    np.testing.assert_allclose(
        get_activation(name)(X), keras.activations.get(name)(tf.constant(X)), rtol=1e-5, atol=1e-6
    )


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Not compared with Keras, whose sparsemax sums to 0 in some rows."""
    y = get_activation("sparsemax")(tf.constant(X)).numpy()
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(get_activation("sparsemax")(tf.constant([[0.1, 0.5]])), [[0.3, 0.7]])
    np.testing.assert_allclose(get_activation("sparsemax")(tf.constant([[3.0, 0.0]])), [[1.0, 0.0]])


@pytest.mark.parametrize("name", sorted(_INITIALIZERS))
def test_initializers_are_those_of_keras(name):
    shape = (40, 50) if name == "identity" else (3, 3, 40, 50)
    ours = initial_value(name, shape, tf.float32).numpy()
    theirs = np.asarray(keras.initializers.get(name)(shape, dtype="float32"))
    np.testing.assert_allclose(ours.mean(), theirs.mean(), atol=0.05 * theirs.std() + 1e-6)
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.03)
    # Tells truncated normal distributions, which end at 2.3 standard deviations, from normal ones.
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.3)


def test_class_names_and_unknown_names():
    assert initial_value("GlorotUniform", [2, 3], tf.float16).dtype == tf.float16
    with pytest.raises(ValueError, match=r"an initializer must be .* got 'glorot'"):
        tfwn.Dense(2, kernel_initializer="glorot")(tf.ones([1, 2]))
    with pytest.raises(ValueError, match=r"activation must be .* got 'rellu'"):
        tfwn.Dense(2, activation="rellu")


def run(code, **environment):
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
    )


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_backend(backend):
    pytest.importorskip(backend, reason=f"needs {backend} as Keras' backend")
    run(
        """
import os
import keras, tensorflow as tf, tfwn
assert keras.backend.backend() == os.environ["KERAS_BACKEND"]
x = tf.ones([2, 6, 3])
layers = [tfwn.LSTM(3), tfwn.GRU(3), tfwn.SimpleRNN(3), tfwn.Conv1D(3, 2, activation="gelu"),
          tfwn.Conv1DTranspose(3, 2, kernel_initializer="he_normal"),
          tfwn.Dense(2, "relu", kernel_initializer=keras.initializers.HeNormal())]
for layer in layers:
    assert isinstance(layer(x), tf.Tensor), layer
    tfwn.fold(layer)
    tfwn.reparameterize(layer)
dense = tfwn.Dense(2, "elu")
y = tfwn.data_dependent_init(dense, tf.random.normal([100, 3]))
assert isinstance(y, tf.Tensor) and tfwn.is_initialized(dense)
assert isinstance(tfwn.Embedding(3, 4)(tf.constant([1])), tf.Tensor)
try:
    tfwn.reparameterize(keras.layers.Dense(2))
except ImportError as error:
    assert "KERAS_BACKEND=tensorflow" in str(error), error
else:
    raise AssertionError
""",
        KERAS_BACKEND=backend,
    )


def test_keras_2_is_refused_by_name():
    pytest.importorskip("tf_keras", reason="needs Keras 2")
    run(
        """
import tensorflow as tf, tf_keras, tfwn
model = tf_keras.Sequential([tf_keras.layers.Dense(4, input_shape=(6,))])
class Holder(tf.Module):
    def __init__(self):
        self.inner = [model]
    def __call__(self, x):
        return self.inner[0](x)
x = tf.ones([8, 6])
for call in (lambda: tfwn.reparameterize(model), lambda: tfwn.reparameterize(Holder()),
             lambda: tfwn.fold(model), lambda: tfwn.data_dependent_init(model, x),
             lambda: tfwn.keras.WeightNormalization(tf_keras.layers.Dense(2))):
    try:
        call()
    except TypeError as error:
        assert "Keras 2" in str(error), error
    else:
        raise AssertionError
class Layer(tf_keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = tfwn.Dense(3)
    def call(self, x):
        return self.dense(x)
layer = Layer()
layer(x)
assert len(layer.trainable_variables) == 3
tfwn.fold(layer)
assert len(layer.trainable_variables) == 2
"""
    )


@pytest.mark.parametrize("dtype", ["int8", "int8_from_float32", "float8_e4m3fn", tf.qint8, 3.5])
@pytest.mark.parametrize(
    "make", [tfwn.Dense, tfwn.LSTM, tfwn.GRUCell, lambda n, **o: tfwn.Embedding(n, n, **o)]
)
def test_quantized_types_are_refused(make, dtype):
    for name in ("dtype", "compute_dtype"):
        with pytest.raises(ValueError, match=rf"^{name} must be float16, .* tfwn\.fold"):
            make(3, **{name: dtype})


def test_quantized_types_of_mean_only_batch_normalization():
    with pytest.raises(ValueError, match="dtype must be float16"):
        tfwn.MeanOnlyBatchNormalization(dtype="int8")


def test_type_checkers_see_the_options(tmp_path):
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import tfwn\n"
        "tfwn.Dense(3, 'relu', exponential_g=True, name='a')\n"
        "tfwn.LSTM(3, kernel_initializer='zeros', return_sequences=True, dtype='float64')\n"
        "tfwn.Dense(3, exponential=True)\n"
        "tfwn.Conv2DTranspose(3, 3, kernel_init='zeros')\n"
        "tfwn.LSTM(3, parametrization='normal')\n"
        "tfwn.Embedding(3, 4, mask=True)\n"
        "tfwn.Dense(3, parameterization='batch_norm')\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(tfwn.__file__)))
    out, err, _ = api.run(
        ["--config-file", f"{root}/pyproject.toml", "--cache-dir", str(tmp_path), str(program)]
    )
    lines = [line for line in out.splitlines() if "error:" in line]
    assert [int(line.split(":")[1]) for line in lines] == [4, 5, 6, 7, 8], out + err
