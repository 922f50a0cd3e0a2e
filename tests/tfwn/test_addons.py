"""Tests tfwn.convert.from_addons on files saved by TensorFlow Addons 0.23.0."""

import pathlib

import keras
import numpy as np
import pytest

import tfwn
from tfwn.keras import WeightNormalization

DATA = pathlib.Path(__file__).parents[1] / "data" / "addons_0_23_0"


def images(units=2):
    return keras.Sequential(
        [
            keras.Input([5, 5, 2]),
            WeightNormalization(keras.layers.Conv2D(3, 2, activation="relu")),
            keras.layers.BatchNormalization(),
            WeightNormalization(keras.layers.Conv2DTranspose(3, 2, use_bias=False)),
            keras.layers.Flatten(),
            WeightNormalization(keras.layers.Dense(units)),
        ]
    )


def sequences():
    return keras.Sequential(
        [
            keras.Input([4, 3]),
            WeightNormalization(keras.layers.LSTM(3)),
            WeightNormalization(keras.layers.Dense(2)),
        ]
    )


@pytest.mark.parametrize(
    ("name", "make", "initialized"),
    [
        ("images_data_init", images, True),
        ("images_plain", images, False),
        ("sequences", sequences, True),
    ],
)
def test_files(name, make, initialized):
    model, arrays = make(), np.load(DATA / f"{name}.npz")
    tfwn.convert.from_addons(DATA / f"{name}.h5", model)
    np.testing.assert_allclose(model(arrays["x"]), arrays["y"], rtol=1e-4, atol=1e-5)
    assert tfwn.is_initialized(model) == initialized
    tfwn.fold(model)


def test_another_model_is_refused_and_unchanged():
    model = images(units=3)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"has shape .* in the model but"):
        tfwn.convert.from_addons(DATA / "images_plain.h5", model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    with pytest.raises(ValueError, match="has 2 layers with weights"):
        tfwn.convert.from_addons(DATA / "sequences.h5", model)
    plain = keras.Sequential([keras.Input([4, 3]), keras.layers.LSTM(3), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="weights, but"):
        tfwn.convert.from_addons(DATA / "sequences.h5", plain)
    nested = keras.Sequential([keras.Input([4, 3]), sequences(), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="only direct layers"):
        tfwn.convert.from_addons(DATA / "sequences.h5", nested)


@pytest.mark.parametrize(
    ("name", "make"),
    [("images_data_init", images), ("images_plain", images), ("sequences", sequences)],
)
def test_the_loader_of_keras_refuses_these_files(name, make):
    """Keras only compares the number and shapes of arrays; the layer cannot convert them."""
    with pytest.raises(ValueError, match=r"(count|Shape) mismatch"):
        make().load_weights(DATA / f"{name}.h5")
