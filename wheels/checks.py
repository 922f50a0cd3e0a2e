"""Checks an installed wheel; `wheels/try_out.py` runs this file in a fresh environment.

Prints a line for each check that passes.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

COMPILERS = ("g++", "gcc", "c++", "cc", "clang", "clang++", "nvcc", "cmake", "make")
found = [name for name in COMPILERS if shutil.which(name)]
assert not found, f"on PATH: {found}"
print("passed: no compiler on PATH", flush=True)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import tfwn  # noqa: E402

assert "site-packages" in tfwn.__file__, tfwn.__file__
print("passed: import", flush=True)

keras.utils.set_random_seed(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=[64, 8, 8, 3]).astype(np.float32)
LABELS = (IMAGES.mean((1, 2, 3)) > 0).astype(np.int32)


def keras_model():
    """A small classifier with weight normalization in every layer."""
    layers = [keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Dense(2)]
    conv, dense = (tfwn.keras.WeightNormalization(layer) for layer in layers)
    pool = keras.layers.GlobalAveragePooling2D()
    model = keras.Sequential([keras.Input([8, 8, 3]), conv, pool, dense])
    model.compile(
        keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def check_trained_step():
    """One training step in Keras."""
    assert np.isfinite(keras_model().train_on_batch(IMAGES, LABELS))


# Expected values, by hand: ||v|| = 5, grad_g = 3 / 5, grad_v = 10 / 5 * ([1, 0] - grad_g / 5 * v).
def check_op():
    """Values and gradients eagerly, in a graph and under XLA; the kernels without TensorFlow."""
    v, g = np.array([[3], [4]], np.float32), np.array([10], np.float32)

    def w_and_gradients(v, g):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g)
        return w, *tape.gradient(w, [v, g], tf.constant([[1.0], [0.0]]))

    compiled = (tf.function(w_and_gradients, jit_compile=jit) for jit in (False, True))
    for function in (w_and_gradients, *compiled):
        w, grad_v, grad_g = function(tf.constant(v), tf.constant(g))
        np.testing.assert_allclose(w, [[6], [8]], rtol=1e-6)
        np.testing.assert_allclose(grad_v, [[1.28], [-0.96]], rtol=1e-6)
        np.testing.assert_allclose(grad_g, [0.6], rtol=1e-6)

    from tfwn import native

    np.testing.assert_allclose(native.weight_norm(v, g)[0], [[6], [8]], rtol=1e-6)
    assert native.build_info()["tensorflow"].split(".")[:2] == tf.__version__.split(".")[:2]


def check_keras_fit():
    """`fit` lowers the loss, with and without XLA."""
    for jit in (False, True):
        model = keras_model()
        model.jit_compile = jit
        losses = model.fit(IMAGES, LABELS, epochs=8, verbose=0).history["loss"]
        assert losses[-1] < losses[0], losses


def check_layers():
    """Layers for tf.Module: data-dependent initialization, then a step of gradient descent."""

    class Network(tf.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm, self.dense = tfwn.Conv2D(4, 3), tfwn.LSTM(5), tfwn.Dense(1)

        def __call__(self, images):
            x = self.conv(images)
            return self.dense(self.lstm(tf.reshape(x, [x.shape[0], -1, 4])))

    model = Network()
    tfwn.data_dependent_init(model.conv, IMAGES)
    np.testing.assert_allclose(tf.math.reduce_std(model.conv(IMAGES), [0, 1, 2]), 1, rtol=1e-3)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(IMAGES) - 1.0))
        gradients = tape.gradient(loss, model.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.01 * gradient)
        return loss

    first = step()
    assert step() < first


SERVE = """
import sys
import numpy as np
import tensorflow as tf
folder = sys.argv[1]
assert "tfwn" not in sys.modules
server = tf.saved_model.load(folder + "/exported")
outputs = server.serve(tf.constant(np.load(folder + "/images.npy")))
np.testing.assert_allclose(outputs, np.load(folder + "/outputs.npy"), rtol=1e-4, atol=1e-5)
"""


def check_saved_model():
    """A folded model, served by a process without tfwn, and one with the op, loaded with tfwn."""
    model = keras_model()
    outputs = model(IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        with_op = tf.Module()
        with_op.v, with_op.g = tf.Variable([[3.0], [4.0]]), tf.Variable([10.0])
        with_op.w = tf.function(lambda: tfwn.weight_norm(with_op.v, with_op.g), input_signature=[])
        tf.saved_model.save(with_op, f"{folder}/with_op")
        loaded = tf.saved_model.load(f"{folder}/with_op")
        np.testing.assert_allclose(loaded.w(), [[6], [8]], rtol=1e-6)

        tfwn.fold(model).export(f"{folder}/exported", verbose=False)
        np.save(f"{folder}/images.npy", IMAGES)
        np.save(f"{folder}/outputs.npy", outputs)
        program = pathlib.Path(folder, "serve.py")
        program.write_text(SERVE)
        subprocess.run([sys.executable, program, folder], check=True)


for check in (check_trained_step, check_op, check_keras_fit, check_layers, check_saved_model):
    check()
    print("passed:", check.__name__.removeprefix("check_").replace("_", " "), flush=True)
