"""Times alternatives against each other in one run: interleaved windows, medians, quartiles.

The machine's speed drifts, so times from different runs cannot be compared. Within a run, each
round times every contender in one window, in random order, and a ratio is the median over all
rounds of the quotient of two contenders' windows.
"""

import ctypes
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Quartiles:
    """A median and the lower and upper quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> "Quartiles":
        low, median, high = np.percentile(samples, [25, 50, 75])
        return cls(float(median), float(low), float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ±{(self.high - self.low) / 2:{spec}}"


class Times:
    """Seconds per call of each contender in each round."""

    def __init__(self, seconds: dict[str, np.ndarray]):
        self.seconds = seconds

    def __contains__(self, name: str) -> bool:
        return name in self.seconds

    def __getitem__(self, name: str) -> Quartiles:
        return Quartiles.of(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> Quartiles:
        """Returns how many times as long `slow` takes as `fast`, paired by round."""
        return Quartiles.of(self.seconds[slow] / self.seconds[fast])


def interleave(
    contenders: dict[str, Callable[[], object]],
    *,
    rounds: int = 15,
    window_seconds: float = 0.03,
    seed: int = 0,
) -> Times:
    """Times every contender in `rounds` windows of about `window_seconds`, in random order."""
    calls = {}
    for name, run in contenders.items():
        for _ in range(3):  # trace, compile, touch memory
            run()
        begin = time.perf_counter()
        run()
        calls[name] = max(1, round(window_seconds / (time.perf_counter() - begin)))
    random = np.random.default_rng(seed)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in random.permutation(names):
                run = contenders[name]
                run()  # warms caches, and outlasts the previous contender's spinning threads
                begin = time.perf_counter()
                for _ in range(calls[name]):
                    run()
                seconds[name].append((time.perf_counter() - begin) / calls[name])
    finally:
        gc.enable()
    return Times({name: np.array(samples) for name, samples in seconds.items()})


def geometric_mean(values: list[float]) -> float:
    """Returns the geometric mean, the one that suits ratios."""
    return float(np.exp(np.mean(np.log(values))))


def keep_touched_memory() -> None:
    """Makes malloc keep freed memory, so that later allocations do not get untouched pages.

    Otherwise the system maps each block above 32 MB anew, and the first access to its pages takes
    about as long as the work on them. That is the allocator's cost, the same for all contenders.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
        if libc.mallopt(option, value) != 1:
            raise OSError(f"mallopt({option}, {value}) failed")


def describe_machine(*distributions: str) -> dict[str, object]:
    """Returns the properties of the machine and the software that the times depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": commit,
        **{name: metadata.version(name) for name in distributions},
    }


def report_steps(
    times: Times,
    title: str,
    path: Path,
    machine: dict[str, object],
    ours: str = "weight_norm",
    more: tuple[str, dict[str, str]] | None = None,
) -> None:
    """Prints seconds per training step and ratios to "normal" and to `ours`, and writes JSON.

    `more` is the heading of a last column and its cells by contender.
    """
    from rich.console import Console  # benchmarks.cuda needs nothing but NumPy.
    from rich.table import Table

    heading, cells = more or ("", {})
    columns = ["", "seconds", "times normal", f"times ours ({ours})", *filter(None, [heading])]
    table = Table(*columns, title=title)
    for name in times.seconds:
        normal = f"{times.ratio(name, 'normal'):.3f}" if "normal" in times else ""
        row = [name, f"{times[name]:.3f}", normal, f"{times.ratio(name, ours):.3f}"]
        table.add_row(*row, *([cells[name]] if more else []))
    Console().print(table)
    write_json(
        path, machine, [{"name": n, "seconds": s.tolist()} for n, s in times.seconds.items()]
    )
    print(f"wrote {path}")


def write_json(path: Path, machine: dict[str, object], results: list[dict[str, object]]) -> None:
    """Writes the times of all windows of a run, for later analysis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
