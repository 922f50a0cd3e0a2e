"""Figures and tables of runs: reading runs, checking that they are comparable, and the output.

Each program defines its figures in models/PROGRAM/figures.py, in draw(runs, output).
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

from models.common import files, metrics, options, run_folder
from models.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """The content of a run folder: the Config, metrics.csv by column, and caveats on the results.

    Attributes:
      arm: the name of its arm, or its parameterization if it belongs to no arm.
      preset: the preset's name. Options that change it, except for the arm and the rate, make it a
        different preset: "cpu, changed: width 4, epochs 1".
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
        """Whether the run belongs to an arm."""
        return self.arm in self.config.ARMS

    def curve(self, y: str, *others: str) -> tuple[np.ndarray, ...]:
        """Returns the columns `epoch`, y and others, without rows in which epoch or y is blank."""
        missing = [math.nan] * len(self.metrics.get("step", ()))
        columns = np.array([self.metrics.get(name, missing) for name in ("epoch", y, *others)])
        return tuple(columns[:, np.isfinite(columns[:2]).all(axis=0)])


def find_runs(paths: Sequence[str | Path], output: "Output") -> list[FinishedRun]:
    """Returns the runs in `paths`, which are run folders or folders that contain runs."""
    found = {}
    for path in map(Path, paths):
        configs = sorted(path.rglob("config.json"))
        folders = [file.parent for file in configs if (file.parent / "metrics.csv").exists()]
        with output.attempt():
            if not path.is_dir():
                raise UserError(f"{path}: there is no such folder")
            if not folders:
                raise UserError(f"{path}: no run there (no config.json with metrics.csv found)")
        for folder in folders:
            with output.attempt():
                found[folder.resolve()] = read_run(folder)  # Once, even if two paths hold it.
    return list(found.values())


def read_run(folder: Path) -> FinishedRun:
    """Returns the run in a folder."""
    content = run_folder.load(folder)
    program = content["program"].removeprefix("models.")
    try:
        config_class = importlib.import_module(f"models.{program}.config").Config
    except ModuleNotFoundError:
        raise UserError(f"{folder}: no figures for the program {program!r}; omit it") from None
    config = run_folder.load_config(folder, config_class)
    kinds = {arm["parameterization"] for arm in config.ARMS.values()}
    if config.parameterization not in kinds:
        raise UserError(
            f"{folder}: its config.json has parameterization {config.parameterization!r}, which "
            f"must be one of {', '.join(sorted(kinds))}; leave this run out"
        )
    differences = config.changes({"learning_rate", *(config.arm_fields() if config.arm else ())})
    changes = [f"{folder.name} {text}" for text in content.get("changes", ())]
    config = dataclasses.replace(config, out=str(folder))
    return FinishedRun(
        folder,
        program,
        config,
        config.arm or config.parameterization,
        config.preset + (f", {differences}" if differences else ""),
        metrics.read(folder),
        "; ".join(filter(None, [content.get("caveats"), *changes])),
        run_folder.outcome(config),
    )


def group(runs: Sequence[FinishedRun], key: Any) -> dict[Any, list[FinishedRun]]:
    """Returns the runs grouped by key(run)."""
    groups: dict[Any, list[FinishedRun]] = collections.defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def refuse_mixed(runs: Sequence[FinishedRun], field: str, what: str) -> None:
    """Raises UserError if the runs differ in this field of the Config."""
    values = {getattr(run.config, field): run.path for run in runs}
    if len(values) > 1:
        shown = " and some ".join(map(str, sorted(values)))
        raise UserError(
            f"some {what} have {options.flag_of(field)} {shown}, so their results are not "
            "comparable; draw them separately"
        )


def check_presets(runs: Sequence[FinishedRun], label: bool) -> None:
    """Raises UserError if the runs have different presets, unless they are to be labeled."""
    presets = {run.preset: run.path for run in runs}
    if len(presets) > 1 and not label:
        named = (f"{path} is --preset {options.shorten(n)}" for n, path in presets.items())
        raise UserError(
            f"{'; '.join(named)}. Runs of different presets are not comparable. Draw them "
            "separately, or give --label-presets to label each line and row"
        )


def check_same_settings(seeds: Sequence[FinishedRun]) -> None:
    """Raises UserError if runs to be averaged differ in more than the seed, or share a seed."""
    first, by_seed = seeds[0], dict[int, Path]()
    for run in seeds:
        names = first.config.differences().keys() | run.config.differences().keys()
        for name in sorted(names - {"parameterization", "learning_rate"}):
            values = [getattr(r.config, name) for r in (first, run)]
            if values[0] != values[1]:
                raise UserError(
                    f"{first.path} has {options.flag_of(name)} {options.show(values[0])} and "
                    f"{run.path} {options.show(values[1])}: they are not seeds of one experiment. "
                    "Draw them separately"
                )
        other = by_seed.setdefault(run.config.seed, run.path)
        if other != run.path:
            raise UserError(
                f"{other} and {run.path} both have --seed {run.config.seed}: the same run would "
                "count twice. Leave one of them out"
            )


def mean_and_error(values: Sequence[Any] | np.ndarray) -> tuple[Any, Any]:
    """Returns the mean over the first axis and its standard error (NaN for one value)."""
    values = np.asarray(values, float)
    count = len(values)
    error = values.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else values[0] * math.nan
    return values.mean(axis=0), error


def with_error(mean: float, error: float, form: str = ".2f") -> str:
    """Returns "8.46 ± 0.05", the mean alone if the error is NaN, or "" if the mean is NaN."""
    if math.isnan(mean):
        return ""
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")


class Output:
    """Writes figures as PNG files and collects tables.

    Args:
      folder: the folder for the figures.
      label_presets: whether to label different presets instead of refusing to mix them.
      name: the experiment's name, which replaces the program's in the names of the output.
    """

    def __init__(self, folder: Path, label_presets: bool = False, name: str = ""):
        self.folder, self.label_presets, self.name = folder, label_presets, name
        self.tables: dict[str, str] = {}
        self.figures: list[Path] = []
        self.errors: list[str] = []
        with files.writing(folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Collects a UserError in `errors`, so that the other figures are still drawn."""
        try:
            yield
        except UserError as error:
            self.errors.append(str(error))

    @contextlib.contextmanager
    def figure(self, name: str, title: str, x: str, y: str) -> Iterator[Any]:
        """Yields matplotlib axes and writes NAME.png on exit."""
        import matplotlib.figure

        figure = matplotlib.figure.Figure(figsize=(6.5, 5.5), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y, title=textwrap.fill(title, 56))
        yield axes
        figure.legend(loc="outside lower center", frameon=False, fontsize="small")
        path = self.folder / f"{name}.png"
        with files.writing(path):
            figure.savefig(path)
        self.figures.append(path)
        print(f"wrote {path}")

    def table(
        self, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
        notes: str = "",
    ) -> None:  # fmt: skip
        """Adds a table, as Markdown, to `tables`."""
        if name in self.tables:
            raise UserError(f"{name}: the runs belong to several experiments; draw them separately")
        lines = [["", *columns, ""], ["", *["---"] * len(columns), ""]]
        lines += [["", *row, ""] for row in rows]
        text = "\n".join(" | ".join(line).strip() for line in lines)
        self.tables[name] = f"{text}\n\n{title}{': ' if notes else ''}{notes}"
