"""The paper's protocol: each arm at each learning rate, then at its best rate with more seeds.

Each run is a process with its own folder, OUT/ARM-RATE-SEED, which records how the run ended.
Therefore the same command continues a sweep that was stopped or killed.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.live
import rich.text

from models.common import files, metrics, run_folder
from models.common.errors import UserError
from models.common.options import SweepConfig, flags, show
from models.common.progress import duration

_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
GRID = ("arms", "learning_rates", "seeds", "jobs")


def run(config: SweepConfig) -> None:
    """Trains all `config.arms`, `learning_rates` and `seeds`, `config.jobs` runs at a time.

    A run that diverges is a result and is not retried. After any other failure the other runs
    go on, unless the failed run never began, because then they would fail in the same way.
    """
    sweep = Sweep(config)
    sweep.refuse_changes()
    with sweep.stopping():
        sweep.make_runs()
    sweep.report()


class Sweep:
    """The runs of a sweep. `config` is their template; each run is identified by its own Config."""

    def __init__(self, config: SweepConfig):
        self.config, self.root = config, Path(config.out)
        self.arms = tuple(dict.fromkeys(config.arms)) or tuple(config.ARMS)
        self.rates = tuple(dict.fromkeys(config.learning_rates))
        self.seeds = tuple(dict.fromkeys(config.seeds))
        self.measured = "highest " * config.SELECT_HIGHEST + config.MEASURE
        self._running: dict[SweepConfig, tuple[subprocess.Popen, float]] = {}
        self._failed: dict[SweepConfig, str] = {}
        self._console = rich.console.Console()

    def one(self, arm: str, rate: Any, seed: int) -> SweepConfig:
        """Returns the Config of a run."""
        return dataclasses.replace(
            self.config,
            **self.config.ARMS[arm],
            learning_rate=rate,
            seed=seed,
            sweep=False,
            out=str(self.root / f"{arm}-{rate:g}-{seed}"),
        )

    def first(self, arm: str) -> list[SweepConfig]:
        """Returns the runs with the first seed, one for each rate."""
        return [self.one(arm, rate, self.seeds[0]) for rate in self.rates]

    def best(self, arm: str) -> SweepConfig | None:
        """Returns an arm's best first-seed run, None before all have ended or if all diverged."""
        runs = self.first(arm)
        if not all(map(run_folder.outcome, runs)):
            return None
        finished = [one for one in runs if run_folder.outcome(one) == "finished"]
        choose = min if self.config.LOWER_IS_BETTER else max
        return choose(finished, key=self.measure, default=None)

    def measure(self, one: SweepConfig) -> float:
        """Returns the measure of a finished run."""
        return metrics.last(one.out, self.config.MEASURE, self.config.SELECT_HIGHEST)

    def wanted(self) -> list[SweepConfig]:
        """Returns the runs to make; an arm's other seeds follow once its best rate is known."""
        runs = [one for arm in self.arms for one in self.first(arm)]
        for arm in self.arms:
            if best := self.best(arm):
                runs += [self.one(arm, best.learning_rate, seed) for seed in self.seeds[1:]]
        return runs

    def refuse_changes(self) -> None:
        """Raises UserError if the folder holds runs whose hyper-parameters differ from these."""
        varied = {"seed", "learning_rate", *self.config.arm_fields()}
        for file in sorted(self.root.glob("*/config.json")):
            saved = run_folder.load_config(file.parent, type(self.config))
            where = f"--sweep: in {file.parent}"
            run_folder.refuse_changes(saved, self.config, where, varied)

    def make_runs(self) -> None:
        """Starts the runs and waits until all of them have ended."""
        live = rich.live.Live(console=self._console, auto_refresh=False, transient=True)
        with live:
            while True:
                for one in self.wanted():
                    known = one in self._running or one in self._failed or run_folder.outcome(one)
                    if not known and len(self._running) < self.config.jobs:
                        self._start(one)
                if not self._running:
                    return
                if self._console.is_terminal:
                    lines = (f"{Path(one.out).name}  {_last_line(one)}" for one in self._running)
                    text = rich.text.Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
                    live.update(text, refresh=True)
                time.sleep(0.5)
                for one in [one for one, (p, _) in self._running.items() if p.poll() is not None]:
                    self._end(one)

    def _start(self, one: SweepConfig) -> None:
        if (Path(one.out) / "config.json").exists():
            default = run_folder.load_config(one.out, type(one))
            words = ["--resume"]
        else:
            default = one.of_preset(one.preset)
            words = ["--preset", one.preset]
        same = {name: getattr(one, name) for name in (*GRID, "out", "resume")}
        same |= {"accept_changes": False, "sweep": False}
        words += ["--out", one.out, *flags(one, dataclasses.replace(default, **same))]
        threads = max(1, len(os.sched_getaffinity(0)) // self.config.jobs)
        shares = {"TF_NUM_INTRAOP_THREADS": f"{threads}", "OMP_NUM_THREADS": f"{threads}"}
        search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with files.writing(self.root, "folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            log = open(f"{one.out}.log", "a")  # noqa: SIM115 closed below
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", run_folder.program_of(type(one)), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=(shares if self.config.jobs > 1 else {})
                | os.environ
                | {"PYTHONPATH": os.pathsep.join(search)},
                start_new_session=True,  # Ctrl-C reaches the sweep, which ends its runs.
                # If the sweep is killed, SIGTERM makes its runs save and exit.
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        self._running[one] = process, time.monotonic()

    def _end(self, one: SweepConfig) -> None:
        process, began = self._running.pop(one)
        outcome = run_folder.outcome(one)
        if outcome == "finished":
            text = f"{self.measured} {self.measure(one):.5g}"
        elif outcome == "diverged":
            text = f"diverged: {run_folder.load(one.out)['diverged']}"
        else:
            text = self._failed[one] = f"failed (status {process.returncode}): {_last_line(one)}"
            if not (Path(one.out) / "config.json").exists():
                raise UserError(f"{Path(one.out).name} {text}")
        done = [run_folder.outcome(other) for other in self.wanted() if other not in self._running]
        total = len(self.arms) * (len(self.rates) + len(self.seeds) - 1)
        taken = duration(time.monotonic() - began)
        self._console.print(
            f"{sum(map(bool, done))} of {total} runs  {Path(one.out).name}  {text}  {taken}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Makes the runs save and exit if the sweep ends first, as after Ctrl-C or SIGTERM."""

        def terminate(number: int, _: Any) -> None:
            raise SystemExit(128 + number)

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            for process, _ in self._running.values():
                process.terminate()
            if self._running:
                print(f"stopping {len(self._running)} runs; they save first", flush=True)
            for process, _ in self._running.values():
                process.wait()
            signal.signal(signal.SIGTERM, before)

    def report(self) -> None:
        """Prints each arm's best rate; raises UserError if runs failed."""
        for arm in self.arms:
            if best := self.best(arm):
                values = [self.one(arm, best.learning_rate, seed) for seed in self.seeds]
                shown = [
                    f"{self.measure(one):.5g}"
                    for one in values
                    if run_folder.outcome(one) == "finished"
                ]
                print(f"{arm}: best rate {show(best.learning_rate)}, ", end="")
                print(f"{self.measured} {', '.join(shown)}")
        if self._failed:
            names = ", ".join(Path(one.out).name for one in self._failed)
            raise UserError(
                f"--sweep: {names} failed, see {self.root}/NAME.log; repeat the command to retry"
            )
        wanted = self.wanted()
        diverged = sum(run_folder.outcome(one) == "diverged" for one in wanted)
        print(
            f"all {len(wanted)} runs have ended"
            + (f", {diverged} of them diverged" if diverged else "")
            + f"; they are in {self.root}"
        )


def _last_line(one: SweepConfig) -> str:
    lines = Path(f"{one.out}.log").read_text(errors="replace").splitlines()
    return lines[-1].strip() if lines else ""
