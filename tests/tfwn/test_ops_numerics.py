"""Tests the values of weight_norm and its gradient against float64, for every layout and type, at
extreme magnitudes, and with any number of threads."""

import hashlib
import itertools
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import tfwn
from tests import reference

# These sizes straddle those of vectors, tiles and tasks.
LAYOUTS = [
    pytest.param((3136, 512), -1, id="dense"),
    pytest.param((3, 3, 96, 96), -1, id="HWIO"),
    pytest.param((3, 3, 20, 48), -2, id="HWOI"),
    pytest.param((5, 5, 33, 2), (-2, -1), id="depthwise"),
    pytest.param((65, 1040), 0, id="rows"),
    pytest.param((7, 65, 33), 1, id="interior"),
    pytest.param((37, 41), None, id="whole"),
    pytest.param((100_000, 3), -1, id="narrow"),
    pytest.param((2, 5000), -1, id="wide"),
    pytest.param((1001, 1), -1, id="one unit"),
    pytest.param((3, 300_000), 0, id="few long rows"),
    pytest.param((9, 8, 7, 6), (0, 2), id="not adjacent"),
    pytest.param((9, 8, 7, 6), (3, 1), id="out of order"),
]
TYPES = [tf.float16, tf.bfloat16, tf.float32, tf.float64]
# The error from rounding the result to its type once, and a little for the sums.
TOLERANCES = {tf.float16: 5e-4, tf.bfloat16: 4e-3, tf.float32: 5e-7, tf.float64: 2e-15}


def g_shape(shape, axis):
    axes = [] if axis is None else [axis] if isinstance(axis, int) else axis
    return [shape[a] for a in axes]


def forward_and_backward(v, g, grad_w, axis=-1, mode=lambda f: f):
    """Returns w, grad_v and grad_g. w has grad_w's type."""

    def run(v, g, grad_w):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g, axis, out_dtype=grad_w.dtype)
        return w, *tape.gradient(w, [v, g], output_gradients=grad_w)

    return mode(run)(v, g, grad_w)


def truth(v, g, grad_w, axis=-1):
    return (
        reference.weight_norm(v, g, axis),
        *reference.weight_norm_gradient(grad_w, v, g, axis),
    )


def relative_error(out, expected):
    out, expected = np.asarray(out, np.float64), np.asarray(expected)
    assert out.shape == expected.shape
    largest = np.abs(expected).max()  # So that no square leaves the range of float64.
    return np.linalg.norm((out - expected) / largest) / np.linalg.norm(expected / largest)


def random_arguments(rng, shape, axis, types=(tf.float32,) * 3):
    """Returns v, g and grad_w."""
    shapes = shape, g_shape(shape, axis), shape
    return [tf.constant(rng.normal(size=s), t) for s, t in zip(shapes, types, strict=True)]


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_float32_to_a_few_ulp(shape, axis, mode, rng):
    arguments = random_arguments(rng, shape, axis)
    outputs = forward_and_backward(*arguments, axis, mode)
    for out, expected in zip(outputs, truth(*arguments, axis), strict=True):
        assert relative_error(out, expected) <= 5e-7


def types_id(types):
    return "-".join(t.name for t in types)


@pytest.mark.parametrize("types", list(itertools.product(TYPES, repeat=3)), ids=types_id)
def test_types_mix(types, mode, rng):
    v_type, g_type, w_type = types
    for shape, axis in [((70, 19), -1), ((6, 5, 40), 1), ((3, 130), 0), ((20, 9), None)]:
        arguments = random_arguments(rng, shape, axis, types)
        outputs = forward_and_backward(*arguments, axis, mode)
        expected = truth(*arguments, axis)
        for out, truly, dtype in zip(outputs, expected, (w_type, v_type, g_type), strict=True):
            assert out.dtype == dtype
            # All arithmetic is in double only if both v and w are double.
            exact = dtype != tf.float64 or (v_type == tf.float64 and w_type == tf.float64)
            tolerance = TOLERANCES[dtype] if exact else TOLERANCES[tf.float32]
            assert relative_error(out, truly) <= tolerance


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("axis", [-1, 0, 1, None])
def test_a_zero_unit_has_zero_weights_and_gradients(axis, dtype, mode, rng):
    v, g, grad_w = random_arguments(rng, (5, 4, 6), axis, (dtype,) * 3)
    v = v.numpy()
    zero = ... if axis is None else tuple(2 if a == axis % 3 else slice(None) for a in range(3))
    v[zero] = 0
    outputs = forward_and_backward(tf.constant(v), g, grad_w, axis, mode)
    for out, expected in zip(outputs, truth(v, g, grad_w, axis), strict=True):
        out = out.numpy().astype(np.float64)
        unit = zero if out.ndim == 3 or axis is None else 2
        assert np.all(out[unit] == 0)
        assert np.all(np.isfinite(out))
        assert np.linalg.norm(out - expected) <= TOLERANCES[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_zero_unit_is_zero_even_if_g_or_a_gradient_is_infinite(axis, dtype, mode, rng):
    v, g, grad_w = (x.numpy() for x in random_arguments(rng, (20, 20), axis, (dtype,) * 3))
    if axis == 0:
        v, grad_w = v.T, grad_w.T  # So that units are columns below.
    v[:, 2], grad_w[7, 2], g[2] = 0, np.inf, np.inf
    if axis == 0:
        v, grad_w = v.T, grad_w.T
    w, grad_v, grad_g = forward_and_backward(*map(tf.constant, (v, g, grad_w)), axis, mode)
    w, grad_v = (x.numpy() if axis == -1 else x.numpy().T for x in (w, grad_v))
    assert not w[:, 2].any()
    assert grad_g[2] == 0
    assert not np.delete(grad_v[:, 2], 7).any()


@pytest.mark.parametrize(
    ("dtype", "decades"),
    [(tf.float32, 30), (tf.bfloat16, 30), (tf.float64, 150)],
    ids=["float32", "bfloat16", "float64"],
)
def test_norms_from_1e_minus_30_to_1e30(dtype, decades, mode, rng):
    """In float64, from 1e-150 to 1e150."""
    v, g, grad_w = random_arguments(rng, (50, 7), -1, (dtype,) * 3)
    scale = 10.0 ** np.linspace(-decades, decades, 7)
    v = tf.constant(v.numpy().astype(np.float64) / reference.norm(v) * scale, dtype)
    # With a g of v's magnitude, neither w nor grad_v leaves the range of the type.
    for g_ in (g, tf.cast(scale, dtype)):
        outputs = forward_and_backward(v, g_, grad_w, mode=mode)
        expected = truth(v, g_, grad_w)
        for unit in range(7):
            for out, truly in zip(outputs, expected, strict=True):
                most = np.finfo(np.float64 if dtype == tf.float64 else np.float32).max
                if np.abs(truly[..., unit]).max() < most:
                    error = relative_error(out[..., unit], truly[..., unit])
                    assert error <= TOLERANCES[dtype], f"||v|| = {scale[unit]}"


def test_float16_norms_beyond_its_range():
    v = tf.fill([1000, 2], tf.constant(60000.0, tf.float16))
    w = tfwn.weight_norm(v, tf.constant([1.0, 1000.0], tf.float16))
    np.testing.assert_allclose(w[0], np.array([1, 1000]) / np.sqrt(1000), rtol=1e-3)
    v = tf.fill([4, 1], tf.constant(6e-8, tf.float16))
    np.testing.assert_array_equal(tfwn.weight_norm(v, [1.0]), tf.fill([4, 1], 0.5))


def test_nan_stays_in_its_unit(mode, rng):
    v, g, grad_w = random_arguments(rng, (40, 20), -1)
    v = v.numpy()
    v[3, 5] = np.nan
    for out in forward_and_backward(tf.constant(v), g, grad_w, mode=mode):
        nan = np.isnan(out)
        assert nan[..., 5].all()
        assert nan.sum() == nan[..., 5].size


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 4), -1), ((4, 0), -1), ((0, 4), 0), ((4, 0), 0), ((0,), None), ((2, 0, 3), (0, 2))],
)
def test_empty(shape, axis, mode, rng):
    arguments = random_arguments(rng, shape, axis)
    w, grad_v, grad_g = forward_and_backward(*arguments, axis, mode)
    assert w.shape == grad_v.shape == shape
    np.testing.assert_array_equal(grad_g, np.zeros(g_shape(shape, axis)))


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(("shape", "axis"), [((1, 300), -1), ((300, 1), 0), ((1, 300, 1), 1)])
def test_a_unit_of_one_element_has_no_direction_to_learn(shape, axis, dtype, mode, rng):
    """Adam would turn rounding errors of eq. 3 into full-size steps and flip the sign of w."""
    v, g, grad_w = random_arguments(rng, shape, axis, (dtype,) * 3)
    _, grad_v, _ = forward_and_backward(v, g, grad_w, axis, mode)
    np.testing.assert_array_equal(grad_v, tf.zeros(shape))


def test_the_only_unmasked_element_has_no_direction_to_learn(mode, rng):
    v, g, grad_w = random_arguments(rng, (50, 300), -1)
    mask = np.eye(50, 300, dtype=np.float32)[:, rng.permutation(300) % 50]
    outputs = forward_and_backward(v * mask, g, grad_w, mode=mode)
    np.testing.assert_array_equal(outputs[1] * mask, tf.zeros_like(v))
    for out, expected in zip(outputs, truth(v * mask, g, grad_w), strict=True):
        assert relative_error(out, expected) <= TOLERANCES[tf.float32]


def test_what_is_not_rounding_stays(mode, rng):
    """With grad_w within 1e-5 of v's direction, the small grad_v is real and must not become 0."""
    v, g, across = random_arguments(rng, (400, 30), -1, (tf.float64,) * 3)
    grad_w = tf.cast(v + 1e-5 * across, tf.float32)
    v, g = tf.cast(v, tf.float32), tf.cast(g, tf.float32)
    _, grad_v, _ = forward_and_backward(v, g, grad_w, mode=mode)
    # As accurate as floats can be when five digits cancel.
    assert relative_error(grad_v, truth(v, g, grad_w)[1]) <= 1e-2
    infinite = grad_w * np.where(np.arange(400) == 7, np.inf, 1).astype(np.float32)[:, None]
    _, grad_v, _ = forward_and_backward(v, g, infinite, mode=mode)
    assert not np.isfinite(grad_v).any()


def test_scalar(mode):
    outputs = forward_and_backward(*map(tf.constant, (-3.0, 2.0, 5.0)), None, mode)
    np.testing.assert_allclose(outputs, [-2.0, 0.0, -5.0], rtol=2e-7)


def test_every_axis_kept_leaves_the_sign(mode, rng):
    """If every element is a unit of its own, w = g sign(v)."""
    v, g, grad_w = random_arguments(rng, (3, 4), (0, 1))
    w, _, _ = forward_and_backward(v, g, grad_w, (0, 1), mode)
    np.testing.assert_allclose(w, g * tf.sign(v), rtol=3e-7)


def test_three_witnesses(mode, rng):
    """The kernel, eq. 3 in NumPy, and TensorFlow's derivatives of eq. 2 agree."""
    for shape, axis in [((30, 7), -1), ((4, 5, 6), 1), ((4, 50), 0)]:
        v, g, grad_w = random_arguments(rng, shape, axis, (tf.float64,) * 3)
        axes = [a for a in range(len(shape)) if a != axis % len(shape)]
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            length = tf.sqrt(tf.reduce_sum(v * v, axes, keepdims=True))
            w = tf.reshape(g, length.shape) * v / length
        derived = [w, *tape.gradient(w, [v, g], output_gradients=grad_w)]
        outputs = forward_and_backward(v, g, grad_w, axis, mode)
        for kernel, numpy, tensorflow in zip(
            outputs, truth(v, g, grad_w, axis), derived, strict=True
        ):
            assert relative_error(kernel, numpy) <= 1e-14
            assert relative_error(tensorflow, numpy) <= 1e-14


DIGEST = """
import hashlib, sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
import tfwn
mode = {"eager": lambda f: f, "function": tf.function, "xla": tf.function(jit_compile=True)}
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for shape, axis, w_type in [
    ((1568, 512), -1, "float32"), ((99_999, 8), -1, "float32"), ((513, 1030), 0, "bfloat16"),
    ((3, 300_001), 0, "float32"), ((9, 64, 128), 1, "float16"), ((1_000_003,), None, "float32"),
    ((5000, 1024), -1, "float32"),  # the CPU kernels' callers cut what moves 16 MiB
]:
    v, grad_w = (tf.constant(rng.standard_normal(shape, "float32")) for _ in "12")
    grad_w = tf.cast(grad_w, w_type)
    g = tf.constant(rng.standard_normal([] if axis is None else shape[axis]), "float32")
    def run(v, g, grad_w):
        with tf.GradientTape() as tape:
            tape.watch([v, g])
            w = tfwn.weight_norm(v, g, axis, out_dtype=w_type)
        return w, *tape.gradient(w, [v, g], output_gradients=grad_w)
    for out in mode[sys.argv[2]](run)(v, g, grad_w):
        digest.update(out.numpy().tobytes())
print(digest.hexdigest())
"""


def test_bit_identical_for_any_number_of_threads_in_any_mode():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(threads), mode],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for threads, mode in [(1, "eager"), (2, "function"), (7, "xla")]
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


@st.composite
def shapes_and_axes(draw):
    shape = draw(st.lists(st.integers(0, 9), max_size=5))
    axis = draw(st.none() | st.permutations(range(len(shape))))
    if axis is not None:
        axis = axis[: draw(st.integers(0, len(shape)))]
        axis = [draw(st.sampled_from([a, a - len(shape)])) for a in axis]
    return shape, axis


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    shape_and_axis=shapes_and_axes(),
    types=st.tuples(*[st.sampled_from(TYPES)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_problems(mode, shape_and_axis, types, seed):
    """Any layout and types, norms far from 1, and units of zeros."""
    shape, axis = shape_and_axis
    rng = np.random.default_rng(seed)
    v = reference.units_of(rng.normal(size=shape), axis)
    decades = 2 if tf.float16 in types else 30
    norm = 10 ** rng.uniform(-decades, decades, v.shape[:-1]) * (rng.random(v.shape[:-1]) < 0.9)
    v = reference.from_units(v * norm[..., np.newaxis], shape, axis)
    # As large as v, so that nothing leaves the range of its type.
    g = rng.normal(size=norm.shape) * norm
    grad_w = rng.normal(size=shape)
    v, g, grad_w = (tf.constant(x, dtype) for x, dtype in zip((v, g, grad_w), types, strict=True))

    outputs = forward_and_backward(v, g, grad_w, axis, mode)
    computed = tf.float64 if v.dtype == grad_w.dtype == tf.float64 else tf.float32
    tolerances = [max(TOLERANCES[x.dtype], TOLERANCES[computed]) for x in outputs]
    # The spacing of each type's smallest numbers, which float16 results reach.
    steps = [2.0**-24 if x.dtype == tf.float16 else np.finfo(np.float32).tiny for x in outputs]
    w, grad_v, grad_g = (np.asarray(x, np.float64) for x in outputs)
    true_w, true_grad_v, true_grad_g = truth(v, g, grad_w, axis)

    def length(x):
        return reference.norm(x, axis)

    # Per unit, relative to the first term of eq. 3, because its terms may cancel.
    scale = np.abs(np.asarray(g, np.float64)) * reference.inverse_norm(v, axis)
    for name, error, size, tolerance, step in zip(
        ("w", "grad_v", "grad_g"),
        (length(w - true_w), length(grad_v - true_grad_v), np.abs(grad_g - true_grad_g)),
        (length(true_w), scale * length(grad_w), length(grad_w)),
        tolerances,
        steps,
        strict=True,
    ):
        excess = error / (tolerance * size + step * np.sqrt(max(1, w.size) / max(1, scale.size)))
        assert np.max(excess, initial=0) <= 1, name
