"""Tests that kernel_mask works in wrapped Keras layers as in tfwn's own layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests.keras_layers import LAYERS, Attention, normal
from tests.reference import weight_norm as reference
from tfwn.keras import WeightNormalization


def type_a(height, width):
    """PixelCNN's mask for the first layer: only pixels before the center in reading order."""
    mask = np.zeros([height * width, 1, 1], bool)
    mask[: height * width // 2] = True
    return mask.reshape(height, width, 1, 1)


# A function that creates the layer, the layer's input, and a mask.
MASKED = {
    "dense": (lambda: keras.layers.Dense(3), normal(5, 4), np.tri(4, 3, -1)),
    "conv": (lambda: keras.layers.Conv2D(4, 3), normal(2, 6, 6, 3), type_a(3, 3)),
    "causal": (
        lambda: keras.layers.Conv1D(4, 3, padding="causal"),
        normal(2, 6, 3),
        np.array([1, 1, 0]).reshape(3, 1, 1),
    ),
    "grouped": (lambda: keras.layers.Conv2D(4, 3, groups=2), normal(2, 6, 6, 4), type_a(3, 3)),
    "transposed": (
        lambda: keras.layers.Conv2DTranspose(4, 3),
        normal(2, 4, 4, 3),
        type_a(3, 3),
    ),
    "depthwise": (lambda: keras.layers.DepthwiseConv2D(3), normal(2, 6, 6, 3), type_a(3, 3)),
    "einsum": (
        lambda: keras.layers.EinsumDense("abc,cde->abed", (None, 3, 2), bias_axes="ed"),
        normal(2, 5, 4),
        np.array([1, 0, 1, 1]).reshape(4, 1, 1),
    ),
}
every_mask = pytest.mark.parametrize("name", MASKED)


@every_mask
@pytest.mark.parametrize("how", ["wrapper", "reparameterize"])
def test_w_is_that_of_the_elements_that_are_not_masked(name, how):
    make, x, mask = MASKED[name]
    layer = make()
    layer(x)
    before = layer.kernel.numpy()
    if how == "wrapper":
        wrapper = WeightNormalization(layer, kernel_mask=mask)
        wrapper(x)
    else:
        wrapper = tfwn.reparameterize(layer, kernel_mask=lambda v: mask)
    (one,) = wrapper.normalized
    np.testing.assert_allclose(one.w(), before * mask, rtol=1e-5, atol=1e-6)
    # Masked elements of v, whatever their values, count in no norm and have no gradient.
    g = np.linspace(1, 2, int(np.prod(one.g.shape)), dtype=np.float32).reshape(one.g.shape)
    one.g.assign(g)
    one.v.assign(before)
    w = reference(before * mask, g, one.axis)
    np.testing.assert_allclose(one.w(), w, rtol=1e-5, atol=1e-6)
    with tf.GradientTape() as tape:
        y = wrapper(x)
        loss = tf.reduce_sum(y**2)
    gradient = tape.gradient(loss, one.v.value).numpy()
    mask = np.broadcast_to(mask, before.shape)
    assert not np.any(gradient[mask == 0])
    assert np.any(gradient[mask != 0])
    folded = tfwn.fold(wrapper)
    np.testing.assert_allclose(folded.kernel, w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(folded(x), y, rtol=1e-5, atol=1e-5)


def test_the_same_as_the_layer_of_tfwn():
    x, mask = normal(2, 6, 6, 3), type_a(3, 3)
    ours = tfwn.Conv2D(4, 3, kernel_mask=mask)
    ours(x)
    theirs = WeightNormalization(keras.layers.Conv2D(4, 3), kernel_mask=mask)
    theirs(x)
    theirs.normalized[0].assign_v_and_g(ours.weight.v, ours.weight.g)
    np.testing.assert_allclose(theirs(x), ours(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        tfwn.data_dependent_init(theirs, x), tfwn.data_dependent_init(ours, x), atol=1e-5
    )
    np.testing.assert_allclose(theirs.g, ours.weight.g, rtol=1e-5)


@every_mask
def test_files(name, tmp_path):
    make, x, mask = MASKED[name]

    def fresh(kernel_mask=mask):
        return keras.Sequential(
            [keras.Input(x.shape[1:]), WeightNormalization(make(), kernel_mask=kernel_mask)]
        )

    model = fresh()
    tfwn.data_dependent_init(model, x)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x, model(x) + 1, verbose=0)
    expected = model(x)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    others = [fresh() for _ in range(2)]
    others[0].load_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model=others[1]).restore(path).assert_existing_objects_matched()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    from_json = keras.models.model_from_json(model.to_json())
    from_json.set_weights(model.get_weights())
    for other in (loaded, *others, clone, from_json):
        np.testing.assert_array_equal(other(x), expected)
        np.testing.assert_array_equal(other.layers[-1].kernel_mask, mask)
    assert tfwn.is_initialized(loaded)
    loaded.fit(x, expected + 1, verbose=0)
    w = loaded.layers[-1].normalized[0].w().numpy()
    assert not np.any(w[np.broadcast_to(mask, w.shape) == 0])


@every_mask
def test_data_dependent_init(name):
    make, x, mask = MASKED[name]
    wrapper = WeightNormalization(make(), kernel_mask=mask)
    wrapper(x)
    y = tfwn.data_dependent_init(wrapper, x)
    (one,) = wrapper.normalized
    others = tuple(a for a in range(len(one.v.shape)) if a not in one.axis)
    masked = np.all(np.broadcast_to(mask, one.v.shape) == 0, others)
    np.testing.assert_array_equal(np.all(one.w().numpy() == 0, others), masked)
    if name == "einsum":
        y = tf.transpose(y, [0, 1, 3, 2])  # To the kernel's order of units.
    y = tf.reshape(y, [-1, masked.size])
    mean, variance = tf.nn.moments(y, [0])
    np.testing.assert_allclose(mean, np.zeros(masked.size), atol=1e-5)
    np.testing.assert_allclose(variance, 1 - masked.reshape(-1), atol=1e-4)


def test_zero_units_get_a_direction_where_the_mask_is_not_zero():
    mask = np.array([[1, 0, 1], [1, 0, 0]])
    layer = keras.layers.Dense(3, kernel_initializer="zeros")
    wrapper = WeightNormalization(layer, kernel_mask=mask)
    wrapper(tf.ones([1, 2]))
    np.testing.assert_array_equal(layer.kernel.numpy() != 0, mask != 0)
    np.testing.assert_array_equal(wrapper.g, np.zeros(3))


@pytest.mark.parametrize("name", ["lstm", "bidirectional", "attention"])
def test_masks_by_name(name):
    make, x, kernels = LAYERS[name]
    kernel = "recurrent_kernel" if name != "attention" else "kernel"
    wrapper = WeightNormalization(make(), kernel_mask={kernel: 0})
    wrapper(x)
    for one in wrapper.normalized:
        assert np.any(one.w().numpy()) == (one.v.name != kernel)
    assert len(wrapper.normalized) == kernels
    with keras.saving.custom_object_scope({"Attention": Attention}):
        again = WeightNormalization.from_config(wrapper.get_config())
    assert again.kernel_mask == {kernel: 0}


def test_a_model_with_masks_for_some_of_its_layers():
    x = normal(2, 6, 6, 3)
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Conv2D(4, 3, padding="same", name="first"),
            keras.layers.Conv2D(4, 3, padding="same"),
        ]
    )
    mask = type_a(3, 3)
    tfwn.reparameterize(model, kernel_mask=lambda v: mask if "first" in v.path else None)
    first, second = (layer.normalized[0].w().numpy() for layer in model.layers)
    np.testing.assert_array_equal(np.any(first, (2, 3)), mask[..., 0, 0])
    assert np.all(second)


def test_variables_of_modules():
    class Masked(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(normal(4, 3))

        def __call__(self, x):
            return x @ self.w

    model, mask = Masked(), np.tri(4, 3, -1)
    w = model.w.numpy() * mask
    tfwn.reparameterize(model, kernel_mask=lambda v: mask)
    np.testing.assert_allclose(model.w.numpy(), w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.w.g, np.linalg.norm(w, axis=0), rtol=1e-5)
    model.w.v.assign(tf.ones([4, 3]))
    np.testing.assert_allclose(np.linalg.norm(model.w.numpy(), axis=0), model.w.g, rtol=1e-5)
    assert not np.any(model.w.numpy()[mask == 0])
    model.w.assign(tf.ones([4, 3]))
    np.testing.assert_allclose(model.w.numpy(), mask, rtol=1e-5)
    np.testing.assert_allclose(tf.gather(model.w, [0, 2]), mask[[0, 2]], rtol=1e-5)
    np.testing.assert_allclose(tfwn.fold(model).w, mask, rtol=1e-5)


def test_errors():
    x = normal(2, 6, 6, 3)
    wrapper = WeightNormalization(keras.layers.Conv2D(4, 3), kernel_mask=np.ones([5, 1, 1]))
    with pytest.raises(ValueError, match=r"kernel_mask of .*/kernel must broadcast .*\(3, 3, 3, 4"):
        wrapper(x)
    wrapper = WeightNormalization(keras.layers.Conv2D(4, 3), kernel_mask={"kernels": 1})
    with pytest.raises(ValueError, match="kernel_mask names kernels, which"):
        wrapper(x)
    layer = keras.layers.Bidirectional(keras.layers.LSTM(2))
    layer(normal(2, 5, 3))
    with pytest.raises(ValueError, match="several masks for the variables 'kernel'"):
        tfwn.reparameterize(layer, kernel_mask=lambda v: 1 if "forward" in v.path else 0)
    dense = keras.layers.Dense(3)
    dense(normal(2, 4))
    with pytest.raises(ValueError, match="kernel_mask returned no mask"):
        tfwn.reparameterize(dense, kernel_mask=lambda v: None)
    wrapper = WeightNormalization(dense, kernel_mask=np.tri(4, 3))
    wrapper(normal(2, 4))
    wrapper.enable_lora(2)
    with pytest.raises(ValueError, match="kernel_mask, which does not apply to what LoRA adds"):
        wrapper(normal(2, 4))
