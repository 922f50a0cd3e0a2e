"""Tests weight_norm under XLA: kernels in custom calls, or XLA operations as a fallback."""

import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

import tfwn
from tests import reference
from tests.tfwn.op_cases import LAYOUTS, arguments, assert_close

MORE_LAYOUTS = [*LAYOUTS, pytest.param((64, 300), -1, id="columns"), pytest.param((), None, id="")]
MORE_LAYOUTS += [
    pytest.param((0, 4), -1, id="no elements"),
    pytest.param((4, 0), -1, id="no units"),
]


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
@pytest.mark.parametrize(("shape", "axis"), MORE_LAYOUTS)
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
    """XLA cannot pass such sizes to a custom call."""
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
from tests.tfwn.op_cases import arguments
from tests.tfwn.test_ops_xla import forward_and_backward

rng = np.random.default_rng(0)
compiled = tf.function(forward_and_backward, jit_compile=True)
tolerance = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 2e-6, "float64": 1e-14}
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

# g / norm leaves the range of float, but grad_v does not.
for v_size, g_size, c_size in [
    (1e29, 1e-10, 1e20), (1e25, 1e-13, 1e10), (1e20, 1e-19, 1e5), (1e-31, 1e10, 1e-25)
]:
    v, g, c = arguments(rng, (50, 2), -1)
    v, g, c = v * v_size, g * g_size, c * c_size
    _, grad_v, _ = compiled(v, g, c, -1)
    truly, _ = reference.weight_norm_gradient(c, v, g)
    error = np.linalg.norm(grad_v - truly) / np.linalg.norm(truly)
    assert error <= tolerance["float32"], (v_size, error)

v, g, c = arguments(rng, (50, 2), -1)
infinite = np.where(np.arange(50) == 7, np.inf, 1)[:, None].astype(np.float32)
w, grad_v, grad_g = compiled(v * [1, 0], g * [1, np.inf], c * infinite, -1)
assert not w.numpy()[:, 1].any() and grad_g[1] == 0
assert not np.delete(grad_v[:, 1], 7).any()
"""


def test_xla_without_handlers():
    """A platform without handlers computes eqs. 2 and 3 in XLA's operations."""
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
