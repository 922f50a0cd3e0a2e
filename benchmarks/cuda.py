"""Builds, checks and times the CUDA kernels on a machine with a GPU. Needs no TensorFlow.

    pip install 'setuptools>=70.1' pybind11 numpy ml_dtypes   # and torch, for the comparison
    python -m benchmarks.cuda [--case conv] [--out build/benchmarks] [--check-only]

This program compiles `native` for this GPU into build/cuda, or uses one that was built elsewhere
(--native). It compares forward and gradients with float64 for every kind of layout and type,
including odd sizes, unaligned memory and special values. Then it times graphs of many calls, which
it replays on one stream and measures with events, using so many inputs that they do not all fit in
the L2 cache. The peers are a copy of the same bytes (or a sum of two tensors for the backward pass)
and PyTorch's fused kernels where they exist. After a failure, the rest still runs. Each row is
written as soon as it is measured.

This has not yet run on a GPU, because none was available. The kernels' arithmetic has run on the
CPU (tests/csrc/cuda_on_cpu), and this program with a stand-in for the driver.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.cuda_checks import (
    BFLOAT,
    CHECKED,
    FLOAT,
    TIMED,
    Case,
    check_all,
    kept_axes,
    new_scratch,
    random_inputs,
)
from benchmarks.cuda_driver import Gpu, GpuArray, NoGpuError

ROOT = Path(__file__).parents[1]
OURS, TORCH, COPY = "ours", "PyTorch", "copy"
ROW_SECONDS = 3.0  # of the device's time, after which a row ends early


def load(path: Path) -> types.ModuleType:
    """Loads `native` from a file, bypassing the package, which needs TensorFlow."""
    spec = importlib.util.spec_from_file_location("native", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"benchmarks.cuda: --native must name a native.*.so, but is {path}")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.cuda: {path} does not load in Python {sys.version.split()[0]}: {error}"
        ) from None
    return module


def build(architecture: int) -> Path:
    """Compiles `native` for one architecture and for the Python that runs this."""
    folder = ROOT / "build/cuda"
    # Built in a folder without pyproject.toml, because setuptools before 77 rejects one of its
    # fields.
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "build_backend.py", "csrc"):
        link = source / name
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / name)
    settings = {"TFWN_TENSORFLOW": "0", "TFWN_CUDA_ARCHITECTURES": str(architecture)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=source, env=os.environ | settings)
    if done.returncode != 0:
        raise SystemExit(
            "benchmarks.cuda: could not build `native` (see above). Build it elsewhere for Python "
            f"{sysconfig.get_python_version()} and give its path: --native PATH"
        )
    return folder / "tfwn" / f"native{sysconfig.get_config_var('EXT_SUFFIX')}"


def contenders(gpu: Gpu, native, case: Case, kind, backward: bool, sets: int):
    """Returns graphs of `sets` calls each, and the arrays that must outlive them."""
    random = np.random.default_rng(0)
    host = [random_inputs(case, (kind, kind, kind), random) for _ in range(sets)]
    inputs = [[gpu.array(x) for x in arrays] for arrays in host]
    norms = [gpu.array(np.empty(g.shape, FLOAT)) for _, g, _ in host]
    results = [[gpu.array(v), gpu.array(g)] for v, g, _ in host]
    scratch = new_scratch(gpu)

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

    def copy():
        for (v, _, grad_w), result in zip(inputs, results, strict=True):
            if backward:
                gpu.add(result[0], v, grad_w, v.nbytes)
            else:
                gpu.copy(result[0], v, v.nbytes)

    graphs = {OURS: gpu.graph(ours), COPY: gpu.graph(copy)}
    try:
        torch_graph = torch_contender(gpu, case, inputs, norms, backward)
    except Exception as error:  # a failing peer only loses its own column
        print(f"PyTorch, {case.name}: {type(error).__name__}: {error}", flush=True)
        torch_graph = None
    if torch_graph:
        graphs[TORCH] = torch_graph
    return graphs, (inputs, norms, results, scratch)


def torch_contender(
    gpu: Gpu, case: Case, inputs: list[list[GpuArray]], norms: list[GpuArray], backward: bool
) -> Callable[[], None] | None:
    """Returns PyTorch's fused kernel on the same inputs, if the axis is the first or last."""
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
    spent = 0.0
    for round_number in range(rounds + 2):
        for name in random.permutation(list(graphs)):
            graphs[name]()
            sample = gpu.seconds(graphs[name], repeats=3)
            seconds[name].append(sample / sets)
            spent += 4 * sample
        if spent > ROW_SECONDS and round_number >= 4:
            break
    del alive
    return timing.Times({name: np.array(samples[2:]) for name, samples in seconds.items()})


def time_all(gpu: Gpu, native, cases: list[Case], rounds: int, out: Path) -> int:
    """Prints a table, writes all samples to cuda.json and returns how many rows failed."""
    machine = timing.describe_machine() | {"gpu": gpu.name, "build": native.build_info()}
    results: list[dict[str, object]] = []
    failures = 0
    print(f"{'weight':28} {'type':9} {'pass':9} {'us':>9} {'/ copy':>12} {'PyTorch /':>12}")
    rows = [(c, kind, backward) for c in cases for kind in (FLOAT, BFLOAT) for backward in (0, 1)]
    for case, kind, backward in rows:
        which, name = "backward" if backward else "forward", np.dtype(kind).name
        label = f"{case.name:28} {name:9} {which:9}"
        try:
            times = measure(gpu, native, case, kind, bool(backward), rounds)
        except Exception as error:
            failures += 1
            print(f"{label} FAILED: {type(error).__name__}: {error}", flush=True)
            gpu.synchronize()  # raises if the device is no longer usable
            continue
        peer = f"{times.ratio(TORCH, OURS):.2f}" if TORCH in times else "-"
        ours = times[OURS].median * 1e6
        print(f"{label} {ours:9.2f} {times.ratio(OURS, COPY):12.2f} {peer:>12}", flush=True)
        samples = {key: list(map(float, s)) for key, s in times.seconds.items()}
        results.append({"case": case.name, "dtype": name, "pass": which, "seconds": samples})
        timing.write_json(out / "cuda.json", machine, results)
    print(f"medians of up to {rounds} rounds, ± half the interquartile range: {out}/cuda.json")
    return failures


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=summary)
    parser.add_argument("--case", default="", help="only weights whose name contains this")
    parser.add_argument("--native", type=Path, help="a native.*.so to use, instead of building it")
    parser.add_argument(
        "--rounds", type=int, default=15, help="samples per contender, default %(default)s"
    )
    parser.add_argument("--check-only", action="store_true", help="no timing")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="%(default)s")
    return parser.parse_args()


def main() -> None:
    """Builds, checks, times."""
    arguments = parse_arguments()
    checked, timed = ([c for c in cases if arguments.case in c.name] for cases in (CHECKED, TIMED))
    if not checked:
        names = ", ".join(c.name for c in CHECKED)
        raise SystemExit(
            f"benchmarks.cuda: --case must be part of a weight's name, but is {arguments.case!r}. "
            f"The names: {names}"
        )
    try:
        gpu = Gpu()
    except NoGpuError as error:
        raise SystemExit(f"benchmarks.cuda: there is no GPU to run on: {error}") from None
    print(f"{gpu.name}, {gpu.multiprocessors} multiprocessors, architecture {gpu.architecture}")
    native = load(arguments.native or build(gpu.architecture))
    info = native.build_info()
    if info["cuda"] is None:
        raise SystemExit(
            "benchmarks.cuda: `native` was built without CUDA. Install the CUDA "
            "toolkit, set CUDA_HOME, or build it elsewhere and give its path: --native PATH"
        )
    print(f"native: CUDA {info['cuda']}, architectures {info['cuda_architectures']}", flush=True)
    failures = check_all(gpu, native, checked, edges=not arguments.case)
    if timed and not arguments.check_only:
        failures += time_all(gpu, native, timed, arguments.rounds, arguments.out)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
