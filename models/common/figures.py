"""Figures and tables of finished runs: reading runs, drawing axes; each program draws its own.

A program has its figures in models/PROGRAM/figures.py: draw(runs, output).
"""

import collections
import contextlib
import dataclasses
import importlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table
from rich.markup import escape

from models.common import metrics, options, run_folder
from models.common.errors import UserError

COLORS = {
    "normal": "C0",
    "weight_norm": "C1",
    "batch_norm": "C2",
    "mean_only_bn": "C3",
    "weight_norm_mean_only_bn": "C4",
}


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run folder: its Config as a dict, metrics.csv by column, and the note of its results.

    Flags that change a preset make another preset of it: config["preset"] is then "cpu, changed:
    width 4, epochs 1".
    """

    path: Path
    program: str
    config: dict[str, Any]
    differs_from_paper: Mapping[str, Any]
    metrics: dict[str, list[float]]
    note: str

    def curve(self, x: str, y: str, *others: str) -> tuple[np.ndarray, ...]:
        """Returns columns of metrics.csv, without the rows in which x or y is blank."""
        missing = [math.nan] * len(self.metrics.get("step", ()))
        columns = np.array([self.metrics.get(name, missing) for name in (x, y, *others)])
        return tuple(columns[:, np.isfinite(columns[:2]).all(axis=0)])


def find_runs(paths: Sequence[str], output: "Output") -> list[FinishedRun]:
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
    program = run_folder.load(folder)["program"].removeprefix("models.")
    try:
        module = importlib.import_module(f"models.{program}.config")
    except ModuleNotFoundError:
        raise UserError(f"{folder}: no figures for the program {program!r}") from None
    config = run_folder.load_config(folder, module.Config)
    kind = getattr(config, "parameterization", None)
    if kind not in COLORS:
        raise UserError(
            f"{folder}: its config.json has parameterization {kind!r}, which must be one of "
            f"{', '.join(COLORS)}; leave this run out"
        )
    changes, note = config.changes(), folder / "note.txt"
    preset = config.preset + (f", {changes}" if changes else "")
    return FinishedRun(
        folder,
        program,
        dataclasses.asdict(config) | {"preset": preset},
        config.differences(),
        metrics.read(folder),
        note.read_text().strip() if note.exists() else "",
    )


def group(runs: Sequence[FinishedRun], *fields: str) -> dict[tuple, list[FinishedRun]]:
    """Returns the runs by their values of these fields of the Config."""
    groups: dict[tuple, list[FinishedRun]] = collections.defaultdict(list)
    for run in runs:
        groups[tuple(run.config[name] for name in fields)].append(run)
    return dict(groups)


def mean_and_error(values: Sequence[Any] | np.ndarray) -> tuple[Any, Any]:
    """Returns the mean over the first axis and its standard error (nan for one value)."""
    values = np.asarray(values, float)
    count = len(values)
    error = values.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else values[0] * math.nan
    return values.mean(axis=0), error


def finished(runs: Sequence[FinishedRun], column: str, name: str) -> list[FinishedRun]:
    """Returns the runs with at least one epoch; UserError without any.

    Args:
      runs: of one program.
      column: of metrics.csv, filled at the end of an epoch.
      name: the program's, for the error.
    """
    found = [run for run in runs if len(run.curve("epoch", column)[0])]
    if not found:
        raise UserError(f"none of {name} runs has finished an epoch yet")
    return found


def notes_of(runs: Sequence[FinishedRun], *notes: str) -> str:
    """Returns the notes of runs, each once, after these."""
    return "; ".join([*notes, *sorted({run.note for run in runs if run.note})])


def with_error(mean: float, error: float, form: str = ".2f") -> str:
    """Returns "8.46 ± 0.05", or the mean alone where the error is nan, for a single run."""
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")


def check_presets(runs: Sequence[FinishedRun], label: bool) -> None:
    """Refuses to draw runs of different presets together, unless they are labeled."""
    presets = {run.config["preset"]: run.path for run in runs}
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
        names = first.differs_from_paper.keys() | run.differs_from_paper.keys()
        for name in sorted(names - {"parameterization"}):
            values = [r.config.get(name) for r in (first, run)]
            if values[0] != values[1]:
                raise UserError(
                    f"{first.path} has --{name.replace('_', '-')} {values[0]} and {run.path} "
                    f"{values[1]}: they are not seeds of one experiment. Draw them apart"
                )
        other = by_seed.setdefault(run.config["seed"], run.path)
        if other != run.path:
            raise UserError(
                f"{other} and {run.path} both have --seed {run.config['seed']}: the same run would "
                "count twice. Leave one of them out"
            )


class Output:
    """Writes figures as PNG files, and tables to the terminal and TABLES.md."""

    def __init__(self, folder: Path, label_presets: bool):
        self.folder, self.label_presets = folder, label_presets
        self._console = rich.console.Console()
        self._tables: list[str] = []
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

    def figure(self, name: str, title: str, runs: Sequence[FinishedRun], x: str, y: str) -> "Axes":
        """Returns a context manager with matplotlib's axes, which writes NAME.png."""
        return Axes(self.folder / f"{name}.png", title, runs, x, y)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: str = ""
    ) -> None:
        """Prints a table, and adds it to TABLES.md."""
        heads = (rich.table.Column(name, overflow="fold") for name in columns)
        shown = rich.table.Table(*heads, title=title, caption=notes or None)
        for row in rows:
            shown.add_row(*map(escape, row))  # "[cpu preset]" is no markup.
        self._console.print(shown)
        lines = [f"### {title}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self._tables.append("\n".join([*lines, "", notes, ""]))
        (self.folder / "TABLES.md").write_text("\n".join(self._tables))


class Axes:
    """A figure of one plot; a context manager that saves it.

    Colors are parameterizations, line styles presets. The title names the preset if all runs have
    the same, otherwise the legend does.
    """

    def __init__(self, path: Path, title: str, runs: Sequence[FinishedRun], x: str, y: str):
        import matplotlib.figure
        import matplotlib.ticker

        self._path = path
        self._presets = sorted({run.config["preset"] for run in runs})
        if self._presets != ["paper"] and len(self._presets) == 1:
            title += f" [{preset_name(self._presets[0])}]"
        self._figure = matplotlib.figure.Figure(figsize=(6, 4), dpi=150, layout="constrained")
        self.axes = self._figure.subplots()
        self.axes.set(xlabel=x, ylabel=y, title=textwrap.fill(title, 56))
        self.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))  # Epochs.

    def __enter__(self) -> "Axes":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.axes.legend(frameon=False)
            self._figure.savefig(self._path)
            print(f"wrote {self._path}")

    def line(self, runs: Sequence[FinishedRun], x: str, y: str, error: str = ""):
        """Draws the mean of several seeds, as far as all of them reach, and its standard error.

        Args:
          runs: the seeds.
          x: a column of metrics.csv.
          y: a column of metrics.csv.
          error: the column with the standard error of y, drawn if there is only one seed.
        """
        curves = [run.curve(x, y, error) for run in runs]
        length = min(len(curve[0]) for curve in curves)
        if not length:
            return
        config = runs[0].config
        at = curves[0][0][:length]
        mean, spread = mean_and_error([curve[1][:length] for curve in curves])
        if len(runs) == 1:
            spread = curves[0][2]
        label = parameterization(config)
        label += f" [{preset_name(config['preset'])}]" if len(self._presets) > 1 else ""
        label += f", {len(runs)} seeds" if len(runs) > 1 else ""
        color = COLORS[config["parameterization"]]
        style = ["-", "--", ":", "-."][self._presets.index(config["preset"]) % 4]
        self.axes.plot(at, mean, style, color=color, label=textwrap.fill(label, 40))
        self.axes.fill_between(at, mean - spread, mean + spread, color=color, alpha=0.25, lw=0)


def parameterization(config: dict[str, Any]) -> str:
    """Returns the name of a run's parameterization in words."""
    return config["parameterization"].replace("_", " ").replace("bn", "BN")


def preset_name(name: str) -> str:
    """Returns the name of a run's preset in words."""
    return options.shorten(name) if "changed: " in name else f"{name} preset"


def row_label(config: dict[str, Any], output: Output) -> str:
    """Returns a table row's name: parameterization, and preset unless it is the paper's."""
    shown = config["preset"] != "paper" or output.label_presets
    return parameterization(config) + (f" [{preset_name(config['preset'])}]" if shown else "")
