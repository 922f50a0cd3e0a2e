"""Tests that models of other packages can be normalized, trained, saved, loaded and folded.

The packages are optional. keras-tcn requires a TensorFlow package that exists only for macOS, so
use pip install --no-deps keras-tcn. pip install keras-hub also installs TensorFlow Text.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import normal
from tfwn.keras import WeightNormalization

pytestmark = [
    # From T5's own layers, which have no build() and whose attention ignores its mask.
    pytest.mark.filterwarnings("ignore:.build\\(\\). was called on layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning"),
]


def life(model, x, y, tmp_path, kernels):
    """Trains, saves, loads and folds a model whose weights are normalized."""
    wrappers = [one for one in model._flatten_layers() if isinstance(one, WeightNormalization)]
    assert sum(len(wrapper.normalized) for wrapper in wrappers) == kernels
    before = [one.g.numpy() for wrapper in wrappers for one in wrapper.normalized]
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    after = [one.g.numpy() for wrapper in wrappers for one in wrapper.normalized]
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))
    expected = model.predict(x, verbose=0)

    def check(other):
        np.testing.assert_allclose(other.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    check(loaded)
    loaded.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    check(loaded)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    check(clone)
    folded = tfwn.fold(loaded)
    check(folded)
    folded.fit(x, y, verbose=0)
    expected = folded.predict(x, verbose=0)
    assert not any(isinstance(one, WeightNormalization) for one in folded._flatten_layers())
    folded.save(tmp_path / "folded.keras")
    check(keras.models.load_model(tmp_path / "folded.keras"))
    tf.saved_model.save(folded, tmp_path / "saved")


@pytest.mark.parametrize("norm", [{}, {"use_layer_norm": True}, {"use_batch_norm": True}])
@pytest.mark.parametrize("how", ["wrapper", "reparameterize"])
def test_keras_tcn(how, norm, tmp_path):
    tcn = pytest.importorskip("tcn", reason="needs keras-tcn")
    layer = tcn.TCN(
        4, kernel_size=2, nb_stacks=2, dilations=(1, 2), dropout_rate=0.1, name="tcn", **norm
    )
    x = normal(16, 8, 3)
    inputs = keras.Input([8, 3])
    around = WeightNormalization if how == "wrapper" else lambda layer: layer
    wrapped = around(layer)
    model = keras.Model(inputs, around(keras.layers.Dense(1))(wrapped(inputs)))
    if how == "reparameterize":
        expected = model(x)
        model = tfwn.reparameterize(model)
        np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
        wrapped = model.get_layer("tcn")
    assert wrapped.receptive_field == layer.receptive_field == 13
    # Four blocks of two convolutions, one more to match the first block's channels, and the head.
    life(model, x, x[:, -1, :1], tmp_path, 4 * 2 + 1 + 1)


# A function that creates the backbone, and the names of its inputs.
BACKBONES = {
    "bert": (
        lambda hub: hub.models.BertBackbone(
            vocabulary_size=20,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=6,
        ),
        ("token_ids", "padding_mask", "segment_ids"),
    ),
    "t5": (
        lambda hub: hub.models.T5Backbone(
            vocabulary_size=20, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16
        ),
        (
            "encoder_token_ids",
            "encoder_padding_mask",
            "decoder_token_ids",
            "decoder_padding_mask",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_keras_hub(name, tmp_path, rng):
    hub = pytest.importorskip("keras_hub", reason="needs keras-hub")
    make, inputs = BACKBONES[name]
    backbone = make(hub)
    x = {
        key: np.ones((8, 6), "int32") if "mask" in key else rng.integers(0, 2, (8, 6))
        for key in inputs
    }
    outputs = backbone.output
    outputs = outputs.get("sequence_output", outputs.get("decoder_sequence_output"))
    model = keras.Model(backbone.input, keras.layers.Dense(1)(outputs))
    expected = model.predict(x, verbose=0)
    kernels = sum(v.name == "kernel" or v.name.endswith("embeddings") for v in model.weights)
    model = tfwn.reparameterize(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    life(model, x, x[inputs[0]][..., None].astype("float32"), tmp_path, kernels)
