"""The checks of `benchmarks.cuda`: forward and gradients on a device against float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from benchmarks.cuda_driver import Gpu, GpuArray

HALF, BFLOAT, FLOAT, DOUBLE = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
TOLERANCE = {HALF: 5e-4, BFLOAT: 4e-3, FLOAT: 5e-7, DOUBLE: 1e-14}
Axis = int | tuple[int, ...] | None
Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Case:
    """A weight: the shape of v, and the axes of its units."""

    name: str
    shape: tuple[int, ...]
    axis: Axis = -1


TIMED = [
    Case("conv 3x3x96x96", (3, 3, 96, 96)),
    Case("conv 3x3x192x192", (3, 3, 192, 192)),
    Case("dense 3136x512", (3136, 512)),
    Case("LSTM 1040x1024", (1040, 1024)),
    Case("dense 4096x4096", (4096, 4096)),
    Case("embedding 100000x8", (100_000, 8)),
    Case("row layout 512x3136", (512, 3136), 0),
    Case("row layout 4x1000000", (4, 1_000_000), 0),
    Case("transposed conv 3x3x192x96", (3, 3, 192, 96), -2),
]
CHECKED = [
    *TIMED,
    Case("odd columns", (1237, 61)),
    Case("two columns", (70_001, 2)),
    Case("many columns", (3, 100_003)),
    Case("tall columns", (20_011, 130)),
    Case("depthwise", (3, 3, 37, 5), (-2, -1)),
    Case("odd rows", (61, 1237), 0),
    Case("short rows", (100_003, 3), 0),
    Case("long rows", (70, 120_001), 0),
    Case("short inner", (501, 33, 7), 1),
    Case("long inner", (5, 33, 2049), 1),
    Case("whole tensor", (1_000_003,), None),
    Case("no elements", (0, 7)),
]
TYPES = [
    (FLOAT, FLOAT, FLOAT),
    (HALF, HALF, HALF),
    (BFLOAT, BFLOAT, BFLOAT),
    (DOUBLE, DOUBLE, DOUBLE),
    (FLOAT, FLOAT, BFLOAT),
    (FLOAT, FLOAT, HALF),
    (BFLOAT, FLOAT, FLOAT),
    (FLOAT, FLOAT, DOUBLE),
    (HALF, DOUBLE, BFLOAT),
    (DOUBLE, HALF, FLOAT),
]


def kept_axes(case: Case) -> list[int]:
    axes = () if case.axis is None else np.atleast_1d(case.axis)
    return [int(a) % len(case.shape) for a in axes]


def reference(case: Case, v, g, grad_w) -> Arrays:
    """Returns w, norm, grad_v and grad_g by eq. 2 and 3 in float64."""
    v, g, grad_w = (x.astype(np.float64) for x in (v, g, grad_w))
    reduced = tuple(a for a in range(v.ndim) if a not in kept_axes(case))
    with np.errstate(invalid="ignore"):  # for infinity and NaN
        norm = np.sqrt((v * v).sum(reduced))
        inverse = np.divide(1, norm, out=np.zeros_like(norm), where=norm != 0)
        grad_g = (grad_w * v).sum(reduced) * inverse
        g, scale, projection = (np.expand_dims(x, reduced) for x in (g, inverse, grad_g * inverse))
        across = grad_w - projection * v
        across[np.abs(across) < 4 * np.finfo(np.float64).eps * np.abs(grad_w)] = 0  # rounding
        return [g * (v * scale), norm, g * (scale * across), grad_g]


def random_inputs(case: Case, kinds, random: np.random.Generator, scale: float = 1.0) -> Arrays:
    """Returns v, g and grad_w."""
    units = [case.shape[a] for a in kept_axes(case)]
    v_type, g_type, w_type = kinds
    return [
        np.asarray(random.normal(size=case.shape) * scale, v_type),
        np.asarray(random.normal(size=units), g_type),
        np.asarray(random.normal(size=case.shape), w_type),
    ]


def error_of(actual: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Returns ||actual - expected|| / ||expected||, or infinity if non-finite elements differ.

    Elements of `expected` that are smaller than `least` count as `least`, because sums may be close
    to 0 by chance.
    """
    actual = actual.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    actual, expected = actual[finite], expected[finite]
    if not np.isfinite(actual).all():
        return float("inf")
    size = np.linalg.norm(np.maximum(np.abs(expected), least))
    return float(np.linalg.norm(actual - expected) / size) if size else float(np.abs(actual).sum())


def new_scratch(gpu: Gpu) -> GpuArray:
    """Returns 16 MiB of scratch, more than any of the weights here needs."""
    return GpuArray.empty(gpu, FLOAT, (4 << 20,))


def run_both(gpu: Gpu, native, case: Case, inputs, results, scratch: GpuArray) -> None:
    """Launches both passes on the stream."""
    grad_w, v, g = inputs[2], inputs[0], inputs[1]
    options = {"axis": case.axis, "stream": gpu.stream, "scratch": scratch}
    native.weight_norm(v, g, out=(results[0], results[1]), **options)
    native.weight_norm_grad(grad_w, v, g, results[1], out=(results[2], results[3]), **options)


def compare(case: Case, inputs: Arrays, results: Arrays) -> str:
    """Returns what is wrong with the results, or an empty string."""
    of_norm = TOLERANCE[DOUBLE if inputs[0].dtype == DOUBLE else FLOAT]
    wrong = []
    expected = reference(case, *inputs)
    for name, ours, truth in zip(("w", "norm", "grad_v", "grad_g"), results, expected, strict=True):
        # Elements of grad_w are standard normal, and so is sum(grad_w * v) / ||v||.
        error = error_of(ours, truth, least=1.0 if name == "grad_g" else 0.0)
        tolerance = TOLERANCE[ours.dtype.type]
        if name != "w":  # the gradient uses the norm as stored
            tolerance = max(tolerance, of_norm)
        if not error <= tolerance:
            wrong.append(f"{name} differs by {error:.1e}")
    return ", ".join(wrong)


def check(gpu: Gpu, native, case: Case, inputs: Arrays, margin: int = 256) -> str:
    """Runs both passes twice and from a graph. Returns what is wrong, or an empty string."""
    v, g, grad_w = inputs
    norm_type = DOUBLE if v.dtype == DOUBLE else FLOAT
    on_gpu = [gpu.array(x, margin) for x in inputs]
    empty = [np.empty(v.shape, grad_w.dtype), np.empty(g.shape, norm_type), v, g]
    results = [gpu.array(x, margin) for x in empty]
    scratch = new_scratch(gpu)

    def run():
        run_both(gpu, native, case, on_gpu, results, scratch)

    def outputs(launch: Callable[[], object]) -> Arrays:
        for result in results:
            result.fill()
        launch()
        return [result.numpy() for result in results]

    first, second = outputs(run), outputs(run)
    replayed = outputs(gpu.graph(run))
    for other, how in ((second, "the second time"), (replayed, "from a graph")):
        if any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True)):
            return f"different bits {how}"
    return compare(case, inputs, first)


# Small weights of each layout, in which edge_inputs sets special values.
EDGES = [Case("columns", (37, 8)), Case("rows", (5, 33), 0), Case("inner", (3, 7, 40), -2)]
SINGLE = [Case("columns", (1, 37)), Case("rows", (37, 1), 0), Case("whole", (1,), None)]


def edge_inputs(random: np.random.Generator) -> Iterator[tuple[str, Case, Arrays]]:
    """Yields edge cases. Where there are several units, the second one is special."""
    for case in EDGES:
        (axis,) = kept_axes(case)
        unit = tuple(1 if a == axis else slice(None) for a in range(len(case.shape)))
        element = tuple(1 if a == axis else 2 for a in range(len(case.shape)))
        for kinds in TYPES[:4]:
            for what, value in (("zero unit", 0.0), ("NaN", np.nan), ("infinity", np.inf)):
                inputs = random_inputs(case, kinds, random)
                inputs[0][unit if what == "zero unit" else element] = value
                yield what, case, inputs
            inputs = random_inputs(case, kinds, random)
            inputs[0][unit] = 0
            inputs[0][element] = -3
            yield "one element is not zero", case, inputs
    for case in SINGLE:
        for kinds in TYPES[:4]:
            yield "single element", case, random_inputs(case, kinds, random)


def check_edge(gpu: Gpu, native, what: str, case: Case, inputs: Arrays) -> str:
    """Checks the values, and that those that must be exactly zero are."""
    wrong = check(gpu, native, case, inputs)
    if wrong or what in ("NaN", "infinity"):
        return wrong
    on_gpu = [gpu.array(x) for x in inputs]
    v, g, grad_w = inputs
    norm = np.empty(g.shape, DOUBLE if v.dtype == DOUBLE else FLOAT)
    results = [gpu.array(x) for x in (grad_w, norm, v, g)]
    run_both(gpu, native, case, on_gpu, results, new_scratch(gpu))
    w, _, grad_v, grad_g = (r.numpy().astype(np.float64) for r in results)
    axis = kept_axes(case)
    if what == "single element":
        return "" if not grad_v.any() else "grad_v is not exactly 0"
    zeros = {"grad_v": np.take(grad_v, 1, axis[0])}
    if what == "zero unit":
        zeros |= {"w": np.take(w, 1, axis[0]), "grad_g": grad_g[1]}
    else:
        zeros["grad_v"] = zeros["grad_v"][np.take(v, 1, axis[0]) != 0]
    return ", ".join(f"{name} is not exactly 0" for name, x in zeros.items() if np.any(x))


def check_subnormal(gpu: Gpu, native, random: np.random.Generator) -> str:
    """Checks float32 weights with subnormal v, and with subnormal w."""
    case = EDGES[0]
    for v_size, g_size in ((1e-41, 1.0), (1.0, 1e-39)):
        v, g, _ = random_inputs(case, TYPES[0], random, v_size)
        g = (g * g_size).astype(FLOAT)
        w, norm = gpu.array(v), gpu.array(g)
        options = {"axis": case.axis, "stream": gpu.stream, "scratch": new_scratch(gpu)}
        native.weight_norm(gpu.array(v), gpu.array(g), out=(w, norm), **options)
        expected, expected_norm, _, _ = reference(case, v, g, v)
        spacing = 2.0**-149
        for name, ours, truth in (("w", w, expected), ("norm", norm, expected_norm)):
            wrong = np.abs(ours.numpy() - truth) > 5e-7 * np.abs(truth) + spacing
            if wrong.any():
                return f"{name} differs for v of {v_size:g} and g of {g_size:g}"
    return ""


def check_large(gpu: Gpu, native, random: np.random.Generator, least: int = 2**31 + 1) -> str:
    """Checks bfloat16 weights of at least `least` elements, in which one block is repeated.

    Returns what is wrong, an empty string, or why the check was left out.
    """
    rows, columns = 256, 64
    copies = -(-least // (rows * columns))
    free, need = gpu.free_bytes(), 4 * 2 * copies * rows * columns + (64 << 20)
    if free < need:
        return (
            f"left out: it needs {need >> 20:,} MiB of device memory, but {free >> 20:,} are free"
        )
    v, grad_w = (random.normal(size=(rows, columns)).astype(BFLOAT) for _ in range(2))
    for axis, shape in ((-1, (copies * rows, columns)), (None, (copies * rows * columns,))):
        case = Case("large", shape, axis)
        g = random.normal(size=columns if axis == -1 else ()).astype(FLOAT)
        v_on_gpu, grad_w_on_gpu, w, grad_v = (GpuArray.empty(gpu, BFLOAT, shape) for _ in range(4))
        v_on_gpu.repeat(v)
        grad_w_on_gpu.repeat(grad_w)
        results = [w, gpu.array(g), grad_v, gpu.array(g)]
        inputs = [v_on_gpu, gpu.array(g), grad_w_on_gpu]
        run_both(gpu, native, case, inputs, results, new_scratch(gpu))
        first = []
        for result in results:
            if result.shape != shape:
                first.append(result.numpy())
                continue
            size = v.nbytes * min(copies, 1024)
            for begin in range(0, result.nbytes, size):
                blocks = result.read(begin, min(size, result.nbytes - begin)).reshape(-1, v.nbytes)
                if begin == 0:
                    block = blocks[0].copy()
                if (blocks != block).any():
                    return f"{case.shape}: a copy of the block after byte {begin:,} is different"
            first.append(block.view(BFLOAT).reshape(v.shape))
        # Sums grow in proportion to the copies, and norms to their square root.
        whole = Case("block", v.shape, axis)
        truth = reference(whole, v, g, grad_w)
        root = np.sqrt(copies)
        truth = [truth[0] / root, truth[1] * root, truth[2] / root, truth[3] * root]
        for name, ours, expected in zip(
            ("w", "norm", "grad_v", "grad_g"), first, truth, strict=True
        ):
            error = error_of(ours, expected, least=root if name == "grad_g" else 0.0)
            if not error <= TOLERANCE[ours.dtype.type]:
                return f"{case.shape}: {name} differs by {error:.1e}"
    return ""


def check_all(gpu: Gpu, native, cases: list[Case], edges: bool) -> int:
    """Prints a line for each failure and returns the number of failures."""
    random = np.random.default_rng()
    failures = runs = 0

    def attempt(what: str, run: Callable[[], str]) -> None:
        nonlocal failures, runs
        runs += 1
        try:
            wrong = run()
        except Exception as error:  # the other checks may help to find the fault
            wrong = f"{type(error).__name__}: {error}"
        if wrong.startswith("left out"):
            print(f"{what}: {wrong}", flush=True)
        elif wrong:
            failures += 1
            print(f"FAILED {what}: {wrong}", flush=True)
            gpu.synchronize()  # raises if the device is no longer usable

    # Allocators align memory to 256 bytes. Whole vectors need an alignment of 16 bytes.
    settings = [(kinds, 1.0, 256) for kinds in TYPES]
    settings += [(TYPES[0], 1.0, 8), (TYPES[1], 1.0, 8), (TYPES[2], 1.0, 2)]
    settings += [(TYPES[0], scale, 256) for scale in (1e-31, 1e-20, 1e20, 1e27)]
    for case in cases:
        for kinds, scale, margin in settings:
            inputs = random_inputs(case, kinds, random, scale)
            names = " ".join(np.dtype(kind).name for kind in kinds)
            what = f"{case.name}, {names}, |v| {scale:g}, margin {margin}"
            attempt(what, partial(check, gpu, native, case, inputs, margin))
    if edges:
        for what, case, inputs in edge_inputs(random):
            name = f"{what}, {case.name}, {inputs[0].dtype}"
            attempt(name, partial(check_edge, gpu, native, what, case, inputs))
        attempt("subnormal numbers", partial(check_subnormal, gpu, native, random))
        attempt("more than 2^31 elements", partial(check_large, gpu, native, random))
    print(f"checked {runs} times against float64: {failures} failures", flush=True)
    return failures
