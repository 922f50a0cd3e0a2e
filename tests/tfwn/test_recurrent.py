"""Tests what Keras lacks: peepholes, w computed once, weights passed in. Also tests errors."""

import numpy as np
import pytest
import tensorflow as tf

import tfwn


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_peepholes_by_hand(rng):
    cell = tfwn.LSTMCell(4, peepholes=True, peephole_initializer="random_normal", dtype=tf.float64)
    x, h, c = rng.normal(size=[2, 3]), rng.normal(size=[2, 4]), rng.normal(size=[2, 4])
    output, (h_next, c_next) = cell(x, [h, c])

    z = x @ cell.weight().numpy() + h @ cell.recurrent_weight().numpy() + cell.b.numpy()
    i, f, a, o = np.split(z, 4, -1)
    p_i, p_f, p_o = cell.peephole.numpy()
    assert np.all(cell.peephole.numpy() != 0)
    expected_c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(a)
    np.testing.assert_allclose(c_next, expected_c, rtol=1e-10)
    np.testing.assert_allclose(h_next, sigmoid(o + p_o * expected_c) * np.tanh(expected_c))
    np.testing.assert_array_equal(output, h_next)


@pytest.mark.parametrize("unit_forget_bias", [True, False])
def test_first_bias(unit_forget_bias):
    """The bias of the forget gate starts at 1, if at all."""
    cell = tfwn.LSTMCell(2, unit_forget_bias=unit_forget_bias)
    cell.build([None, 3])
    np.testing.assert_array_equal(cell.b, [0, 0, *[unit_forget_bias] * 2, 0, 0, 0, 0])


def op_types(graph_def):
    outside = [node.op for node in graph_def.node]
    inside = [node.op for function in graph_def.library.function for node in function.node_def]
    return outside, inside


@pytest.mark.parametrize("layer", [tfwn.SimpleRNN(4), tfwn.LSTM(4), tfwn.GRU(4)])
def test_w_is_computed_once_and_not_in_the_loop(layer):
    function = tf.function(lambda x: layer(x)).get_concrete_function(tf.TensorSpec([2, None, 3]))
    outside, inside = op_types(function.graph.as_graph_def())
    assert any("While" in op for op in outside)
    assert sum("WeightNorm" in op for op in outside) == 2
    assert not any("WeightNorm" in op for op in inside)


def test_weights_from_outside_a_loop(rng):
    """A model that loops over a cell itself computes w once, before the loop."""
    cell = tfwn.LSTMCell(4)
    x = tf.constant(rng.normal(size=[2, 5, 3]), tf.float32)
    rnn = tfwn.RNN(cell, return_state=True)
    expected = rnn(x)

    @tf.function
    def loop(x):
        weights = cell.effective_weights()
        states = cell.get_initial_state(tf.shape(x)[0])
        for t in tf.range(5):
            output, states = cell(x[:, t], states, weights)
        return output, *states

    for actual, e in zip(loop(x), expected, strict=True):
        np.testing.assert_allclose(actual, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [False, True])
def test_no_steps(unroll):
    """With zero time steps, the output is zero and the states stay the initial ones."""
    layer = tfwn.LSTM(4, return_state=True, unroll=unroll)
    states = [tf.ones([2, 4]), tf.fill([2, 4], 2.0)]
    output, h, c = layer(tf.ones([2, 0, 3]), initial_state=states)
    np.testing.assert_array_equal(output, np.zeros([2, 4]))
    np.testing.assert_array_equal(h, states[0])
    np.testing.assert_array_equal(c, states[1])
    assert tfwn.LSTM(4, return_sequences=True)(tf.ones([2, 0, 3])).shape == [2, 0, 4]


def test_state_of_known_and_inputs_of_unknown_batch_size(rng):
    layer = tfwn.GRU(4, return_sequences=True)
    x = tf.constant(rng.normal(size=[2, 5, 3]), tf.float32)
    call = tf.function(
        lambda x: layer(x, initial_state=tf.ones([2, 4])),
        input_signature=[tf.TensorSpec([None, None, 3])],
    )
    np.testing.assert_allclose(
        call(x), layer(x, initial_state=[tf.ones([2, 4])]), rtol=1e-5, atol=1e-6
    )


def test_a_mask_of_unknown_rank():
    layer, x = tfwn.LSTM(4), tf.random.stateless_normal([2, 5, 3], [1, 2])
    mask = tf.constant([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]]) == 1
    call = tf.function(
        lambda x, mask: layer(x, mask=mask),
        input_signature=[tf.TensorSpec([None, None, 3]), tf.TensorSpec(None, tf.bool)],
    )
    np.testing.assert_allclose(call(x, mask), layer(x, mask=mask), rtol=1e-5, atol=1e-6)


def test_masked_steps_may_hold_anything(rng):
    """Masked inputs never reach the output, however large, if they are finite."""
    layer = tfwn.LSTM(4)
    x = rng.normal(size=[2, 5, 3]).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], bool)
    expected = layer(x, mask=mask)
    x[~mask] = 1e9
    np.testing.assert_array_equal(layer(x, mask=mask), expected)


@pytest.mark.parametrize("kind", [tfwn.SimpleRNN, tfwn.LSTM, tfwn.GRU])
@pytest.mark.parametrize("options", [{"return_sequences": True}, {"go_backwards": True}])
def test_a_folded_unrolled_layer_in_tensorflow_lite(kind, options, tmp_path):
    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(5, unroll=True, **options)

        @tf.function(input_signature=[tf.TensorSpec([2, 6, 3])])
        def __call__(self, x):
            return self.layer(x)

    model, x = Model(), tf.random.stateless_normal([2, 6, 3], [1, 2])
    expected = model(x).numpy()
    tf.saved_model.save(tfwn.fold(model), str(tmp_path))
    lite = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert()
    with pytest.warns(UserWarning, match="tf.lite.Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(model_content=lite)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())
    interpreter.invoke()
    actual = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(actual, expected, atol=1e-5)


ERRORS = {
    "cell must be a tfwn.SimpleRNNCell, .*, got keras.*LSTMCell": lambda: tfwn.RNN(
        tf.keras.layers.LSTMCell(4)
    ),
    "inputs of 'gru' must have rank 3": lambda: tfwn.GRU(4)(tf.ones([2, 3])),
    r"mask must have shape \[batch, time\] = \(2, 5\), got \(2, 4\)": lambda: tfwn.GRU(4)(
        tf.ones([2, 5, 3]), mask=tf.ones([2, 4])
    ),
    r"LSTMCell needs 2 state\(s\) of shape \[batch, 4\], got 1": lambda: tfwn.LSTM(4)(
        tf.ones([2, 5, 3]), initial_state=tf.ones([2, 4])
    ),
    "unroll=True needs a known number of steps": lambda: tf.function(
        tfwn.GRU(4, unroll=True), input_signature=[tf.TensorSpec([2, None, 3])]
    )(tf.ones([2, 5, 3])),
    "'gru_cell' must have a last axis of known size": lambda: tfwn.GRUCell(4).build([2, None]),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=range(len(ERRORS)))
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()
