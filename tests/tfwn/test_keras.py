"""Tests tfwn.keras.WeightNormalization with each Keras layer and each way Keras uses layers."""

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests import reference
from tfwn.keras import WeightNormalization


def sequence(*shape):
    return tf.random.stateless_normal(shape or (4, 6, 8), seed=[1, 2])


# Layer, input shape, and for each kernel the axes that index its units.
LAYERS = {
    "dense": (lambda: keras.layers.Dense(5, activation="relu"), (4, 8), [-1]),
    "conv1d": (lambda: keras.layers.Conv1D(4, 3, groups=2), (4, 6, 8), [-1]),
    "conv2d": (lambda: keras.layers.Conv2D(4, 3, dilation_rate=2), (2, 7, 7, 3), [-1]),
    "conv3d": (lambda: keras.layers.Conv3D(4, 2, strides=2), (2, 4, 5, 6, 3), [-1]),
    "conv1d_transpose": (lambda: keras.layers.Conv1DTranspose(4, 3, strides=2), (2, 5, 3), [-2]),
    "conv2d_transpose": (lambda: keras.layers.Conv2DTranspose(4, 3), (2, 5, 5, 3), [-2]),
    "depthwise": (
        lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
        (2, 6, 6, 3),
        [(2, 3)],
    ),
    "separable": (lambda: keras.layers.SeparableConv1D(5, 3), (2, 6, 3), [(1, 2), -1]),
    "einsum": (
        lambda: keras.layers.EinsumDense("abc,cde->abed", (None, 3, 2), bias_axes="ed"),
        (2, 5, 4),
        [(1, 2)],
    ),
    "embedding": (lambda: keras.layers.Embedding(9, 3), None, [0]),
    "rnn": (lambda: keras.layers.SimpleRNN(3), (4, 6, 8), [-1, -1]),
    "lstm": (lambda: keras.layers.LSTM(3, return_sequences=True), (4, 6, 8), [-1, -1]),
    "gru": (lambda: keras.layers.GRU(3, reset_after=False), (4, 6, 8), [-1, -1]),
    "conv_lstm": (lambda: keras.layers.ConvLSTM1D(3, 3, padding="same"), (2, 3, 6, 2), [-1, -1]),
    "bidirectional": (
        lambda: keras.layers.Bidirectional(keras.layers.LSTM(3)),
        (4, 6, 8),
        [-1, -1, -1, -1],
    ),
    "time_distributed": (
        lambda: keras.layers.TimeDistributed(keras.layers.Conv1D(2, 3)),
        (2, 3, 6, 4),
        [-1],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_keeps_its_outputs_and_gets_one_g_per_unit(name):
    make, shape, axes = LAYERS[name]
    layer = make()
    x = tf.constant([[1, 2, 1]]) if shape is None else sequence(*shape)
    expected = layer(x)
    wrapped = WeightNormalization(layer)
    np.testing.assert_allclose(wrapped(x), expected, atol=2e-6)
    assert len(wrapped.normalized) == len(axes)
    for normalized, axis in zip(wrapped.normalized, axes, strict=True):
        np.testing.assert_allclose(normalized.g, reference.norm(normalized.v, axis), rtol=1e-6)
    assert wrapped.compute_output_shape(tuple(x.shape)) == layer.compute_output_shape(
        tuple(x.shape)
    )
    trained = wrapped.trainable_variables
    assert len(trained) == len(layer.trainable_variables) + len(axes)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_those_of_the_folded_layer(name):
    make, shape, axes = LAYERS[name]
    x = tf.constant([[1, 2, 1]]) if shape is None else sequence(*shape)
    wrapped = WeightNormalization(make())
    wrapped(x)
    for normalized, axis in zip(wrapped.normalized, axes, strict=True):
        normalized.g.assign(tf.random.stateless_uniform(normalized.g.shape, [1, 1], 0.5, 2.0))
        expected = reference.weight_norm(normalized.v, normalized.g, axis)
        np.testing.assert_allclose(normalized.w(), expected, rtol=1e-5, atol=1e-7)
    before = wrapped(x)
    layer = wrapped.fold()
    assert not isinstance(layer, WeightNormalization)
    np.testing.assert_allclose(layer(x), before, atol=1e-6)


def test_attention_normalizes_its_four_projections_and_passes_its_arguments():
    query, value = sequence(2, 5, 8), sequence(2, 7, 8)
    attention = keras.layers.MultiHeadAttention(2, 4)
    expected, expected_scores = attention(query, value, return_attention_scores=True)
    wrapped = WeightNormalization(attention)
    outputs, scores = wrapped(query, value, return_attention_scores=True)
    np.testing.assert_allclose(outputs, expected, atol=2e-6)
    np.testing.assert_allclose(scores, expected_scores, atol=2e-6)
    assert [tuple(n.g.shape) for n in wrapped.normalized] == [(2, 4), (2, 4), (2, 4), (8,)]
    fresh = WeightNormalization(keras.layers.MultiHeadAttention(2, 4))
    assert fresh(query, value=value, use_causal_mask=True).shape == (2, 5, 8)


def test_gradients_are_those_of_equation_3():
    x = sequence(4, 8)
    wrapped = WeightNormalization(keras.layers.Dense(3, use_bias=False))
    wrapped(x)
    (normalized,) = wrapped.normalized
    normalized.g.assign([0.5, 1.0, 2.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(wrapped(x) ** 2)
    grad_g, grad_v = tape.gradient(loss, [normalized.g.value, normalized.v.value])
    x, v, g = (np.asarray(t, np.float64) for t in (x, normalized.v, normalized.g))
    grad_w = 2 * x.T @ (x @ reference.weight_norm(v, g))
    expected_v, expected_g = reference.weight_norm_gradient(grad_w, v, g)
    np.testing.assert_allclose(grad_g, expected_g, rtol=1e-5)
    np.testing.assert_allclose(grad_v, expected_v, rtol=1e-4, atol=1e-5)


def test_a_layer_keeps_updating_its_state():
    class Stateful(keras.layers.Layer):
        """Has a kernel, dropout, batch statistics and a counter, for a loop over time."""

        def build(self, input_shape):
            self.kernel = self.add_weight((input_shape[-1], 3), name="kernel")
            self.dropout = keras.layers.Dropout(0.5)
            self.normalization = keras.layers.BatchNormalization()
            self.normalization.build((None, 3))
            self.calls = self.add_weight((), "zeros", "int32", trainable=False, name="calls")

        def call(self, inputs, training=False):
            self.calls.assign_add(1)
            h = self.dropout(inputs, training=training) @ self.kernel
            return self.normalization(h, training=training)

    wrapped = WeightNormalization(Stateful())
    x = sequence(16, 8)

    @tf.function
    def step(x):
        return wrapped(x, training=True)

    first, second = step(x), step(x)
    assert int(wrapped.layer.calls.numpy()) == 2
    assert not np.allclose(first, second), "dropout drew the same mask twice"
    assert np.any(wrapped.layer.normalization.moving_mean.numpy() != 0)


def test_recurrent_dropout_draws_new_masks():
    wrapped = WeightNormalization(keras.layers.LSTM(3, dropout=0.5, recurrent_dropout=0.5))
    step = tf.function(lambda x: wrapped(x, training=True))
    assert not np.allclose(step(sequence()), step(sequence()))


def test_masks_pass_through():
    embedding = keras.layers.Embedding(9, 4, mask_zero=True)
    ids = tf.constant([[1, 2, 0, 0], [3, 4, 5, 6]])
    layer = keras.layers.LSTM(3)
    expected = layer(embedding(ids))
    wrapped = WeightNormalization(layer)
    np.testing.assert_allclose(wrapped(embedding(ids)), expected, atol=1e-6)
    np.testing.assert_allclose(wrapped(embedding(ids), mask=ids != 0), expected, atol=1e-6)
    assert WeightNormalization(embedding)(ids)._keras_mask is not None


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_of_recurrent_layers(kind):
    """They are passed, returned, kept between calls and reset as in the layer itself."""
    make, x = getattr(keras.layers, kind), sequence(2, 5, 4)
    plain = make(3, stateful=True, return_state=True)
    initial = [sequence(2, 3), 2 * sequence(2, 3)][: 2 if kind == "LSTM" else 1]
    expected = [plain(x, initial_state=initial), plain(x), plain(x)]
    wrapped = WeightNormalization(plain)
    plain.reset_state()
    found = [wrapped(x, initial_state=initial), wrapped(x), wrapped(x)]
    tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    wrapped.reset_state()
    fresh = wrapped(x)
    assert not np.allclose(fresh[0], found[-1][0])
    wrapped.reset_state()
    np.testing.assert_array_equal(wrapped(x)[0], fresh[0])


def test_an_encoder_s_state_is_the_initial_state_of_a_decoder(tmp_path):
    encoded, decoded = keras.Input((5, 4)), keras.Input((6, 4))
    states = WeightNormalization(keras.layers.LSTM(3, return_state=True))(encoded)[1:]
    decoder = WeightNormalization(keras.layers.LSTM(3, return_sequences=True))
    model = keras.Model([encoded, decoded], decoder(decoded, initial_state=states))
    move(model)
    x = [sequence(2, 5, 4), sequence(2, 6, 4)]
    expected = model(x)
    assert not np.allclose(expected, decoder(x[1]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), expected)
    np.testing.assert_allclose(tfwn.fold(loaded)(x), expected, atol=1e-6)


def functional():
    inputs = keras.Input((6, 8))
    x = WeightNormalization(keras.layers.Conv1D(8, 3, padding="same", activation="relu"))(inputs)
    x = WeightNormalization(keras.layers.MultiHeadAttention(2, 4))(x, x)
    x = keras.layers.TimeDistributed(WeightNormalization(keras.layers.Dense(6)))(x)
    x = WeightNormalization(keras.layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"))(x)
    x = keras.layers.Bidirectional(WeightNormalization(keras.layers.LSTM(4)))(x)
    x = keras.layers.Dropout(0.1)(x)
    return keras.Model(inputs, WeightNormalization(keras.layers.Dense(2))(x))


def move(model):
    """Changes all weights, so that v, g and bias matter."""
    for i, variable in enumerate(model.trainable_variables):
        variable.assign_add(0.1 * tf.random.stateless_normal(variable.shape, [i, 3]))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(jit_compile):
    model = functional()
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    x, y = sequence(32, 6, 8), sequence(32, 2)
    before = [np.asarray(variable) for variable in model.trainable_variables]
    losses = model.fit(x, y, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    # The keys' bias has gradient 0, because it shifts all inputs of a softmax equally.
    stuck = [
        variable.path
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(variable, old)
    ]
    assert [path for path in stuck if "key/bias" not in path] == []


def test_saved_and_loaded_as_keras(tmp_path):
    model = functional()
    move(model)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded(sequence()), model(sequence()))


def test_weights_files_and_tf_checkpoints(tmp_path):
    model, other, third = functional(), functional(), functional()
    move(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(sequence()), model(sequence()))
    path = tf.train.Checkpoint(model=model).save(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=third).restore(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(third(sequence()), model(sequence()))


def test_clone_and_deepcopy():
    model = functional()
    move(model)
    clone = keras.models.clone_model(model)
    assert not np.allclose(clone(sequence()), model(sequence()))
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(sequence()), model(sequence()))
    copied = copy.deepcopy(model)
    np.testing.assert_array_equal(copied(sequence()), model(sequence()))
    copied.layers[-1].normalized[0].g.assign([7.0, 7.0])
    assert not np.allclose(copied(sequence()), model(sequence()))


def test_deepcopy_of_a_layer_before_and_after_it_is_built():
    layer = WeightNormalization(keras.layers.Dense(2))
    assert copy.deepcopy(layer)(sequence(4, 8)).shape == (4, 2)
    layer(sequence(4, 8))
    move(layer)
    copied = copy.deepcopy(layer)
    np.testing.assert_array_equal(copied(sequence(4, 8)), layer(sequence(4, 8)))
    assert copied.normalized[0].v is not layer.normalized[0].v


def test_pickle():
    model = keras.Sequential([keras.Input((8,)), WeightNormalization(keras.layers.Dense(2))])
    move(model)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(sequence(4, 8)), model(sequence(4, 8)))


def test_fit_under_a_strategy_keeps_replicas_alike():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), WeightNormalization(keras.layers.Dense(2))])
        model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.layers[0].g.numpy()
    model.fit(sequence(16, 8), sequence(16, 2), epochs=2, batch_size=8, verbose=0)
    first, second = strategy.experimental_local_results(model.layers[0].g.value)
    np.testing.assert_array_equal(first.numpy(), second.numpy())
    assert not np.allclose(first.numpy(), before)


def test_config_round_trip():
    layer = WeightNormalization(
        keras.layers.Conv1D(3, 2, kernel_regularizer="l2"),
        axis={"kernel": (0, -1)},
        weight_names=["kernel"],
        name="normalized",
    )
    again = WeightNormalization.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    again(sequence())
    assert again.normalized[0].g.shape == (2, 3)


def test_bidirectional_around_the_wrapper_runs_backwards():
    layer = keras.layers.Bidirectional(WeightNormalization(keras.layers.LSTM(3)), merge_mode=None)
    forward, backward = layer(sequence())
    assert layer.backward_layer.layer.go_backwards
    layer.backward_layer.set_weights(layer.forward_layer.get_weights())
    forward, backward = layer(tf.concat([sequence(), sequence()[:, ::-1]], 1))
    np.testing.assert_allclose(forward, backward, atol=1e-6)


def test_mixed_bfloat16_keeps_v_and_g_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = functional()
    finally:
        keras.config.set_dtype_policy("float32")
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    assert model(sequence()).dtype == tf.bfloat16
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    losses = model.fit(sequence(32, 6, 8), sequence(32, 2), epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_norm_is_taken_of_the_stored_v_in_mixed_precision():
    layer = WeightNormalization(keras.layers.Dense(64, use_bias=False, dtype="mixed_bfloat16"))
    layer.build((None, 64))
    (normalized,) = layer.normalized
    w = np.asarray(layer(tf.eye(64)), np.float64)
    v = np.asarray(normalized.v, np.float64)
    # w is rounded once, to the 8 bits of bfloat16. Rounding v as well would exceed the tolerance.
    np.testing.assert_allclose(w, np.asarray(normalized.g) * v / reference.norm(v), rtol=2.0**-8)


def test_regularizers_act_on_w_once_and_activity_losses_arrive():
    layer = WeightNormalization(
        keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(1.0))
    )
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layer(inputs) + layer(2 * inputs))
    layer.normalized[0].g.assign([1.0, 2.0, 3.0])
    model(sequence(4, 8))
    np.testing.assert_allclose(model.losses, [1.0 + 4.0 + 9.0], rtol=1e-5)
    assert isinstance(layer.fold().kernel.regularizer, keras.regularizers.L2)

    plain = keras.layers.Dense(3, activity_regularizer=keras.regularizers.L2(1.0))
    y = plain(sequence(4, 8))
    expected = [float(loss) for loss in plain.losses]
    wrapped = WeightNormalization(plain)
    np.testing.assert_allclose(wrapped(sequence(4, 8)), y, atol=1e-6)
    np.testing.assert_allclose([float(loss) for loss in wrapped.losses], expected, rtol=1e-5)
    *_, losses = wrapped.stateless_call(
        [v.value for v in wrapped.trainable_variables],
        [v.value for v in wrapped.non_trainable_variables],
        sequence(4, 8),
        return_losses=True,
    )
    np.testing.assert_allclose([float(loss) for loss in losses], expected, rtol=1e-5)


def test_stateless_call_reads_the_given_values():
    wrapped = WeightNormalization(keras.layers.Dense(3))
    wrapped(sequence(4, 8))
    values = [tf.ones(v.shape) for v in wrapped.trainable_variables]
    outputs, _ = wrapped.stateless_call(
        values, [v.value for v in wrapped.non_trainable_variables], sequence(4, 8)
    )
    expected = tf.reduce_sum(sequence(4, 8), 1, keepdims=True) / tf.sqrt(8.0) + tf.ones([1, 3])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


def test_shared_layer_trains_one_kernel():
    layer = WeightNormalization(keras.layers.Dense(8))
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layer(layer(inputs)))
    assert len(model.trainable_variables) == 3


def test_wrapped_subclass_with_its_own_sublayers():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(4)

        def build(self, input_shape):
            self.first.build(input_shape)
            self.second.build((*input_shape[:-1], 4))

        def call(self, x):
            return self.second(self.first(x))

    wrapped = WeightNormalization(Block())
    wrapped(sequence(4, 8))
    assert len(wrapped.normalized) == 2
    assert len({n.g.path for n in wrapped.normalized}) == 2


def test_a_folded_layer_can_be_quantized():
    wrapper = WeightNormalization(keras.layers.Dense(3))
    x = sequence(4, 8)
    wrapper(x)
    wrapper.g.assign(wrapper.g * 3)
    expected = wrapper(x)
    folded = wrapper.fold()
    folded.quantize("int8")
    np.testing.assert_allclose(folded(x), expected, atol=0.02 * np.abs(expected).max())


def test_a_tf_module_in_a_keras_model_is_warned_of():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = tfwn.Dense(4, name="one")

        def call(self, x):
            return self.one(x)

    with pytest.warns(UserWarning, match="'one' creates its variables in the call of a Keras"):
        Model()(sequence(4, 8))


def test_data_init_false_is_accepted_where_addons_had_it():
    assert WeightNormalization(keras.layers.Dense(3), data_init=False)(sequence(4, 8)).shape[1] == 3
    assert WeightNormalization(keras.layers.Dense(3), False)(sequence(4, 8)).shape[1] == 3
