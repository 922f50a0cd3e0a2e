"""Builds, checks and times the CUDA kernels on a machine with a GPU. Needs no TensorFlow.

    pip install setuptools pybind11 numpy ml_dtypes   # and torch, for the comparison
    python -m benchmarks.cuda [--case conv] [--out build/benchmarks] [--check-only]

It compiles `native` for this GPU into build/cuda, compares forward and gradients with float64 for
every kind of layout and type, odd sizes and unaligned memory included, and then times them: graphs
of many calls replayed on one stream, measured with events, on as many different inputs as it takes
not to measure the L2 cache alone. Peers: a device-to-device copy that moves the same bytes, and
PyTorch's fused kernels where it has them.

Not yet run on a GPU: no machine with one was at hand. The kernels' arithmetic has been run on the
CPU (tests/csrc/cuda_on_cpu), this program on a stand-in for the driver.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks import timing
from benchmarks.cuda_driver import Gpu, GpuArray, NoGpuError

ROOT = Path(__file__).parents[1]
HALF, BFLOAT, FLOAT, DOUBLE = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
TOLERANCE = {HALF: 5e-4, BFLOAT: 4e-3, FLOAT: 5e-7, DOUBLE: 1e-14}
OURS, TORCH, COPY = "ours", "PyTorch", "copy"
Axis = int | tuple[int, ...] | None


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
    (HALF, DOUBLE, BFLOAT),
    (DOUBLE, HALF, FLOAT),
]


def build(architecture: int) -> types.ModuleType:
    """Compiles the module for one architecture, and loads it."""
    folder = ROOT / "build/cuda"
    settings = {"TFWN_TENSORFLOW": "0", "TFWN_CUDA_ARCHITECTURES": str(architecture)}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT,
        env=os.environ | settings,
        check=True,
    )
    path = max(folder.glob("tfwn/native.*.so"), key=lambda p: p.stat().st_mtime)
    spec = importlib.util.spec_from_file_location("native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept_axes(case: Case) -> list[int]:
    axes = () if case.axis is None else np.atleast_1d(case.axis)
    return [int(a) % len(case.shape) for a in axes]


def reference(case: Case, v, g, grad_w):
    """Eq. 2 and 3 in float64: w, norm, grad_v, grad_g."""
    v, g, grad_w = (x.astype(np.float64) for x in (v, g, grad_w))
    reduced = tuple(a for a in range(v.ndim) if a not in kept_axes(case))
    norm = np.sqrt((v * v).sum(reduced))
    inverse = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    grad_g = (grad_w * v).sum(reduced) * inverse
    g, scale, projection = (np.expand_dims(x, reduced) for x in (g, inverse, grad_g * inverse))
    return g * (v * scale), norm, g * (scale * (grad_w - projection * v)), grad_g


def random_inputs(case: Case, kinds, random: np.random.Generator, scale: float = 1.0):
    """Returns v, g and grad_w."""
    units = [case.shape[a] for a in kept_axes(case)]
    v_type, g_type, w_type = kinds
    return (
        np.asarray(random.normal(size=case.shape) * scale, v_type),
        np.asarray(random.normal(size=units), g_type),
        np.asarray(random.normal(size=case.shape), w_type),
    )


def error_of(actual: np.ndarray, expected: np.ndarray, least: float) -> float:
    """Returns ||actual - expected|| / ||expected||; infinity where anything is not finite.

    Elements of `expected` count as `least` where they are smaller: sums that are near 0 by chance.
    """
    actual = actual.astype(np.float64)
    if not np.isfinite(actual).all():
        return float("inf")
    size = np.linalg.norm(np.maximum(np.abs(expected), least))
    return float(np.linalg.norm(actual - expected) / size) if size else float(np.abs(actual).sum())


def check(
    gpu: Gpu, native, case: Case, kinds, random, scale: float = 1.0, margin: int = 256
) -> str:
    """Runs both passes twice, and once more from a graph; returns what is wrong, or nothing."""
    v, g, grad_w = random_inputs(case, kinds, random, scale)
    v_type, _, w_type = kinds
    norm_type = DOUBLE if v_type == DOUBLE else FLOAT
    on_gpu = [gpu.array(x, margin) for x in (v, g, grad_w)]
    empty = [np.empty(v.shape, w_type), np.empty(g.shape, norm_type), v, g]
    results = [gpu.array(x, margin) for x in empty]

    def run():
        options = {"axis": case.axis, "stream": gpu.stream}
        native.weight_norm(*on_gpu[:2], out=(results[0], results[1]), **options)
        native.weight_norm_grad(
            on_gpu[2], *on_gpu[:2], results[1], out=(results[2], results[3]), **options
        )

    def outputs(launch: Callable[[], object]) -> list[np.ndarray]:
        for result in results:
            result.fill()
        launch()
        return [result.numpy() for result in results]

    first, second = outputs(run), outputs(run)
    replayed = outputs(gpu.graph(run))
    for other, how in ((second, "a second time"), (replayed, "from a graph")):
        if any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True)):
            return f"other bits {how}"
    widest = TOLERANCE[norm_type]
    wrong = []
    for name, actual, expected in zip(
        ("w", "norm", "grad_v", "grad_g"), first, reference(case, v, g, grad_w), strict=True
    ):
        # Elements of grad_w are standard normal: so are sum(grad_w * v) / ||v||.
        error = error_of(actual, expected, least=1.0 if name == "grad_g" else 0.0)
        if error > max(TOLERANCE[actual.dtype.type], widest):
            wrong.append(f"{name} differs by {error:.1e}")
    return ", ".join(wrong)


def check_all(gpu: Gpu, native, cases: list[Case]) -> int:
    """Prints a line for each failure; returns how many there are."""
    random = np.random.default_rng()
    failures = runs = 0
    # Of the alignments of memory, 256 bytes is what allocators give and 8 what no vector can use.
    settings = [(kinds, 1.0, 256) for kinds in TYPES]
    settings += [(TYPES[0], 1.0, 8), (TYPES[1], 1.0, 8)]
    settings += [(TYPES[0], scale, 256) for scale in (1e-31, 1e-20, 1e20, 1e27)]
    for case in cases:
        for kinds, scale, margin in settings:
            runs += 1
            wrong = check(gpu, native, case, kinds, random, scale, margin)
            if wrong:
                failures += 1
                names = " ".join(np.dtype(kind).name for kind in kinds)
                print(f"FAILED {case.name}, {names}, |v| {scale:g}, margin {margin}: {wrong}")
    print(f"checked {runs} times against float64: {failures} failures")
    return failures


def contenders(gpu: Gpu, native, case: Case, kind, backward: bool, sets: int):
    """Returns graphs of `sets` calls each, and what they need to stay alive."""
    random = np.random.default_rng(0)
    host = [random_inputs(case, (kind, kind, kind), random) for _ in range(sets)]
    inputs = [[gpu.array(x) for x in arrays] for arrays in host]
    norms = [gpu.array(np.empty(g.shape, FLOAT)) for _, g, _ in host]
    results = [[gpu.array(v), gpu.array(g)] for v, g, _ in host]
    scratch = gpu.array(np.empty(1 << 22, FLOAT))

    def ours():
        options = {"axis": case.axis, "stream": gpu.stream, "scratch": scratch}
        for (v, g, grad_w), norm, result in zip(inputs, norms, results, strict=True):
            if backward:
                native.weight_norm_grad(grad_w, v, g, norm, out=tuple(result), **options)
            else:
                native.weight_norm(v, g, out=(result[0], norm), **options)

    for (v, g, _), norm, result in zip(inputs, norms, results, strict=True):
        out = (result[0], norm)
        native.weight_norm(v, g, out=out, axis=case.axis, stream=gpu.stream, scratch=scratch)
    # The forward reads a tensor and writes one; the backward reads two: a copy half as long again.
    pieces = [(inputs[i][0], results[i][0]) for i in range(sets)]

    def copy():
        for i, (source, to) in enumerate(pieces):
            gpu.copy(to, source, source.nbytes)
            if backward:
                gpu.copy(results[i][0], inputs[i][2], source.nbytes // 2)

    graphs = {OURS: gpu.graph(ours), COPY: gpu.graph(copy)}
    torch_graph = torch_contender(gpu, case, inputs, norms, backward)
    if torch_graph:
        graphs[TORCH] = torch_graph
    return graphs, (inputs, norms, results, scratch)


def torch_contender(
    gpu: Gpu, case: Case, inputs: list[list[GpuArray]], norms: list[GpuArray], backward: bool
) -> Callable[[], None] | None:
    """Returns PyTorch's fused kernel on the same inputs, where it has one: first or last axis."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or kept_axes(case) not in ([0], [len(case.shape) - 1]):
        return None
    axis = kept_axes(case)[0]
    like = [1] * len(case.shape)
    like[axis] = case.shape[axis]
    tensors = [[torch.from_dlpack(x) for x in arrays] for arrays in inputs]
    norm_tensors = [torch.from_dlpack(norm).view(like) for norm in norms]

    def run():
        for (v, g, grad_w), norm in zip(tensors, norm_tensors, strict=True):
            if backward:
                torch.ops.aten._weight_norm_interface_backward(grad_w, v, g.view(like), norm, axis)
            else:
                torch.ops.aten._weight_norm_interface(v, g.view(like), axis)

    stream = torch.cuda.ExternalStream(gpu.stream)
    with torch.cuda.stream(stream):
        run()
    gpu.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return replay


def measure(gpu: Gpu, native, case: Case, kind, backward: bool, rounds: int) -> timing.Times:
    """Times one row of the table, per call."""
    per_set = int(np.prod(case.shape)) * np.dtype(kind).itemsize * (3 if backward else 2)
    sets = int(np.clip(4 * gpu.l2_bytes // per_set, 4, 64))
    graphs, alive = contenders(gpu, native, case, kind, backward, sets)
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 2):
        for name in random.permutation(list(graphs)):
            graphs[name]()
            seconds[name].append(gpu.seconds(graphs[name], repeats=3) / sets)
    del alive
    return timing.Times({name: np.array(samples[2:]) for name, samples in seconds.items()})


def time_all(gpu: Gpu, native, cases: list[Case], rounds: int, out: Path) -> None:
    """Prints a table and writes every sample to cuda.json."""
    machine = timing.describe_machine() | {"gpu": gpu.name, "build": native.build_info()}
    results = []
    print(f"{'weight':28} {'type':9} {'pass':9} {'us':>9} {'/ copy':>12} {'PyTorch /':>12}")
    for case in cases:
        for kind in (FLOAT, BFLOAT):
            for backward in (False, True):
                times = measure(gpu, native, case, kind, backward, rounds)
                which, name = "backward" if backward else "forward", np.dtype(kind).name
                peer = f"{times.ratio(TORCH, OURS):.2f}" if TORCH in times else "-"
                print(
                    f"{case.name:28} {name:9} {which:9} {times[OURS].median * 1e6:9.2f} "
                    f"{times.ratio(OURS, COPY):12.2f} {peer:>12}"
                )
                samples = {key: list(map(float, s)) for key, s in times.seconds.items()}
                row = {"case": case.name, "dtype": name, "pass": which, "seconds": samples}
                results.append(row)
    timing.write_json(out / "cuda.json", machine, results)
    print(f"medians of {rounds} rounds, +- half the interquartile range; wrote {out}/cuda.json")


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=summary)
    parser.add_argument("--case", default="", help="only the weights whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="samples each, default %(default)s")
    parser.add_argument("--check-only", action="store_true", help="no timing")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="%(default)s")
    return parser.parse_args()


def main() -> None:
    """Builds, checks, times."""
    arguments = parse_arguments()
    try:
        gpu = Gpu()
    except NoGpuError as error:
        raise SystemExit(f"benchmarks.cuda: there is no GPU to run on: {error}") from None
    print(f"{gpu.name}, {gpu.multiprocessors} multiprocessors, architecture {gpu.architecture}")
    native = build(gpu.architecture)
    if native.build_info()["cuda"] is None:
        raise SystemExit(
            "benchmarks.cuda: found no nvcc. Install the CUDA toolkit or set CUDA_HOME"
        )
    failures = check_all(gpu, native, [c for c in CHECKED if arguments.case in c.name])
    if not arguments.check_only:
        cases = [c for c in TIMED if arguments.case in c.name]
        time_all(gpu, native, cases, arguments.rounds, arguments.out)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
