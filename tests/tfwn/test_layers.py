"""Tests that every public layer must pass. A layer missing from CASES fails the first test."""

import copy
import dataclasses
import threading
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

import tfwn


def _call(layer, x):
    return layer(x)


def _call_cell(cell, x):
    # States of zero would hide the gradients of the recurrent weights.
    states = [state + 0.5 for state in cell.get_initial_state(tf.shape(x)[0])]
    return cell(x, states)[0]


def _call_training(layer, x):
    return layer(x, training=True)


@dataclasses.dataclass
class Case:
    make: Callable
    shape: tuple[int, ...]
    call: Callable = _call
    known: tuple[int, ...] = (-1,)  # axes whose sizes the layer must know
    ids: int = 0  # if positive, inputs are integers below this
    weights: int = 1

    def inputs(self, rng, dtype=np.float32):
        if self.ids:
            return tf.constant(rng.integers(0, self.ids, self.shape), tf.int32)
        return tf.constant(rng.normal(size=self.shape), dtype)

    def spec(self):
        known = [a % len(self.shape) for a in self.known]
        shape = [n if a in known else None for a, n in enumerate(self.shape)]
        return tf.TensorSpec(shape, tf.int32 if self.ids else tf.float32)


CASES = {
    "Conv1D": Case(lambda **o: tfwn.Conv1D(4, 3, padding="same", **o), (2, 5, 3)),
    "Conv1DTranspose": Case(lambda **o: tfwn.Conv1DTranspose(4, 3, 2, **o), (2, 5, 3)),
    "Conv2D": Case(lambda **o: tfwn.Conv2D(4, 3, 2, **o), (2, 5, 6, 3)),
    "Conv2DTranspose": Case(lambda **o: tfwn.Conv2DTranspose(4, 3, 2, "same", **o), (2, 5, 6, 3)),
    "Conv3D": Case(lambda **o: tfwn.Conv3D(4, 2, **o), (2, 3, 4, 5, 3)),
    "Conv3DTranspose": Case(lambda **o: tfwn.Conv3DTranspose(4, 2, **o), (2, 3, 2, 3, 3)),
    "Dense": Case(lambda **o: tfwn.Dense(4, "tanh", **o), (3, 5)),
    "DepthwiseConv2D": Case(
        lambda **o: tfwn.DepthwiseConv2D(3, depth_multiplier=2, **o), (2, 5, 6, 3)
    ),
    "Embedding": Case(lambda **o: tfwn.Embedding(6, 4, **o), (2, 5), known=(), ids=6),
    "GRU": Case(lambda **o: tfwn.GRU(4, return_sequences=True, **o), (2, 5, 3), weights=2),
    "GRUCell": Case(lambda **o: tfwn.GRUCell(4, **o), (2, 3), _call_cell, weights=2),
    "LSTM": Case(lambda **o: tfwn.LSTM(4, **o), (2, 5, 3), weights=2),
    "LSTMCell": Case(
        lambda **o: tfwn.LSTMCell(4, peepholes=True, **o), (2, 3), _call_cell, weights=2
    ),
    "MeanOnlyBatchNormalization": Case(
        lambda **o: tfwn.MeanOnlyBatchNormalization(**o), (2, 5, 3), _call_training, weights=0
    ),
    "RNN": Case(lambda **o: tfwn.RNN(tfwn.SimpleRNNCell(4, **o)), (2, 5, 3), weights=2),
    "SimpleRNN": Case(lambda **o: tfwn.SimpleRNN(4, **o), (2, 5, 3), weights=2),
    "SimpleRNNCell": Case(lambda **o: tfwn.SimpleRNNCell(4, **o), (2, 3), _call_cell, weights=2),
}

every_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_normalized_layer = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.weights], ids=[k for k, c in CASES.items() if c.weights]
)
WEIGHT_OPTIONS = {
    "weight_norm": {},
    "exponential_g": {"exponential_g": True},
    "normal": {"parameterization": "normal"},
}


def value_and_gradients(layer, case, x):
    with tf.GradientTape() as tape:
        y = case.call(layer, x)
        loss = tf.reduce_sum((tf.cast(y, tf.float32) + 1) ** 2)  # y ** 2 has its gradient along v.
    return y, tape.gradient(loss, layer.trainable_variables)


def assert_near(actual, expected, rtol=1e-5, atol=1e-6):
    tf.nest.map_structure(
        lambda a, e: np.testing.assert_allclose(dense(a), dense(e), rtol=rtol, atol=atol),
        actual,
        expected,
    )


def dense(x):
    return tf.convert_to_tensor(x).numpy()


def test_every_public_layer_is_in_the_table():
    public = {
        name
        for name in tfwn.__all__
        if isinstance(getattr(tfwn, name), type) and issubclass(getattr(tfwn, name), tf.Module)
    }
    assert public - {"Weight"} == set(CASES)


@every_normalized_layer
def test_parameterizations_start_as_the_same_function(case, rng):
    x = case.inputs(rng)
    outputs = {}
    for g in (None, 0.5):
        for name, options in WEIGHT_OPTIONS.items():
            tf.keras.utils.set_random_seed(1)
            layer = case.make(g_initializer=g, **options)
            outputs[g, name] = case.call(layer, x)
            weights = [m for m in layer.submodules if isinstance(m, tfwn.Weight)]
            assert len(weights) == case.weights
            assert {w.parameterization == "normal" for w in weights} == {name == "normal"}
        assert_near(outputs[g, "exponential_g"], outputs[g, "weight_norm"])
        assert_near(outputs[g, "normal"], outputs[g, "weight_norm"])
    assert not np.allclose(outputs[None, "normal"], outputs[0.5, "normal"])


@every_layer
@pytest.mark.parametrize("jit_compile", [False, True])
def test_function_with_unknown_sizes_equals_eager(case, jit_compile, rng):
    layer, x = case.make(), case.inputs(rng)
    function = tf.function(
        lambda x: value_and_gradients(layer, case, x),
        input_signature=[case.spec()],
        jit_compile=jit_compile,
    )
    compiled = function(x)  # Tracing creates the variables.
    eager = value_and_gradients(layer, case, x)
    assert_near(compiled, eager, rtol=1e-4, atol=1e-5)
    assert all(np.abs(dense(g)).max() > 0 for g in eager[1])


@every_layer
def test_sizes_that_are_known_stay_known(case):
    """The static shape of the outputs must not be lost in a tf.function."""
    layer = case.make()
    concrete = tf.function(lambda x: case.call(layer, x)).get_concrete_function(
        tf.TensorSpec(case.shape, tf.int32 if case.ids else tf.float32)
    )
    assert concrete.output_shapes.is_fully_defined()


@every_layer
def test_no_examples_in_the_batch(case, rng):
    layer = case.make()
    x = case.inputs(rng)[:0]
    # Without XLA, TensorFlow's convolutions return an empty batch with the shape of the INPUT.
    convolution = isinstance(layer, tfwn.Conv1D | tfwn.Conv2D | tfwn.Conv3D | tfwn.DepthwiseConv2D)
    function = tf.function(lambda: value_and_gradients(layer, case, x), jit_compile=convolution)
    y, gradients = function()
    assert y.shape[0] == 0
    assert all(np.all(dense(g) == 0) for g in gradients)


@every_normalized_layer
def test_zero_weights_give_finite_gradients(case, rng):
    options = {"DepthwiseConv2D": "depthwise_initializer", "Embedding": "embeddings_initializer"}
    layer = case.make()
    layer = case.make(**{options.get(type(layer).__name__, "kernel_initializer"): "zeros"})
    y, gradients = value_and_gradients(layer, case, case.inputs(rng))
    assert np.isfinite(y).all()
    assert all(np.isfinite(dense(g)).all() for g in gradients)


@every_layer
@pytest.mark.parametrize("compute_dtype", [tf.bfloat16, tf.float16])
def test_mixed_precision(case, compute_dtype, rng):
    layer = case.make(compute_dtype=compute_dtype)
    x = case.inputs(rng)
    y, gradients = value_and_gradients(layer, case, x)
    assert y.dtype == compute_dtype
    assert {v.dtype for v in layer.trainable_variables} == {tf.float32}
    assert {g.dtype for g in gradients} == {tf.float32}

    exact = case.make()
    case.call(exact, x)
    for variable, value in zip(exact.variables, layer.variables, strict=True):
        variable.assign(value)
    expected, _ = value_and_gradients(exact, case, x)
    tolerance = 0.03 if compute_dtype == tf.bfloat16 else 0.004
    assert_near(tf.cast(y, tf.float32), expected, rtol=tolerance, atol=tolerance)


@every_layer
def test_checkpoint_round_trip(case, rng, tmp_path):
    x = case.inputs(rng)
    layer, restored = case.make(), case.make()
    y = case.call(layer, x)
    path = tf.train.Checkpoint(layer=layer).write(str(tmp_path / "checkpoint"))

    status = tf.train.Checkpoint(layer=restored).read(path)  # Before its variables exist.
    assert_near(case.call(restored, x), y, rtol=0, atol=0)
    status.assert_consumed()


@every_layer
def test_saved_model_round_trip(case, rng, tmp_path):
    x = case.inputs(rng)
    layer = case.make()
    module = tf.Module()
    module.layer = layer
    module.predict = tf.function(lambda x: case.call(layer, x), input_signature=[case.spec()])
    y = module.predict(x)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    assert_near(loaded.predict(x), y, rtol=0, atol=0)


@every_layer
def test_copy_is_independent(case, rng):
    x = case.inputs(rng)
    layer = case.make()
    y = case.call(layer, x)
    other = copy.deepcopy(layer)
    for variable in layer.trainable_variables:
        variable.assign(variable + 1)
    assert_near(case.call(other, x), y, rtol=0, atol=0)
    assert not np.allclose(case.call(layer, x), y)


@every_layer
@pytest.mark.parametrize("in_function", [False, True])
def test_threads_at_an_uninitialized_layer(case, in_function, rng):
    layer, x = case.make(), case.inputs(rng)
    threads, outputs, errors = 8, [], []
    barrier = threading.Barrier(threads)
    call = (
        tf.function(lambda x: case.call(layer, x)) if in_function else lambda x: case.call(layer, x)
    )

    def work():
        try:
            barrier.wait()
            outputs.append(call(x))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert len(outputs) == threads
    for output in outputs:
        assert_near(output, outputs[0], rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("in_function", [False, True])
def test_replicas_make_their_variables_together(case, in_function, rng):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    layer, x = case.make(), case.inputs(rng)
    call = tf.function(case.call, reduce_retracing=True) if in_function else case.call
    outputs = strategy.experimental_local_results(strategy.run(call, args=(layer, x)))
    assert len(outputs) == 2
    assert_near(outputs[1], outputs[0])
    for variable in layer.trainable_variables:
        first, second = strategy.experimental_local_results(variable)
        assert_near(second, first, rtol=0, atol=0)
    for weight in (m for m in layer.submodules if isinstance(m, tfwn.Weight)):
        others = [a for a in range(weight.shape.rank) if a not in weight.axis]
        assert_near(weight.get_g(), tf.sqrt(tf.reduce_sum(weight.v**2, others)))
