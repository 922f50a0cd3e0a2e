"""weight_norm under all that TensorFlow does to an op: differentiate it again, vectorize, compile,
save, replicate, fold."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests import reference

LAYOUTS = [
    pytest.param((7, 5), -1, id="dense"),
    pytest.param((3, 2, 4, 5), (-2, -1), id="depthwise"),
    pytest.param((3, 6, 4), 1, id="interior"),
    pytest.param((4, 9), 0, id="rows"),
    pytest.param((4, 5), None, id="whole"),
    pytest.param((3, 4, 5), (2, 0), id="out of order"),
]


def plain(v, g, axis=-1):
    """Eq. 2 in plain TensorFlow, for TensorFlow to differentiate."""
    axes = [] if axis is None else [axis] if isinstance(axis, int) else list(axis)
    axes = [a % v.shape.rank for a in axes]
    rest = [a for a in range(v.shape.rank) if a not in axes]
    length = tf.sqrt(tf.reduce_sum(v * v, rest, keepdims=True))
    return tf.reshape(tf.transpose(g, np.argsort(axes)), length.shape) * v / length


def arguments(rng, shape, axis, dtype=tf.float64):
    """Returns v, g and a weight's worth of coefficients."""
    axes = [] if axis is None else [axis] if isinstance(axis, int) else axis
    shapes = shape, [shape[a] for a in axes], shape
    return [tf.constant(rng.normal(size=s), dtype) for s in shapes]


def assert_close(outputs, expected, rtol=1e-11, atol=1e-12):
    for out, truly in zip(tf.nest.flatten(outputs), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(out, truly, rtol=rtol, atol=atol)


# Derivatives of higher order.


def second_derivatives(f, v, g, c, axis):
    """Of a function that is not linear in any of w, grad_v and grad_g."""
    with tf.GradientTape() as outer:
        outer.watch([v, g, c])
        with tf.GradientTape() as inner:
            inner.watch([v, g])
            y = tf.reduce_sum(tf.sin(c * f(v, g, axis)))
        grad_v, grad_g = inner.gradient(y, [v, g])
        z = [tf.reduce_sum(tf.sin(grad_v)), tf.reduce_sum(tf.cos(grad_g))]
    return outer.gradient(z, [v, g, c])


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_second_derivatives(shape, axis, mode, rng):
    v, g, c = arguments(rng, shape, axis)
    outputs = mode(second_derivatives)(tfwn.weight_norm, v, g, c, axis)
    assert_close(outputs, second_derivatives(plain, v, g, c, axis), atol=1e-11)


@pytest.mark.parametrize("output", ["grad_v", "grad_g"])
def test_second_derivative_of_either_gradient_alone(output, mode, rng):
    v, g, c = arguments(rng, (7, 5), -1)

    def run(f):
        with tf.GradientTape() as outer:
            outer.watch([v, g])
            with tf.GradientTape() as inner:
                inner.watch([v, g])
                y = tf.reduce_sum(c * f(v, g))
            grad = inner.gradient(y, v if output == "grad_v" else g)
        return outer.gradient(grad, [v, g], unconnected_gradients="zero")

    assert_close(mode(run)(tfwn.weight_norm), run(plain))


def test_third_derivatives(mode, rng):
    v, g, c = arguments(rng, (4, 3), -1)

    @mode
    def run(f, v):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            second = second_derivatives(f, v, g, c, -1)
            y = tf.add_n([tf.reduce_sum(tf.sin(x)) for x in second])
        return tape.gradient(y, [v, g])

    expected = run(plain, v)
    assert_close(run(tfwn.weight_norm, v), expected, rtol=1e-9, atol=1e-9)

    zero = tf.constant([1, 0, 1], tf.float64)
    outputs = run(tfwn.weight_norm, v * zero)
    assert_close(outputs, [x * zero for x in expected], rtol=1e-9, atol=1e-9)


def test_hessian(mode, rng):
    v, g, c = arguments(rng, (4, 3), -1)

    @mode
    def run(f):
        with tf.GradientTape() as outer:
            outer.watch(v)
            with tf.GradientTape() as inner:
                inner.watch(v)
                y = tf.reduce_sum(tf.sin(c * f(v, g)))
            grad_v = inner.gradient(y, v)
        return outer.jacobian(grad_v, v)

    hessian = tf.reshape(run(tfwn.weight_norm), [12, 12])
    assert_close(hessian, tf.reshape(run(plain), [12, 12]))
    assert_close(hessian, tf.transpose(hessian))


def test_second_derivatives_of_a_zero_unit_are_zero(mode, rng):
    v, g, c = arguments(rng, (6, 4), -1, tf.float32)
    v = v * [1.0, 0.0, 1.0, 1.0]
    to_v, to_g, to_c = mode(second_derivatives)(tfwn.weight_norm, v, g, c, -1)
    for out in to_v[:, 1], to_g[1], to_c[:, 1]:
        np.testing.assert_array_equal(out, tf.zeros_like(out))
    others = [0, 2, 3]
    expected = second_derivatives(
        plain, *(tf.gather(tf.cast(x, tf.float64), others, axis=-1) for x in (v, g, c)), -1
    )
    outputs = [tf.gather(x, others, axis=-1) for x in (to_v, to_g, to_c)]
    assert_close(outputs, expected, rtol=1e-3, atol=1e-4)


def test_second_derivatives_of_a_unit_of_one_element_are_zero(mode, rng):
    """As its gradient: nothing but g moves it."""
    v, g, c = arguments(rng, (1, 300), -1, tf.float32)

    def run(v, g, c):
        with tf.GradientTape() as outer:
            outer.watch(v)
            with tf.GradientTape() as inner:
                inner.watch([v, g])
                y = tf.reduce_sum(tf.sin(c * tfwn.weight_norm(v, g)))
            gradients = inner.gradient(y, [v, g])
        return gradients[0], outer.gradient(gradients, v)

    for out in mode(run)(v, g, c):
        np.testing.assert_array_equal(out, tf.zeros_like(v))


@pytest.mark.parametrize("scale", [1e-15, 1e15, 1e30])
def test_second_derivatives_of_extreme_norms(scale, mode, rng):
    v, g, c = arguments(rng, (6, 4), -1)

    def run(f, dtype):
        v_ = tf.cast(v * scale, dtype)
        with tf.GradientTape() as outer:
            outer.watch(v_)
            with tf.GradientTape() as inner:
                inner.watch(v_)
                y = tf.reduce_sum(tf.cast(c, dtype) * f(v_, tf.cast(g, dtype)))
            grad_v = inner.gradient(y, v_) * scale
        return outer.gradient(grad_v, v_) * scale

    outputs = mode(run)(tfwn.weight_norm, tf.float32)
    assert_close(outputs, run(plain, tf.float64), rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_mixed_types(mode, rng):
    v, g, c = arguments(rng, (6, 4), -1)
    mixed = tf.cast(v, tf.float32), tf.cast(g, tf.bfloat16), tf.cast(c, tf.float16)
    exact = [tf.cast(x, tf.float64) for x in mixed]

    def f(v, g, axis):
        return tfwn.weight_norm(v, g, axis, out_dtype=tf.float16)

    outputs = mode(second_derivatives)(f, *mixed, -1)
    assert [x.dtype for x in outputs] == [tf.float32, tf.bfloat16, tf.float16]
    for out, truly in zip(outputs, second_derivatives(plain, *exact, -1), strict=True):
        error = np.linalg.norm(np.asarray(out, np.float64) - truly)
        assert error <= 0.02 * np.linalg.norm(truly)


def test_forward_accumulator(mode, rng):
    v, g, c = arguments(rng, (7, 5), -1)
    v_tangent, g_tangent, _ = arguments(rng, (7, 5), -1)

    def run(f):
        with tf.autodiff.ForwardAccumulator([v, g], [v_tangent, g_tangent]) as accumulator:
            w = f(v, g)
        return accumulator.jvp(w)

    assert_close(mode(run)(tfwn.weight_norm), run(plain))

    def hessian_vector_product(f):
        with (
            tf.autodiff.ForwardAccumulator([v, g], [v_tangent, g_tangent]) as accumulator,
            tf.GradientTape() as tape,
        ):
            tape.watch([v, g])
            y = tf.reduce_sum(tf.sin(c * f(v, g)))
            grads = tape.gradient(y, [v, g])
        return [accumulator.jvp(grad) for grad in grads]

    outputs = mode(hessian_vector_product)(tfwn.weight_norm)
    assert_close(outputs, hessian_vector_product(plain))


# Vectorization and loops.


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("batched", ["v", "g", "grad_w", "v g grad_w"])
def test_vectorized_map(shape, axis, batched, mode, rng):
    names = "v", "g", "grad_w"
    same = dict(zip(names, arguments(rng, shape, axis), strict=True))
    six = {name: tf.constant(rng.normal(size=[6, *same[name].shape])) for name in batched.split()}

    def run(one):
        v, g, grad_w = (one.get(name, same[name]) for name in names)
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g, axis)
        return w, *tape.gradient(w, [v, g], output_gradients=grad_w)

    outputs = mode(tf.vectorized_map)(run, six, fallback_to_while_loop=False)
    one_by_one = [run({name: x[i] for name, x in six.items()}) for i in range(6)]
    for out, expected in zip(outputs, map(tf.stack, zip(*one_by_one, strict=True)), strict=True):
        # What does not depend on the elements of the map is not repeated.
        assert_close(tf.broadcast_to(out, expected.shape), expected)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_jacobian(shape, axis, mode, rng):
    v, g, _ = arguments(rng, shape, axis)

    @mode
    def run():
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g, axis)
        return tape.jacobian(w, [v, g])

    by_v, by_g = run()
    for index in np.ndindex(*shape):
        grad_w = np.zeros(shape)
        grad_w[index] = 1
        expected = reference.weight_norm_gradient(grad_w, v, g, axis)
        assert_close([by_v[index], by_g[index]], expected)


def test_while_loop(mode, rng):
    v, g, _ = arguments(rng, (4, 4), -1)

    @mode
    def run():
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            x = tf.eye(4, dtype=tf.float64)
            _, x = tf.while_loop(
                lambda i, _: i < 3,
                lambda i, x: (i + 1, tf.tanh(x @ tfwn.weight_norm(v + x, g))),
                (0, x),
                maximum_iterations=3,
            )
        return tape.gradient(x, [v, g])

    with tf.GradientTape() as tape:
        tape.watch([v, g])
        x = tf.eye(4, dtype=tf.float64)
        for _ in range(3):
            x = tf.tanh(x @ plain(v + x, g))
    assert_close(run(), tape.gradient(x, [v, g]))


def test_gradient_of_a_gather(rng):
    """It comes as tf.IndexedSlices."""
    v, g, _ = arguments(rng, (7, 5), 0)
    rows = tf.constant([2, 0, 2])

    @tf.function
    def run(f):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            y = tf.reduce_sum(tf.sin(tf.gather(f(v, g, 0), rows)))
        return tape.gradient(y, [v, g])

    assert_close(run(tfwn.weight_norm), run(plain))


# Shapes that are not known when the graph is built.


@pytest.mark.parametrize(
    ("v_shape", "g_shape", "axis", "w_shape"),
    [
        ([None, 4], None, -1, [None, 4]),
        ([None, None], [4], -1, [None, 4]),
        ([3, None, 4], [None], 1, [3, None, 4]),
        ([None, None, None], [2, 3], (0, 2), [2, None, 3]),
        ([None, None, None], [2, 3], (2, 0), [3, None, 2]),
        (None, [4], -1, None),
        (None, None, (-2, -1), None),
        (None, None, (0, -1), None),
        (None, [4, 3], (-1, 0), None),
        ([3, None], [], None, [3, None]),
    ],
)
def test_unknown_shapes(v_shape, g_shape, axis, w_shape, rng):
    inferred = []

    @tf.function(input_signature=[tf.TensorSpec(v_shape), tf.TensorSpec(g_shape)])
    def run(v, g):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g, axis)
        grads = tape.gradient(w, [v, g])
        inferred.extend(x.shape for x in (w, grads[0]))
        return w, *grads

    rank = 3 if w_shape is None else len(w_shape)
    defaults = [3, 4] if rank == 2 else [3, 2, 4]
    sizes = [s or d for s, d in zip(w_shape or [None] * rank, defaults, strict=True)]
    v, g, _ = arguments(rng, sizes, axis, tf.float32)
    outputs = run(v, g)
    for shape in inferred:
        assert shape.as_list() == w_shape if w_shape else shape.rank is None
    ones = np.ones(sizes)
    expected = reference.weight_norm_gradient(ones, v, g, axis)
    assert_close(outputs, [reference.weight_norm(v, g, axis), *expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, (-2, -1), 0, None])
def test_vectorized_map_and_jacobian_of_unknown_rank(axis, rng):
    v, g, _ = arguments(rng, (6, 3, 2, 4), axis)
    _, g, _ = arguments(rng, (3, 2, 4), axis)
    vs, gs = v, tf.stack([g] * 6)

    def run(one):
        with tf.GradientTape() as tape:
            tape.watch(one)
            w = tfwn.weight_norm(*one, axis)
        return w, *tape.jacobian(w, one)

    spec = tf.TensorSpec(None, tf.float64)
    unknown = tf.function(
        lambda v, g: tf.vectorized_map(run, (v, g), fallback_to_while_loop=False),
        input_signature=[spec, spec],
    )
    one_by_one = [run((vs[i], gs[i])) for i in range(6)]
    assert_close(unknown(vs, gs), [tf.stack(x) for x in zip(*one_by_one, strict=True)])


def test_gradient_of_the_gradient_of_unknown_rank(rng):
    v, g, c = arguments(rng, (3, 4, 5), -2)
    spec = tf.TensorSpec(None, tf.float64)

    @tf.function(input_signature=[spec] * 3)
    def run(v, g, c):
        return second_derivatives(tfwn.weight_norm, v, g, c, -2)

    assert_close(run(v, g, c), second_derivatives(plain, v, g, c, -2))


# Grappler, SavedModel, strategies, Keras.


def test_one_kernel_forward_and_one_backward(rng):
    @tf.function
    def step(v, g, grad_w):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g)
        return w, tape.gradient(w, [v, g], output_gradients=grad_w)

    graph = step.get_concrete_function(*arguments(rng, (3, 3, 4, 5), -1)).graph
    plumbing = {"Placeholder", "Identity", "NoOp", "Const"}
    found = [op.type for op in graph.get_operations() if op.type not in plumbing]
    assert found == ["Tfwn>WeightNorm", "Tfwn>WeightNormGrad"]


def test_constants_are_folded():
    from tensorflow.core.protobuf import config_pb2
    from tensorflow.python.grappler import tf_optimizer

    v, g = np.arange(6, dtype=np.float32).reshape(3, 2), np.float32([1, 2])
    with tf.Graph().as_default() as graph:
        w = tf.identity(tfwn.weight_norm(tf.constant(v), tf.constant(g)), name="w")
        graph.add_to_collection("train_op", w)
        meta_graph = tf.compat.v1.train.export_meta_graph(graph=graph)
        before = {node.op for node in graph.as_graph_def().node}
    config = config_pb2.ConfigProto()
    config.graph_options.rewrite_options.min_graph_nodes = -1
    optimized = tf_optimizer.OptimizeGraph(config, meta_graph)
    assert "Tfwn>WeightNorm" in before
    assert "Tfwn>WeightNorm" not in {node.op for node in optimized.node}
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        tf.import_graph_def(optimized, name="")
        np.testing.assert_allclose(session.run("w:0"), reference.weight_norm(v, g), rtol=1e-6)


class Linear(tf.Module):
    def __init__(self, rng, jit_compile):
        super().__init__()
        self.v = tf.Variable(rng.normal(size=(4, 3)), dtype=tf.float32)
        self.g = tf.Variable(rng.normal(size=3), dtype=tf.float32)
        self.call = tf.function(
            lambda x: x @ tfwn.weight_norm(self.v, self.g),
            input_signature=[tf.TensorSpec([None, 4])],
            jit_compile=jit_compile,
        )


LOAD = """
import sys
import numpy as np, tensorflow as tf
import tfwn
model = tf.saved_model.load(sys.argv[1])
x = tf.constant(np.load(sys.argv[2]))
with tf.GradientTape() as tape:
    y = model.call(x)
np.savez(sys.argv[3], y, *tape.gradient(y, [model.v, model.g]))
"""


@pytest.mark.parametrize("jit_compile", [False, True])
def test_saved_model(jit_compile, tmp_path, rng):
    model = Linear(rng, jit_compile)
    x = tf.constant(rng.normal(size=(5, 4)), tf.float32)
    with tf.GradientTape() as tape:
        y = model.call(x)
    expected = [y, *tape.gradient(y, [model.v, model.g])]

    tf.saved_model.save(model, str(tmp_path / "model"))
    np.save(tmp_path / "x.npy", x)
    paths = (str(tmp_path / name) for name in ("model", "x.npy", "outputs.npz"))
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True)
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert_close(list(outputs.values()), expected, rtol=1e-6)


def test_two_replicas_train_like_one(rng):
    v, g = rng.normal(size=(4, 3)).astype("f"), rng.normal(size=3).astype("f")
    x = rng.normal(size=(6, 4)).astype("f")
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    assert len(devices) == 2

    def train(strategy):
        with strategy.scope():
            variables = [tf.Variable(v), tf.Variable(g)]
            optimizer = tf.keras.optimizers.SGD(0.1)
            optimizer.build(variables)
        replicas = strategy.num_replicas_in_sync

        @tf.function
        def step():
            def replica():
                i = tf.distribute.get_replica_context().replica_id_in_sync_group
                inputs = tf.constant(x)[i * 6 // replicas : (i + 1) * 6 // replicas]
                with tf.GradientTape() as tape:
                    y = tf.reduce_sum(tf.sin(inputs @ tfwn.weight_norm(*variables)))
                grads = tape.gradient(y, variables)
                optimizer.apply_gradients(zip(grads, variables, strict=True))

            strategy.run(replica)

        for _ in range(3):
            step()
        return [variable.numpy() for variable in variables]

    assert_close(
        train(tf.distribute.MirroredStrategy(devices)),
        train(tf.distribute.get_strategy()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("jit_compile", ["auto", False, True])
def test_keras_fit(jit_compile, rng):
    class Dense(tf.keras.layers.Layer):
        def build(self, _):
            self.v = self.add_weight(shape=(4, 3), initializer="glorot_uniform")
            self.g = self.add_weight(shape=(3,), initializer="ones")

        def call(self, x):
            return x @ tfwn.weight_norm(self.v, self.g, out_dtype=self.compute_dtype)

    model = tf.keras.Sequential(
        [Dense(dtype="mixed_bfloat16"), tf.keras.layers.Activation("linear", dtype="float32")]
    )
    model.compile(tf.keras.optimizers.Adam(0.1), "mse", jit_compile=jit_compile)
    x = rng.normal(size=(64, 4)).astype("f")
    history = model.fit(x, x[:, :3], epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]


# XLA.

XLA_LAYOUTS = [*LAYOUTS, pytest.param((64, 300), -1, id="columns"), pytest.param((), None, id="")]
XLA_LAYOUTS += [pytest.param((0, 4), -1, id="no elements"), pytest.param((4, 0), -1, id="no units")]


def forward_and_backward(v, g, grad_w, axis):
    with tf.GradientTape() as tape:
        tape.watch([v, g])
        w = tfwn.weight_norm(v, g, axis, out_dtype=grad_w.dtype)
    return w, *tape.gradient(w, [v, g], output_gradients=grad_w)


@pytest.mark.parametrize(
    "types",
    [
        (tf.float32, tf.float32, tf.float32),
        (tf.bfloat16, tf.bfloat16, tf.bfloat16),
        (tf.float16, tf.float32, tf.float16),
        (tf.float64, tf.float64, tf.float64),
        (tf.float32, tf.float64, tf.bfloat16),
    ],
    ids=lambda types: "-".join(t.name for t in types),
)
@pytest.mark.parametrize(("shape", "axis"), XLA_LAYOUTS)
def test_xla_calls_the_same_kernels(shape, axis, types, rng):
    inputs = [tf.cast(x, t) for x, t in zip(arguments(rng, shape, axis), types, strict=True)]
    compiled = tf.function(forward_and_backward, jit_compile=True)
    hlo = compiled.experimental_get_compiler_ir(*inputs, axis)(stage="hlo")
    for target in ("tfwn_weight_norm", "tfwn_weight_norm_grad"):
        assert f'custom_call_target="{target}"' in hlo
    graph = tf.function(forward_and_backward)
    for a, b in zip(graph(*inputs, axis), compiled(*inputs, axis), strict=True):
        assert a.dtype == b.dtype
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_xla_sizes_that_are_known_when_it_runs_only(rng):
    """XLA hands no such sizes to a custom call."""
    v, g, c = arguments(rng, (10, 4), -1)
    kept = tf.constant(rng.random(10) < 0.6)

    @tf.function(jit_compile=True)
    def run(v, g, c, kept):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(tf.boolean_mask(v, kept), g)
            y = tf.reduce_sum(w * tf.boolean_mask(c, kept))
        return w, *tape.gradient(y, [v, g])

    w, grad_v, grad_g = run(v, g, c, kept)
    v, c = v.numpy()[kept], c.numpy()[kept]
    assert 0 < len(v) < 10
    expected = reference.weight_norm(v, g), *reference.weight_norm_gradient(c, v, g)
    assert_close([w, grad_v.numpy()[kept], grad_g], expected)


WITHOUT_HANDLERS = """
import numpy as np, tensorflow as tf
import tfwn
from tests import reference
from tests.tfwn.test_ops_transforms import arguments, forward_and_backward

rng = np.random.default_rng(0)
compiled = tf.function(forward_and_backward, jit_compile=True)
tolerance = {"float16": 2e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-14}
for types in [
    ["float32"] * 3, ["float64"] * 3, ["bfloat16"] * 3,
    ["float32", "bfloat16", "float16"], ["float32", "float64", "float32"],
]:
    for (shape, axis), size in [
        (((300, 7), -1), 1), (((7, 65, 33), 1), 1), (((9, 40), 0), 1), (((37, 41), None), 1),
        (((5, 4, 3, 2), (-2, -1)), 1), (((), None), 1), (((0, 4), -1), 1), (((4, 0), -1), 1),
        (((300, 7), -1), 1e-30), (((300, 7), -1), 1e29), (((1, 300), -1), 1),
    ]:
        v, g, c = arguments(rng, shape, axis)
        v *= size
        if shape == (7, 65, 33):
            v *= tf.cast(tf.range(65) != 3, v.dtype)[:, None]
        v, g, c = inputs = [tf.cast(x, t) for x, t in zip([v, g, c], types)]
        hlo = compiled.experimental_get_compiler_ir(*inputs, axis)(stage="hlo")
        assert "custom-call" not in hlo
        assert ("f64[" in hlo) == ("float64" in types)
        outputs = compiled(*inputs, axis)
        grad_v, grad_g = reference.weight_norm_gradient(c, v, g, axis)
        if shape in ((1, 300), ()):
            grad_v[...] = 0  # where the reference leaves rounding
        expected = reference.weight_norm(v, g, axis), grad_v, grad_g
        for out, truly, wide in zip(outputs, expected, (c, v, g)):
            assert out.dtype == wide.dtype
            out = out.numpy().astype(np.float64)
            assert out.shape == truly.shape and np.isfinite(out).all()
            worst = max(tolerance[wide.dtype.name], tolerance[v.dtype.name])
            error, largest = np.linalg.norm(out - truly), np.linalg.norm(truly)
            assert error <= worst * largest, (types, shape, axis, size, error / largest)
"""


def test_xla_without_handlers():
    """As on a platform that has none: eq. 2 and 3 in XLA's operations."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HANDLERS],
        env=os.environ | {"TFWN_XLA_HANDLERS": "0"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


LATE = """
import tensorflow as tf
double = tf.function(lambda x: x + x, jit_compile=True)
assert double(tf.ones([])) == 2
import tfwn
w = tf.function(tfwn.weight_norm, jit_compile=True)(tf.constant([[3.0], [4.0]]), [10.0])
assert abs(w[0, 0] - 6) < 1e-6, w
"""


def test_xla_though_the_process_used_it_before_the_import():
    subprocess.run([sys.executable, "-c", LATE], check=True)
