"""Creates the files in saved.tar.xz with the installed version of tfwn: `python make.py`.

A development version before the release of tfwn 0.1.0 wrote them, and every later version must load
them, so do not create them again.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import tfwn

FOLDER = pathlib.Path(__file__).parent


def normalized(layer):
    """Returns the layer wrapped by tfwn."""
    return tfwn.keras.WeightNormalization(layer)


def feed_forward() -> keras.Model:
    """Returns a model of layers that support data-dependent initialization."""
    inputs = keras.Input((6, 4))
    x = normalized(keras.layers.Conv1D(3, 2, name="conv"))(inputs)
    x = normalized(keras.layers.Conv1DTranspose(3, 2, name="transposed"))(x)
    x = keras.layers.TimeDistributed(normalized(keras.layers.Dense(3, name="dense")))(x)
    x = normalized(keras.layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d"))(x)
    return keras.Model(inputs, x)


def recurrent() -> keras.Model:
    """Returns a model of layers with several kernels and one frozen layer."""
    inputs = keras.Input((6, 4))
    x = normalized(keras.layers.LSTM(2, return_sequences=True))(inputs)
    x = normalized(keras.layers.Bidirectional(keras.layers.GRU(2, return_sequences=True)))(x)
    x = keras.layers.Bidirectional(normalized(keras.layers.LSTM(2, return_sequences=True)))(x)
    x = normalized(keras.layers.MultiHeadAttention(2, 2))(x, x)
    model = keras.Model(inputs, normalized(keras.layers.Dense(2, name="frozen"))(x))
    model.layers[-1].trainable = False
    return model


MODELS = {"feed_forward": feed_forward, "recurrent": recurrent}


def inputs_of_all() -> np.ndarray:
    """Returns the batch with which the models are initialized, trained and evaluated."""
    return np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")


def main():
    """Saves each model in the three file formats, together with its outputs."""
    keras.utils.set_random_seed(0)
    x = inputs_of_all()
    for name, make in MODELS.items():
        model = make()
        if name == "feed_forward":
            tfwn.data_dependent_init(model, x)
        for i, variable in enumerate(model.trainable_variables):
            variable.assign_add(0.1 * tf.random.stateless_normal(variable.shape, [i, 3]))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.train_on_batch(x, np.ones(model(x).shape, "float32"))
        model.save(FOLDER / f"{name}.keras")
        model.save_weights(FOLDER / f"{name}.weights.h5")
        tf.train.Checkpoint(model=model).write(str(FOLDER / name))
        outputs = model(x).numpy()
        model.train_on_batch(x, np.ones(outputs.shape, "float32"))
        np.savez(FOLDER / f"{name}.npz", outputs=outputs, after_a_step=model(x).numpy())


if __name__ == "__main__":
    main()
