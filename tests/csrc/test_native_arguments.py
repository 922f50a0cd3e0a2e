"""Tests which arguments tfwn.native accepts and rejects, and how the module loads."""

import doctest
import subprocess
import sys

import numpy as np
import pytest

from tests.csrc.native_cases import BFLOAT, FLOAT, HALF, CudaArray, bits


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
    """Returns a copy whose address is a multiple of 256 bytes."""
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
    with pytest.raises(ValueError, match="scratch must not overlap w"):
        cuda.weight_norm(
            CudaArray(v),
            CudaArray(g),
            0,
            out=tuple(map(CudaArray, out)),
            scratch=CudaArray(out[0]),
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
