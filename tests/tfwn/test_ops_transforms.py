"""Tests weight_norm when TensorFlow vectorizes, loops, saves, replicates or folds it."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfwn
from tests import reference
from tests.tfwn.op_cases import LAYOUTS, arguments, assert_close, plain, second_derivatives

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
        # A result that does not depend on the map's elements is not repeated.
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
    """The gradient of a gather is tf.IndexedSlices."""
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


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float64], ids=lambda t: t.name)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3000, 70), -1), ((41, 1003), 0), ((7, 65, 33), 1), ((1001, 3), -1)]
)
def test_grad_v_may_take_the_memory_of_grad_w(shape, axis, jit_compile, dtype, rng):
    """TensorFlow reuses the memory if nothing else reads grad_w; the results must not change."""
    v, g, c = (tf.cast(x, dtype) for x in arguments(rng, shape, axis))

    @tf.function(jit_compile=jit_compile)
    def run(v, g, c, kept):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g, axis)
        grad_w = tf.sin(c)
        return tape.gradient(w, [v, g], output_gradients=grad_w), [grad_w] if kept else []

    given, _ = run(v, g, c, kept=False)
    expected, _ = run(v, g, c, kept=True)
    for a, b in zip(given, expected, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


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
