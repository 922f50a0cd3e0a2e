"""Figures and tables of finished runs: reading runs, refusing to mix them, and the output.

A program has its figures in models/PROGRAM/figures.py: draw(runs, output).
"""

import collections
import contextlib
import dataclasses
import importlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.common import metrics, options, run_folder
from models.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run folder: its Config, metrics.csv by column, and what to say beside its results.

    Attributes:
      arm: the name of its arm; its parameterization if its values are no arm's.
      preset: flags that change a preset, other than the arm and the rate, make another preset of
        it: "cpu, changed: width 4, epochs 1".
    """

    path: Path
    program: str
    config: Any
    arm: str
    preset: str
    metrics: dict[str, list[float]]
    caveats: str
    outcome: str

    @property
    def known(self) -> bool:
        """Whether its values are those of an arm."""
        return self.arm in self.config.ARMS

    def curve(self, y: str, *others: str) -> tuple[np.ndarray, ...]:
        """Returns `epoch` and columns of metrics.csv, without rows in which epoch or y is blank."""
        missing = [math.nan] * len(self.metrics.get("step", ()))
        columns = np.array([self.metrics.get(name, missing) for name in ("epoch", y, *others)])
        return tuple(columns[:, np.isfinite(columns[:2]).all(axis=0)])


def find_runs(paths: Sequence[str | Path], output: "Output") -> list[FinishedRun]:
    """Returns the runs in the folders, each of which is a run or holds some."""
    found = {}
    for path in map(Path, paths):
        configs = sorted(path.rglob("config.json"))
        folders = [file.parent for file in configs if (file.parent / "metrics.csv").exists()]
        with output.attempt():
            if not path.is_dir():
                raise UserError(f"{path}: there is no such folder")
            if not folders:
                raise UserError(f"{path}: no run there (no config.json and metrics.csv, nor below)")
        for folder in folders:
            with output.attempt():
                found[folder.resolve()] = read_run(folder)  # Once, if two of `paths` hold it.
    return list(found.values())


def read_run(folder: Path) -> FinishedRun:
    """Returns the run in a folder."""
    content = run_folder.load(folder)
    program = content["program"].removeprefix("models.")
    try:
        config_class = importlib.import_module(f"models.{program}.config").Config
    except ModuleNotFoundError:
        raise UserError(f"{folder}: no figures for the program {program!r}") from None
    config = run_folder.load_config(folder, config_class)
    kinds = {arm["parameterization"] for arm in config.ARMS.values()}
    if config.parameterization not in kinds:
        raise UserError(
            f"{folder}: its config.json has parameterization {config.parameterization!r}, which "
            f"must be one of {', '.join(sorted(kinds))}; leave this run out"
        )
    changes = config.changes({"learning_rate", *(config.arm_fields() if config.arm else ())})
    config = dataclasses.replace(config, out=str(folder))
    return FinishedRun(
        folder,
        program,
        config,
        config.arm or config.parameterization,
        config.preset + (f", {changes}" if changes else ""),
        metrics.read(folder),
        content.get("caveats", ""),
        run_folder.outcome(config),
    )


def group(runs: Sequence[FinishedRun], key: Any) -> dict[Any, list[FinishedRun]]:
    """Returns the runs by key(run)."""
    groups: dict[Any, list[FinishedRun]] = collections.defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def refuse_mixed(runs: Sequence[FinishedRun], field: str, what: str) -> None:
    """Refuses to compare runs of which a field of the Config has several values."""
    values = {getattr(run.config, field): run.path for run in runs}
    if len(values) > 1:
        shown = " and some ".join(map(str, sorted(values)))
        raise UserError(
            f"some {what} have {options.flag_of(field)} {shown}: their results are not "
            "comparable; draw them apart"
        )


def check_presets(runs: Sequence[FinishedRun], label: bool) -> None:
    """Refuses to draw runs of different presets together, unless they are labeled."""
    presets = {run.preset: run.path for run in runs}
    if len(presets) > 1 and not label:
        named = (f"{path} is --preset {options.shorten(n)}" for n, path in presets.items())
        raise UserError(
            f"{'; '.join(named)}. Scaled runs and the paper's are not comparable. Draw them apart, "
            "or give --label-presets to label each line and row"
        )


def check_same_settings(seeds: Sequence[FinishedRun]) -> None:
    """Refuses to average runs that differ in more than the seed, or have the same seed."""
    first, by_seed = seeds[0], dict[int, Path]()
    for run in seeds:
        names = first.config.differences().keys() | run.config.differences().keys()
        for name in sorted(names - {"parameterization", "learning_rate"}):
            values = [getattr(r.config, name) for r in (first, run)]
            if values[0] != values[1]:
                raise UserError(
                    f"{first.path} has {options.flag_of(name)} {options.show(values[0])} and "
                    f"{run.path} {options.show(values[1])}: they are not seeds of one experiment. "
                    "Draw them apart"
                )
        other = by_seed.setdefault(run.config.seed, run.path)
        if other != run.path:
            raise UserError(
                f"{other} and {run.path} both have --seed {run.config.seed}: the same run would "
                "count twice. Leave one of them out"
            )


def mean_and_error(values: Sequence[Any] | np.ndarray) -> tuple[Any, Any]:
    """Returns the mean over the first axis and its standard error (nan for one value)."""
    values = np.asarray(values, float)
    count = len(values)
    error = values.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else values[0] * math.nan
    return values.mean(axis=0), error


def with_error(mean: float, error: float, form: str = ".2f") -> str:
    """Returns "8.46 ± 0.05", or the mean alone where the error is nan; "" if that is."""
    if math.isnan(mean):
        return ""
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")


class Output:
    """Writes figures as PNG files, and collects tables.

    Args:
      folder: of the figures.
      label_presets: label several presets instead of refusing them.
      name: of all figures and tables, if they are of one experiment.
    """

    def __init__(self, folder: Path, label_presets: bool = False, name: str = ""):
        self.folder, self.label_presets, self.name = folder, label_presets, name
        self.tables: dict[str, str] = {}
        self.figures: list[Path] = []
        self.errors: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot write there ({error.strerror})") from None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Keeps a UserError in `errors`, so that the other figures are drawn."""
        try:
            yield
        except UserError as error:
            self.errors.append(str(error))

    @contextlib.contextmanager
    def figure(self, name: str, title: str, x: str, y: str) -> Iterator[Any]:
        """Gives matplotlib's axes, and writes NAME.png."""
        import matplotlib.figure

        figure = matplotlib.figure.Figure(figsize=(6.5, 5.5), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y, title=textwrap.fill(title, 56))
        yield axes
        figure.legend(loc="outside lower center", frameon=False, fontsize="small")
        path = self.folder / f"{name}.png"
        figure.savefig(path)
        self.figures.append(path)
        print(f"wrote {path}")

    def table(
        self, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
        notes: str = "",
    ) -> None:  # fmt: skip
        """Keeps a table as Markdown."""
        if name in self.tables:
            raise UserError(f"{name}: the runs are of several experiments; draw them apart")
        lines = [["", *columns, ""], ["", *["---"] * len(columns), ""]]
        lines += [["", *row, ""] for row in rows]
        text = "\n".join(" | ".join(line).strip() for line in lines)
        self.tables[name] = f"{text}\n\n{title}{': ' if notes else ''}{notes}"
