"""tfwn.native: the kernels on arrays, against float64, on the CPU and on an emulated CUDA device.

There, csrc/weight_norm_cuda.cu runs on the CPU (see cuda_on_cpu/cuda_runtime.h) and a device array
is a NumPy array that says it is one.
"""

import doctest
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

HALF, BFLOAT, FLOAT, DOUBLE = np.float16, ml_dtypes.bfloat16, np.float32, np.float64


class CudaArray:
    """A NumPy array, in the guise of one on a device."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        interface = self.array.__array_interface__
        return {key: interface[key] for key in ("shape", "typestr", "data", "strides")} | {
            "version": 3,
            "stream": 7,
        }


class Kernels:
    """Either module with the CPU module's signatures, and a guard around every result."""

    def __init__(self, module, wrap=None):
        self.module, self.wrap = module, wrap or (lambda array: array)

    def weight_norm(self, v, g, axis=-1, out_dtype=None, **options):
        norm_type = DOUBLE if v.dtype == DOUBLE else FLOAT
        w, norm = Guarded(v.shape, out_dtype or v.dtype), Guarded(g.shape, norm_type)
        out = (self.wrap(w.array), self.wrap(norm.array))
        inputs = map(self.wrap, (v, g))
        assert self.module.weight_norm(*inputs, axis, out=out, **options) == out
        return w.checked(), norm.checked()

    def weight_norm_grad(self, grad_w, v, g, norm, axis=-1, **options):
        grad_v, grad_g = Guarded(v.shape, v.dtype), Guarded(g.shape, g.dtype)
        out = (self.wrap(grad_v.array), self.wrap(grad_g.array))
        inputs = map(self.wrap, (grad_w, v, g, norm))
        assert self.module.weight_norm_grad(*inputs, axis, out=out, **options) == out
        return grad_v.checked(), grad_g.checked()


class Guarded:
    """An array with bytes around it that must stay as they are."""

    def __init__(self, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.bytes = np.full(size + 128, 0xA5, np.uint8)
        self.array = self.bytes[64 : 64 + size].view(dtype).reshape(shape)

    def checked(self):
        assert (self.bytes[:64] == 0xA5).all(), "wrote before the array"
        assert (self.bytes[-64:] == 0xA5).all(), "wrote past the array"
        return self.array


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request):
    module = request.getfixturevalue(request.param)
    return Kernels(module, CudaArray if request.param == "cuda" else None)


def reference(v, g, grad_w, axis):
    """Eq. 2 and 3 in float64: w, norm, grad_v, grad_g, and the first term of grad_v."""
    v, g, grad_w = (x.astype(np.float64) for x in (v, g, grad_w))
    kept = [] if axis is None else [a % v.ndim for a in np.atleast_1d(axis)]
    reduced = tuple(a for a in range(v.ndim) if a not in kept)

    def spread(unit):  # to v's rank, its axes in v's order
        unit = unit.transpose(np.argsort(kept)) if kept else unit
        return np.expand_dims(unit, reduced)

    def gather(total):  # the reverse
        return total.transpose(np.argsort(np.argsort(kept))) if kept else total

    norm = np.sqrt((v * v).sum(reduced))
    inverse = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    grad_g = (grad_w * v).sum(reduced) * inverse
    projection = np.expand_dims(grad_g * inverse, reduced)
    inverse = np.expand_dims(inverse, reduced)
    w = spread(g) * (v * inverse)
    first = spread(g) * (inverse * grad_w)
    grad_v = first - spread(g) * (inverse * (projection * v))
    return w, gather(norm), grad_v, gather(grad_g), first


def error(actual, expected, relative_to=None):
    actual = actual.astype(np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    size = np.linalg.norm(expected if relative_to is None else relative_to)
    return np.linalg.norm(actual - expected) / size


TOLERANCE = {HALF: 5e-4, BFLOAT: 4e-3, FLOAT: 5e-7, DOUBLE: 1e-14}


def check(kernels, shape, axis, types=(FLOAT, FLOAT, FLOAT), scale=1.0, rng=None):
    v_type, g_type, w_type = types
    rng = rng or np.random.default_rng()
    kept = [] if axis is None else [a % len(shape) for a in np.atleast_1d(axis)]
    v = np.asarray(rng.normal(size=shape) * scale, v_type)
    g = np.asarray(rng.normal(size=[shape[a] for a in kept]), g_type)
    grad_w = np.asarray(rng.normal(size=shape), w_type)
    w, norm = kernels.weight_norm(v, g, axis, w_type)
    grad_v, grad_g = kernels.weight_norm_grad(grad_w, v, g, norm, axis)
    expected = reference(v, g, grad_w, axis)
    widest = TOLERANCE[DOUBLE if v_type == DOUBLE else FLOAT]
    assert error(w, expected[0]) <= max(TOLERANCE[w_type], widest)
    assert error(norm, expected[1]) <= widest
    # Where a unit has few elements grad_v is a small difference of large numbers.
    assert error(grad_v, expected[2], expected[4]) <= max(TOLERANCE[v_type], widest)
    # A sum of terms of either sign may be near 0 by chance: relative to the size of such sums.
    sums = np.maximum(np.abs(expected[3]), np.sqrt(np.mean(grad_w.astype(np.float64) ** 2)))
    assert error(grad_g, expected[3], sums) <= max(TOLERANCE[g_type], widest)


LAYOUTS = [
    ((300, 64), -1),
    ((2000, 6), -1),
    ((3, 5, 7, 33), -1),
    ((1, 1000), -1),
    ((37, 9, 20), -2),
    ((3, 3, 40, 96), -2),
    ((3, 3, 12, 5), (-2, -1)),
    ((33, 300), 0),
    ((3, 70_001), 0),
    ((17, 31, 3), None),
    ((100_003,), None),
    ((50,), 0),
    ((), None),
]


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
@pytest.mark.parametrize(("shape", "axis"), [((129, 40), -1), ((40, 129), 0)], ids=str)
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


def bits(arrays):
    return [array.tobytes() for array in arrays]


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
    """Written past the caches, where its rows begin at cache lines."""
    rows = (33 << 20) // (1024 * np.dtype(dtype).itemsize)
    check(Kernels(cpu), (rows, columns), axis, (dtype, dtype, dtype))


@pytest.mark.parametrize("v_type", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_subnormal_bfloat16(cpu, axis, v_type):
    """Which the processor's own instruction would take for 0."""
    v = np.ones((64, 64), v_type)
    g = np.asarray(2.0 ** np.arange(-130.0, -66.0), FLOAT)
    w, _ = cpu.weight_norm(v, g, axis, BFLOAT)
    expected = np.broadcast_to(g / FLOAT(8), (64, 64)).astype(BFLOAT)
    assert (expected[:, 0] != 0).all()
    np.testing.assert_array_equal(w, expected if axis == -1 else expected.T)


def test_input_that_is_not_contiguous_is_copied(cpu, rng):
    v, g = rng.normal(size=(40, 60)), np.ones(30)
    w, _ = cpu.weight_norm(v[:, ::2], g)
    expected, _ = cpu.weight_norm(np.ascontiguousarray(v[:, ::2]), g)
    np.testing.assert_array_equal(w, expected)
    unaligned = np.zeros(v.nbytes + 1, np.uint8)[1:].view(v.dtype).reshape(v.shape)
    unaligned[...] = v
    assert not unaligned.flags.aligned
    np.testing.assert_array_equal(
        cpu.weight_norm(unaligned, np.ones(60))[0], cpu.weight_norm(v, np.ones(60))[0]
    )


def test_out_decides_the_type_and_is_returned(cpu):
    v, g = np.ones((4, 3), FLOAT), np.ones(3, FLOAT)
    out = np.empty((4, 3), HALF), np.empty(3, FLOAT)
    w, norm = cpu.weight_norm(v, g, out=out)
    assert w is out[0]
    assert norm is out[1]
    np.testing.assert_array_equal(w, np.full((4, 3), 0.5))


@pytest.mark.parametrize("dtype", ["bfloat16", BFLOAT, np.dtype(BFLOAT), "float16", np.float64])
def test_out_dtype(cpu, dtype):
    w, norm = cpu.weight_norm(np.ones((4, 3), FLOAT), np.ones(3, FLOAT), out_dtype=dtype)
    assert w.dtype == np.dtype(BFLOAT if dtype == "bfloat16" else dtype)
    assert norm.dtype == FLOAT


V, G = np.ones((4, 3), FLOAT), np.ones(3, FLOAT)
READ_ONLY = np.ones((4, 3), FLOAT)
READ_ONLY.flags.writeable = False
FORWARD_ERRORS = {
    "v a list": (([1.0], G), {}, "v must be a NumPy array.*but is list.*Pass np.asarray"),
    "v of ints": ((np.ones((4, 3), int), G), {}, "v must be float16.*but is dtype.'int64'.*astype"),
    "v swapped": ((V.astype(">f4"), G), {}, "v must be .*native byte order, but is dtype.'>f4'"),
    "g too long": (
        (V, np.ones(4)),
        {},
        r"g must have shape \[3\], the sizes of v's axes \[-1\], but has shape \[4\]",
    ),
    "g a column": ((V, np.ones((3, 1))), {}, r"g must have shape \[3\].*\[3, 1\].*; reshape g"),
    "g for None": ((V, G, None), {}, r"g must have shape \[\], for one norm.*has shape \[3\]"),
    "axis 2": ((V, G, 2), {}, r"axis must name axes of v, which has rank 2.*but is \[2\]"),
    "axis -3": ((V, G, -3), {}, r"axis must name axes of v.*but is \[-3\]"),
    "axis twice": ((V, G, (1, -1)), {}, r"axis must name each axis of v once, but is \[1, -1\]"),
    "axis 1.5": ((V, G, 1.5), {}, "axis must be an int, a sequence of ints or None, but is 1.5"),
    "axis '1'": ((V, G, "1"), {}, "axis must be an int.*but is '1'"),
    "scalar v": ((np.float32(1), G), {}, r"axis must be None for a scalar v, but is \[-1\]"),
    "out_dtype": ((V, G, -1, "int8"), {}, "out_dtype must be float16.*but is dtype.'int8'"),
    "out_dtype 3": ((V, G, -1, 3), {}, "out_dtype must be a type.*but is 3"),
    "threads": ((V, G), {"threads": -1}, "threads must be positive, or 0.*but is -1"),
    "out one": ((V, G), {"out": (V,)}, r"out must be a tuple of two arrays, \(w, norm\)"),
    "out shape": (
        (V, G),
        {"out": (G, G)},
        r"w in out must have shape \[4, 3\], but has shape \[3\]",
    ),
    "out norm": ((V, G), {"out": (V.copy(), np.ones(3))}, "norm must be float32.*but is float64"),
    "out strided": ((V, G), {"out": (np.ones((3, 4), FLOAT).T, G)}, "w in out must be contiguous"),
    "out read-only": ((V, G), {"out": (READ_ONLY, G)}, "w in out must be writable"),
    "out overlaps": ((V, G), {"out": (V, G.copy())}, "w must not overlap v"),
}


@pytest.mark.parametrize("case", FORWARD_ERRORS)
def test_forward_errors(cpu, case):
    arguments, options, message = FORWARD_ERRORS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cpu.weight_norm(*arguments, **options)


W, LONG = V.copy(), np.ones(15, FLOAT)
GRADIENT_ERRORS = {
    "grad_w shape": (
        (V[:2], V, G, G),
        {},
        r"grad_w must have v's shape \[4, 3\], but has shape \[2, 3\]",
    ),
    "norm shape": ((V, V, G, G[:1]), {}, r"norm must have g's shape \[3\], but has shape \[1\]"),
    "norm type": ((V, V, G, np.ones(3)), {}, "norm must be float32, float64 if v is.*is float64"),
    "out type": (
        (V, V, G, G),
        {"out": (np.ones((4, 3)), G.copy())},
        "grad_v must be float32, like v, but is float64",
    ),
    "out on v": (
        (V, W, G, G.copy()),
        {"out": (W, G.copy())},
        "grad_v must not overlap v",
    ),
    "out beside grad_w": (
        (LONG[3:].reshape(4, 3), V, G, G),
        {"out": (LONG[:12].reshape(4, 3), G.copy())},
        "grad_v must be grad_w itself",
    ),
    "out of another type": (
        (LONG[:12].reshape(4, 3), V.astype(HALF), G, G),
        {"out": (LONG[:6].view(HALF).reshape(4, 3), G.copy())},
        "grad_v must be grad_w itself, with one type",
    ),
    "grad_g on grad_w": (
        (LONG[:12].reshape(4, 3), V, G, G),
        {"out": (V.copy(), LONG[:3])},
        "grad_g must not overlap grad_w",
    ),
}


@pytest.mark.parametrize("case", GRADIENT_ERRORS)
def test_gradient_errors(cpu, case):
    arguments, options, message = GRADIENT_ERRORS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cpu.weight_norm_grad(*arguments, **options)


OUT = {"out": (CudaArray(V.copy()), CudaArray(G.copy()))}
DEVICE_ERRORS = {
    "no out": ((CudaArray(V), CudaArray(G)), {}, r"out must be given.*Pass out=\(w, norm\)"),
    "host g": ((CudaArray(V), G), OUT, "v and g must both be NumPy arrays or both.*but g is"),
    "host out": (
        (CudaArray(V), CudaArray(G)),
        {"out": (V, G)},
        "w in out must be where the",
    ),
    "strided": ((CudaArray(np.ones((3, 4), FLOAT).T), CudaArray(G)), OUT, "v must be contiguous"),
    "axes": (
        (CudaArray(V), CudaArray(np.ones((3, 4))), (1, 0)),
        {"out": (CudaArray(V.copy()), CudaArray(np.ones((3, 4), FLOAT)))},
        r"axis must name consecutive axes in ascending order, but is \[1, 0\].*Transpose v",
    ),
    "type": (
        (CudaArray(V.astype(np.int32)), CudaArray(G)),
        OUT,
        "v must be float16, bfloat16.*but is dtype.'int32'",
    ),
}


@pytest.mark.parametrize("case", DEVICE_ERRORS)
def test_device_errors(cuda, case):
    arguments, options, message = DEVICE_ERRORS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cuda.weight_norm(*arguments, **options)


def test_a_device_array_without_cuda_kernels(cpu):
    if cpu.build_info()["cuda"] is not None:
        pytest.skip("this module has CUDA kernels")
    with pytest.raises(ValueError, match="v is on a device, but this module was built without"):
        cpu.weight_norm(CudaArray(V), G)


def aligned(array):
    """Returns a copy that begins at a multiple of 256 bytes."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    begin = -memory.ctypes.data % 256
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_scratch(cuda, rng):
    v, g = rng.normal(size=(1, 200_000)).astype(FLOAT), np.ones(1, FLOAT)
    results = []
    for options in ({}, {"scratch": CudaArray(aligned(np.full(2000, np.nan)))}):
        out = np.empty_like(v), np.empty_like(g)
        cuda.weight_norm(CudaArray(v), CudaArray(g), 0, out=tuple(map(CudaArray, out)), **options)
        results.append(bits(out))
    assert results[0] == results[1]
    with pytest.raises(ValueError, match=r"scratch must have at least [0-9]+ bytes, but has 8"):
        cuda.weight_norm(
            CudaArray(v),
            CudaArray(g),
            0,
            out=tuple(map(CudaArray, out)),
            scratch=CudaArray(np.ones(1)),
        )
    unaligned = aligned(np.full(2000, np.nan))[1:]
    with pytest.raises(ValueError, match="scratch must be aligned to 256 bytes"):
        cuda.weight_norm(
            CudaArray(v),
            CudaArray(g),
            0,
            out=tuple(map(CudaArray, out)),
            scratch=CudaArray(unaligned),
        )
    with pytest.raises(ValueError, match=r"scratch must be a contiguous.*but is ndarray"):
        cuda.weight_norm(V, G, scratch=np.ones(10))


def test_build_info(cpu, cuda):
    info = cpu.build_info()
    assert list(info) == ["tensorflow", "cuda", "cuda_architectures", "simd"]
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])
    assert info["simd"] in ("avx512", "avx2", "baseline")
    assert cuda.build_info() == info | {
        "tensorflow": "2.21.0",
        "cuda": "13.0",
        "cuda_architectures": [80, 90],
    }


def test_docstrings(cpu):
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name in ("weight_norm", "weight_norm_grad", "build_info"):
        (test,) = finder.find(getattr(cpu, name), name, globs={"np": np, "native": cpu})
        runner.run(test)
    assert runner.tries >= 8
    assert runner.failures == 0


def run_script(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )


def test_loads_without_tensorflow(cpu):
    script = """
import importlib.util, sys
sys.modules["tensorflow"] = None
spec = importlib.util.spec_from_file_location("native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
import numpy as np
print(native.weight_norm(np.full((4, 1), 2, np.float32), np.ones(1))[0].ravel())
"""
    done = run_script(script, cpu.__file__)
    assert done.stdout == "[0.5 0.5 0.5 0.5]\n", done.stderr


def test_threads_work_in_a_forked_child(cpu):
    script = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
import numpy as np
v, g = np.ones((4000, 100), np.float32), np.ones(100, np.float32)
before = native.weight_norm(v, g, threads=4)[0]
child = os.fork()
after = native.weight_norm(v, g, threads=4)[0]
if child == 0:
    os._exit(0 if np.array_equal(before, after) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_script(script, cpu.__file__)
    assert done.returncode == 0, done.stderr
