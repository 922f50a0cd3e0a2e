"""Tests tfwn.native's kernels against float64, on the CPU and on an emulated CUDA device.

The emulation runs csrc/weight_norm_cuda.cu on the CPU (see cuda_on_cpu/cuda_runtime.h), and its
device arrays are NumPy arrays with the CUDA array interface.
"""

import numpy as np
import pytest

from tests.csrc.native_cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    LAYOUTS,
    CudaArray,
    Kernels,
    bits,
    check,
)


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request):
    module = request.getfixturevalue(request.param)
    return Kernels(module, CudaArray if request.param == "cuda" else None)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
def test_layouts_agree_with_float64(kernels, shape, axis):
    check(kernels, shape, axis)


@pytest.mark.parametrize(
    "types",
    [
        (DOUBLE, DOUBLE, DOUBLE),
        (HALF, HALF, HALF),
        (BFLOAT, BFLOAT, BFLOAT),
        (FLOAT, FLOAT, HALF),
        (FLOAT, FLOAT, BFLOAT),
        (HALF, FLOAT, BFLOAT),
        (BFLOAT, DOUBLE, FLOAT),
        (DOUBLE, HALF, FLOAT),
    ],
    ids=lambda types: "-".join(np.dtype(t).name for t in types),
)
@pytest.mark.parametrize(
    ("shape", "axis"), [((129, 40), -1), ((40, 129), 0), ((64, 27), 0)], ids=str
)
def test_types_agree_with_float64(kernels, shape, axis, types):
    check(kernels, shape, axis, types)


@pytest.mark.parametrize("axis", [(0, 2), (2, 0), (1, 0), (-1, -2), (0, 1, 2)], ids=str)
def test_any_axes_of_a_numpy_array(cpu, axis):
    check(Kernels(cpu), (6, 50, 7), axis)
    v, g = np.ones((6, 50, 7), BFLOAT), np.ones([(6, 50, 7)[a] for a in axis])
    w, norm = cpu.weight_norm(v, g, axis)
    assert w.dtype == BFLOAT
    assert norm.shape == g.shape
    grad_v, _ = cpu.weight_norm_grad(w, v, g, norm, axis)
    assert grad_v.dtype == BFLOAT
    assert grad_v.shape == v.shape


@pytest.mark.parametrize("exponent", [-30, -20, 20, 30])
@pytest.mark.parametrize(("shape", "axis"), [((100, 24), -1), ((24, 100), 0)], ids=str)
def test_norms_from_1e_minus_30_to_1e30(kernels, exponent, shape, axis):
    check(kernels, shape, axis, scale=10.0**exponent / 10)


@pytest.mark.parametrize("exponent", [-25, 20])
@pytest.mark.parametrize("types", [(FLOAT,) * 3, (BFLOAT,) * 3], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((1003, 37), -1), ((24, 1003), 0), ((64, 27), 0)], ids=str
)
def test_products_beyond_float(kernels, exponent, types, shape, axis):
    """The gradients are in range even though the products grad_w * v overflow or underflow."""
    check(kernels, shape, axis, types, scale=10.0**exponent, grad_w_scale=1e20 ** np.sign(exponent))


def test_one_column_beyond_float(kernels, rng):
    """The other columns, which share vectors with it, must keep their results."""
    v, grad_w = (rng.normal(size=(1003, 37)).astype(FLOAT) for _ in range(2))
    g = np.ones(37, FLOAT)

    def results():
        w, norm = kernels.weight_norm(v, g, -1)
        return w, norm, *kernels.weight_norm_grad(grad_w, v, g, norm, -1)

    before = results()
    v[:, 5] *= FLOAT(2.0**80)
    grad_w[:, 5] *= FLOAT(2.0**60)
    after = results()
    others = np.arange(37) != 5
    for x, y in zip(after, before, strict=True):
        np.testing.assert_allclose(x[..., others], y[..., others], rtol=1e-5, atol=1e-5)
    assert np.isfinite(after[2]).all()
    np.testing.assert_allclose(after[1][5], before[1][5] * 2.0**80, rtol=1e-6)
    size = np.linalg.norm(grad_w[:, 5].astype(np.float64))
    np.testing.assert_allclose(after[3][5], before[3][5] * 2.0**60, atol=1e-6 * size)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_zero_unit_has_zero_results(kernels, axis, rng):
    v = rng.normal(size=(20, 30)).astype(FLOAT)
    v[(slice(None), 3) if axis == 1 else 3] = 0
    g, grad_w = np.ones(v.shape[axis], FLOAT), np.ones_like(v)
    w, norm = kernels.weight_norm(v, g, axis)
    grad_v, grad_g = kernels.weight_norm_grad(grad_w, v, g, norm, axis)
    for unit in (w.take(3, axis), norm[3], grad_v.take(3, axis), grad_g[3]):
        assert (unit == 0).all()
    for result in (w, norm, grad_v, grad_g):
        assert np.isfinite(result).all()


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 300), -1), ((300, 1), 0), ((3, 1, 50), 0)], ids=str
)
def test_the_only_nonzero_element_has_no_gradient(kernels, shape, axis, rng):
    v = rng.normal(size=shape).astype(FLOAT)
    v[..., 1:] *= shape[axis] != 3
    g, grad_w = rng.normal(size=shape[axis]).astype(FLOAT), rng.normal(size=shape).astype(FLOAT)
    _, norm = kernels.weight_norm(v, g, axis)
    grad_v, _ = kernels.weight_norm_grad(grad_w, v, g, norm, axis)
    assert (grad_v[v != 0] == 0).all()
    assert (grad_v[v == 0] != 0).all()


@pytest.mark.parametrize(("shape", "axis"), [((0, 5), -1), ((5, 0), -1), ((0,), None)], ids=str)
def test_empty_sums_are_zero(kernels, shape, axis):
    v = np.zeros(shape, FLOAT)
    g = np.ones([] if axis is None else shape[axis], FLOAT)
    w, norm = kernels.weight_norm(v, g, axis)
    grad_v, grad_g = kernels.weight_norm_grad(w, v, g, norm, axis)
    assert w.shape == grad_v.shape == shape
    assert (norm == 0).all()
    assert (grad_g == 0).all()


@pytest.mark.parametrize(("shape", "axis"), [((3000, 70), -1), ((70, 3000), 0)], ids=str)
def test_threads_do_not_change_a_bit(cpu, shape, axis, rng):
    v, grad_w = (rng.normal(size=shape).astype(FLOAT) for _ in range(2))
    g = rng.normal(size=shape[axis]).astype(FLOAT)
    w, norm = cpu.weight_norm(v, g, axis, threads=1)
    gradients = cpu.weight_norm_grad(grad_w, v, g, norm, axis, threads=1)
    for threads in (0, 2, 3, 16):
        assert bits(cpu.weight_norm(v, g, axis, threads=threads)) == bits((w, norm))
        again = cpu.weight_norm_grad(grad_w, v, g, norm, axis, threads=threads)
        assert bits(again) == bits(gradients)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axis"), [*LAYOUTS, ((20_000, 3), -1), ((700, 300), -1)], ids=str
)
def test_grad_v_in_the_memory_of_grad_w(kernels, shape, axis, dtype, rng):
    v, grad_w = (np.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    kept = [] if axis is None else np.atleast_1d(axis)
    g = np.asarray(rng.normal(size=[shape[a] for a in kept]), dtype)
    _, norm = kernels.weight_norm(v, g, axis)
    expected = kernels.weight_norm_grad(grad_w, v, g, norm, axis)
    grad_g = np.empty_like(g)
    arrays = [kernels.wrap(array) for array in (grad_w, v, g, norm, grad_g)]
    kernels.module.weight_norm_grad(*arrays[:4], axis, out=(arrays[0], arrays[4]))
    assert bits((grad_w, grad_g)) == bits(expected)


@pytest.mark.parametrize("columns", [1024, 1022], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])
def test_a_weight_beyond_the_caches(cpu, dtype, axis, columns):
    """Such a result is written with streaming stores if its rows start at cache lines."""
    rows = (33 << 20) // (1024 * np.dtype(dtype).itemsize)
    check(Kernels(cpu), (rows, columns), axis, (dtype, dtype, dtype))


@pytest.mark.parametrize("v_type", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_subnormal_bfloat16(cpu, axis, v_type):
    """Subnormals are kept, although the processor's conversion instruction flushes them to 0."""
    v = np.ones((64, 64), v_type)
    g = np.asarray(2.0 ** np.arange(-130.0, -66.0), FLOAT)
    w, _ = cpu.weight_norm(v, g, axis, BFLOAT)
    expected = np.broadcast_to(g / FLOAT(8), (64, 64)).astype(BFLOAT)
    assert (expected[:, 0] != 0).all()
    np.testing.assert_array_equal(w, expected if axis == -1 else expected.T)
