"""Times the op against its alternatives and against the speed of memory.

    python -m benchmarks.op [--dtype float32] [--case dense] [--threads 2] [--out build/benchmarks]

In a graph: several independent weights in one `tf.function`, forward only or forward and backward,
with and without compilation by XLA (jit). The contenders are our op; the fastest formula in plain
TensorFlow, v * (g * rsqrt(sum(v^2))); and the usual one, l2_normalize(v) * g. They are compared
with PyTorch's fused kernel with autograd, and with the floor, which only moves the bytes that any
implementation must move: a copy for the forward pass, a two-input sum for the backward pass.
Kernels alone: tfwn.native against PyTorch's kernel. All use the same number of threads, and memory
that has been touched before. A separate column shows what fresh pages would add.
"""

import argparse
import itertools
import json
import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf
import torch
from rich.console import Console
from rich.table import Table

import tfwn
import tfwn.native as native
from benchmarks import timing

OURS, FORMULA, L2_NORMALIZE = "tfwn", "formula", "l2_normalize"
OURS_JIT, FORMULA_JIT, L2_NORMALIZE_JIT = "tfwn jit", "formula jit", "l2_normalize jit"
TORCH, FLOOR, FRESH = "PyTorch", "floor", "fresh"
KERNEL, TORCH_KERNEL = "our kernel", "PyTorch kernel"


@dataclass(frozen=True)
class Case:
    """A weight: the shape of v, and the axis of its units."""

    name: str
    shape: tuple[int, ...]
    axis: int = -1

    @property
    def reduced(self) -> list[int]:
        return [a for a in range(len(self.shape)) if a != self.axis % len(self.shape)]

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def weights(self) -> int:
        """How many weights one graph contains: enough to hide the 0.2 ms of calling it."""
        return min(max(5_000_000 // self.elements, 8), 32) if self.elements <= 4e6 else 2


CASES = [
    Case("conv 3x3x96x96", (3, 3, 96, 96)),
    Case("conv 3x3x192x192", (3, 3, 192, 192)),
    Case("dense 3136x512", (3136, 512)),
    Case("LSTM 1040x1024", (1040, 1024)),
    Case("dense 4096x4096", (4096, 4096)),
    Case("embedding 100000x8", (100_000, 8)),
    Case("row layout 512x3136", (512, 3136), axis=0),
    Case("transposed conv 3x3x192x96", (3, 3, 192, 96), axis=-2),
]


def spread(g, case: Case):
    """Returns g in a shape that broadcasts with v."""
    shape = [1] * len(case.shape)
    shape[case.axis] = case.shape[case.axis]
    return tf.reshape(g, shape)


def formula(v, g, case: Case):
    """Eq. 2 at its fastest in plain TensorFlow: one pass over v to sum, one to multiply."""
    square = tf.reduce_sum(tf.square(v), case.reduced, keepdims=True)
    return v * (spread(g, case) * tf.math.rsqrt(square))


def l2_normalize(v, g, case: Case):
    """Eq. 2 with TensorFlow's function for v / ||v||."""
    return tf.math.l2_normalize(v, case.reduced, epsilon=0.0) * spread(g, case)


def ours(v, g, case: Case):
    return tfwn.weight_norm(v, g, case.axis)


def tensorflow_contenders(case: Case, dtype: str, backward: bool) -> dict[str, Callable]:
    random = np.random.default_rng(0)

    def variables(shape):
        return [tf.Variable(tf.cast(random.normal(size=shape), dtype)) for _ in range(case.weights)]

    vs, gs, grad_ws = variables(case.shape), variables(case.shape[case.axis]), variables(case.shape)
    ws, grad_vs, grad_gs = (variables(like[0].shape) for like in (vs, vs, gs))

    def graph(weight_norm, jit_compile):
        # The results are assigned to variables, which take them over without a copy. Returning one
        # to Python would cost more than the arithmetic of a small weight.
        @tf.function(jit_compile=jit_compile)
        def run():
            for i, (v, g) in enumerate(zip(vs, gs, strict=True)):
                with tf.GradientTape() as tape:
                    w = weight_norm(v, g, case)
                ws[i].assign(w)
                if backward:
                    grad_v, grad_g = tape.gradient(w, [v, g], output_gradients=grad_ws[i])
                    grad_vs[i].assign(grad_v)
                    grad_gs[i].assign(grad_g)

        return run

    return {
        OURS: graph(ours, jit_compile=False),
        FORMULA: graph(formula, jit_compile=False),
        L2_NORMALIZE: graph(l2_normalize, jit_compile=False),
        OURS_JIT: graph(ours, jit_compile=True),
        FORMULA_JIT: graph(formula, jit_compile=True),
        L2_NORMALIZE_JIT: graph(l2_normalize, jit_compile=True),
    }


def torch_contenders(case: Case, dtype: str, backward: bool) -> dict[str, Callable]:
    kind = getattr(torch, dtype)
    axis = case.axis % len(case.shape)
    shape = [1] * len(case.shape)
    shape[axis] = case.shape[axis]

    def tensors(shape):
        return [torch.randn(shape, dtype=kind) for _ in range(case.weights)]

    vs, gs, grad_ws = tensors(case.shape), tensors(shape), tensors(case.shape)
    ws, grad_vs = tensors(case.shape), tensors(case.shape)
    for tensor in vs + gs:
        tensor.requires_grad_(backward)
    # The same bytes as types that the CPU can add directly, which bfloat16 is not.
    plain_type = {2: torch.int16, 4: torch.float32}[vs[0].element_size()]
    v_bytes, grad_w_bytes, w_bytes, grad_v_bytes = (
        [tensor.detach().view(plain_type) for tensor in many] for many in (vs, grad_ws, ws, grad_vs)
    )

    results: list[Any] = [None] * case.weights

    def run():
        # As in the graph, all results exist at once, until those of the next call replace them.
        for i, (v, g, grad_w) in enumerate(zip(vs, gs, grad_ws, strict=True)):
            w = torch._weight_norm(v, g, axis)
            grads = torch.autograd.grad(w, (v, g), grad_w) if backward else ()
            results[i] = (w.detach(), *grads)

    def floor():
        for i in range(case.weights):
            w_bytes[i].copy_(v_bytes[i])
            if backward:
                torch.add(v_bytes[i], grad_w_bytes[i], out=grad_v_bytes[i])

    def fresh():
        for i in range(case.weights):
            touch_fresh(w_bytes[i]).copy_(v_bytes[i])
            if backward:
                torch.add(v_bytes[i], grad_w_bytes[i], out=touch_fresh(grad_v_bytes[i]))

    return {TORCH: run, FLOOR: floor, FRESH: fresh}


def kernel_contenders(case: Case, dtype: str, backward: bool, threads: int) -> dict[str, Callable]:
    """The kernels alone. Ours write into the caller's memory, which PyTorch's cannot do."""

    def arrays(shape, kind=dtype):
        return [aligned(torch.randn(shape).to(getattr(torch, kind))) for _ in range(case.weights)]

    units = case.shape[case.axis]
    vs, gs, grad_ws = arrays(case.shape), arrays(units), arrays(case.shape)
    ws, norms = arrays(case.shape), arrays(units, "float32")
    grad_vs, grad_gs = arrays(case.shape), arrays(units)

    def kernel():
        for i in range(case.weights):
            native.weight_norm(vs[i], gs[i], case.axis, out=(ws[i], norms[i]), threads=threads)
            if backward:
                native.weight_norm_grad(
                    grad_ws[i],
                    vs[i],
                    gs[i],
                    norms[i],
                    case.axis,
                    out=(grad_vs[i], grad_gs[i]),
                    threads=threads,
                )

    if case.axis not in (0, -1):
        return {KERNEL: kernel}  # PyTorch has kernels only for the first and the last axis
    kind = getattr(torch, dtype)
    axis = case.axis % len(case.shape)
    g_shape = [n if a == axis else 1 for a, n in enumerate(case.shape)]
    tensors = [
        [torch.randn(shape, dtype=kind) for _ in range(case.weights)]
        for shape in (case.shape, g_shape, case.shape)
    ]

    results: list[Any] = [None] * case.weights

    def theirs():  # All results exist at once, as ours do.
        for i, (v, g, grad_w) in enumerate(zip(*tensors, strict=True)):
            w, norm = torch._weight_norm_interface(v, g, axis)
            grads = ()
            if backward:
                grads = torch.ops.aten._weight_norm_interface_backward(grad_w, v, g, norm, axis)
            results[i] = (w, norm, *grads)

    return {KERNEL: kernel, TORCH_KERNEL: theirs}


def aligned(tensor):
    """Returns a tensor as an array; unlike NumPy, PyTorch aligns memory to cache lines."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(tf.bfloat16.as_numpy_dtype)


def touch_fresh(like):
    """Returns a tensor in new pages that nothing has touched."""
    pages = mmap.mmap(-1, like.nbytes)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


def measure(case: Case, dtype: str, backward: bool, *, threads: int, rounds: int) -> timing.Times:
    """Times one row of the tables, per weight."""
    contenders = tensorflow_contenders(case, dtype, backward)
    contenders |= torch_contenders(case, dtype, backward)
    contenders |= kernel_contenders(case, dtype, backward, threads)
    times = timing.interleave(contenders, rounds=rounds)
    return timing.Times({name: s / case.weights for name, s in times.seconds.items()})


def row_of(case: Case, dtype: str, backward: bool, times: timing.Times) -> dict[str, Any]:
    """Returns a row of the JSON file: every window's time, in seconds per weight."""
    return {
        "case": case.name,
        "shape": case.shape,
        "axis": case.axis,
        "dtype": dtype,
        "pass": "forward+backward" if backward else "forward",
        "weights_in_graph": case.weights,
        "megabytes": case.elements * tf.as_dtype(dtype).size / 1e6,
        "seconds": {name: list(map(float, samples)) for name, samples in times.seconds.items()},
    }


def table_of(rows: list[dict[str, Any]], title: str, ours: str, peers: list[str]) -> Table:
    """Returns a table of our times, and of each peer's times as multiples of ours."""
    table = Table(
        title=title, caption="median of the windows' ratios, ± half their interquartile range"
    )
    table.add_column("weight")
    table.add_column(f"{ours}, us", justify="right")
    for peer in peers:
        table.add_column(f"{peer} / {ours}", justify="right")
    table.add_column(f"{ours} / {FLOOR}", justify="right")
    table.add_column("fresh pages, us", justify="right")
    for row in rows:
        times = timing.Times({n: np.array(s) for n, s in row["seconds"].items()})
        table.add_row(
            row["case"],
            f"{times[ours].median * 1e6:.1f}",
            *(f"{times.ratio(peer, ours):.2f}" for peer in peers),
            f"{times.ratio(ours, FLOOR):.2f}",
            f"+{(times[FRESH].median - times[FLOOR].median) * 1e6:.0f}",
        )
    means = {peer: mean_ratio(rows, peer, ours) for peer in peers}
    table.add_section()
    floor = mean_ratio(rows, ours, FLOOR)
    table.add_row(
        "geometric mean", "", *(f"{m:.2f}" for m in means.values()), f"{floor:.2f}", style="bold"
    )
    return table


def mean_ratio(rows: list[dict[str, Any]], slow: str, fast: str) -> float:
    """Returns the geometric mean of the rows' median ratios."""
    return timing.geometric_mean(
        [float(np.median(np.divide(r["seconds"][slow], r["seconds"][fast]))) for r in rows]
    )


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws each contender's time as a multiple of the memory floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {
        OURS: "#d1495b",
        OURS_JIT: "#e79aa3",
        FORMULA: "#66788a",
        FORMULA_JIT: "#a9b4bf",
        TORCH: "#edae49",
    }
    figure, axes = plt.subplots(figsize=(8, 0.85 * len(rows) + 1.4), layout="constrained")
    height = 0.85 / len(colors)
    for number, (name, color) in enumerate(colors.items()):
        ratios = [np.divide(r["seconds"][name], r["seconds"][FLOOR]) for r in rows]
        low, middle, high = np.percentile(ratios, [25, 50, 75], axis=1)
        y = np.arange(len(rows)) + (number - (len(colors) - 1) / 2) * height
        axes.barh(y, middle, 0.9 * height, color=color, label=name)
        error = [middle - low, high - middle]
        axes.errorbar(middle, y, xerr=error, fmt="none", ecolor="black", lw=0.8, capsize=1.5)
        for at, value, end in zip(y, middle, high, strict=True):
            axes.annotate(
                f"{value:.1f}", (end, at), (4, 0), textcoords="offset points", va="center", size=8
            )
    axes.axvline(1, color="black", lw=1, ls=":")
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [r["case"] for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time / time to move the same bytes, dotted (lower is better)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, ncols=len(colors), loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op", description=summary)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="element type, default both"
    )
    parser.add_argument("--case", default="", help="only weights whose name contains this")
    parser.add_argument("--threads", type=int, default=cores, help="default %(default)s, all cores")
    parser.add_argument(
        "--rounds", type=int, default=15, help="windows per contender, default %(default)s"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the results of other weights in OUT/op.json"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="%(default)s")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the tables, and writes op.json and one plot for each dtype."""
    arguments = parse_arguments()
    cases = [case for case in CASES if arguments.case in case.name]
    if not cases:
        raise SystemExit(f"--case {arguments.case}: fits none of {[case.name for case in CASES]}")
    timing.keep_touched_memory()
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    machine = timing.describe_machine("tensorflow", "torch") | {"threads": arguments.threads}
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(machine)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "op.json"
    kept = json.loads(path.read_text())["results"] if arguments.add and path.exists() else []
    results = {(row["dtype"], row["pass"], row["case"]): row for row in kept}
    dtypes = [arguments.dtype] if arguments.dtype else ["float32", "bfloat16"]
    for dtype, backward, case in itertools.product(dtypes, (False, True), cases):
        with console.status(f"{dtype} {case.name}"):
            times = measure(
                case, dtype, backward, threads=arguments.threads, rounds=arguments.rounds
            )
        row = row_of(case, dtype, backward, times)
        results[row["dtype"], row["pass"], row["case"]] = row
    timing.write_json(path, machine, list(results.values()))
    for dtype, backward in itertools.product(dtypes, (False, True)):
        name = "forward+backward" if backward else "forward"
        found = [results.get((dtype, name, case.name)) for case in CASES]
        rows = [row for row in found if row is not None]
        title = f"{name}, {dtype}, {arguments.threads} threads"
        peers = [FORMULA, L2_NORMALIZE, OURS_JIT, FORMULA_JIT, L2_NORMALIZE_JIT, TORCH]
        console.print(table_of(rows, f"in a graph, {title}", OURS, peers))
        peers = [FORMULA_JIT, L2_NORMALIZE_JIT]
        console.print(table_of(rows, f"compiled by XLA, {title}", OURS_JIT, peers))
        with_peer = [row for row in rows if TORCH_KERNEL in row["seconds"]]
        if with_peer:
            console.print(table_of(with_peer, f"kernels, {title}", KERNEL, [TORCH_KERNEL]))
    for dtype in dtypes:
        title = f"weight normalization forward+backward, {dtype}, {arguments.threads} threads"
        rows = [row for row in results.values() if row["dtype"] == dtype]
        rows = [row for row in rows if row["pass"] == "forward+backward"]
        rows.sort(key=lambda row: [case.name for case in CASES].index(row["case"]))
        plot(rows, f"{title}\n{machine['cpu']}", arguments.out / f"op-{dtype}.png")
    console.print(f"wrote {path} and the plots next to it")


if __name__ == "__main__":
    main()
