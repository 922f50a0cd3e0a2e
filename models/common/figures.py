"""Figures and tables of finished runs: reading runs, and comparing arms by learning rate.

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


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: the last value of a column of metrics.csv, or its highest.

    Attributes:
      name: of the column in metrics.csv.
      label: what it is, with its unit.
      form: the format of its numbers.
      scale: a factor, such as 100 for percent.
      highest: the highest value instead of the last.
    """

    name: str
    label: str
    form: str = ".2f"
    scale: float = 1
    highest: bool = False

    def of(self, run: FinishedRun, epoch: float) -> float:
        """Returns a run's value up to this epoch, nan where it has none."""
        epochs, values = run.curve(self.name)
        values = self.scale * values[epochs <= epoch * (1 + 1e-6)]
        return float(values.max() if self.highest else values[-1]) if len(values) else math.nan


@dataclasses.dataclass(frozen=True)
class Experiment:
    """How a program's arms are compared.

    Attributes:
      title: of figures and tables.
      curve: what is drawn by epoch.
      columns: of the table. The first is the measure by which a rate is chosen.
      paper: the paper's result of each arm.
      labels: of arms whose names in words will not do.
      limits: of the paper's figure, ((x), (y)), for runs of its preset.
      error: columns of metrics.csv with the standard error of the measure in a single run, and the
        number of what it is over, which is named third.
    """

    title: str
    curve: Column
    columns: tuple[Column, ...]
    paper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None
    error: tuple[str, str, str] | None = None


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


class Arm:
    """The runs of one arm and preset: those of each learning rate, and those of the best rate.

    The best rate has the best last value of the measure with the first seed.
    """

    def __init__(self, experiment: Experiment, runs: list[FinishedRun]):
        self.experiment, self.config = experiment, runs[0].config
        self.name, self.preset = runs[0].arm, runs[0].preset
        self.measure = experiment.columns[0]
        self.seed = min(run.config.seed for run in runs)
        self.rates = dict(sorted(group(runs, lambda run: run.config.rate).items()))
        for seeds in self.rates.values():
            check_same_settings(seeds)
        first = {rate: run for rate in self.rates if (run := self.first(rate)) and self.ends(run)}
        self.best: float | None = None
        self.runs: list[FinishedRun] = []
        if first:
            epoch = min(map(self.ends, first.values()))
            choose = min if self.config.LOWER_IS_BETTER else max
            self.best = choose(first, key=lambda rate: self.measure.of(first[rate], epoch))
            self.runs = [run for run in self.rates[self.best] if self.ends(run)]
            self.epoch = min(map(self.ends, self.runs))

    def first(self, rate: float) -> FinishedRun | None:
        """Returns the run of a rate with the first seed."""
        return next((r for r in self.rates.get(rate, []) if r.config.seed == self.seed), None)

    def ends(self, run: FinishedRun) -> float:
        """Returns the last epoch of a run, 0 if it diverged or has none."""
        epochs = run.curve(self.measure.name)[0]
        return float(epochs[-1]) if len(epochs) and run.outcome != "diverged" else 0.0

    def value(self, column: Column) -> str:
        """Returns the mean of a column over the seeds, and its standard error."""
        mean, error = mean_and_error([column.of(run, self.epoch) for run in self.runs])
        if len(self.runs) == 1 and column == self.measure and self.experiment.error:
            error = Column(self.experiment.error[0], "").of(self.runs[0], self.epoch)
        return with_error(mean, error, column.form)

    def unit(self) -> str:
        """Returns what the standard errors are over, and how many."""
        if len(self.runs) > 1 or not self.experiment.error:
            return f"{len(self.runs)} seed" + ("s" if len(self.runs) > 1 else "")
        _, count, over = self.experiment.error
        number = Column(count, "").of(self.runs[0], self.epoch)
        return f"{number:.0f} {over}, 1 seed" if number > 0 else "1 seed"

    def curve(self, column: Column) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns epochs, the mean over the seeds as far as all reach, and its standard error."""
        error = self.experiment.error[0] if self.experiment.error else ""
        curves = [run.curve(column.name, error) for run in self.runs]
        length = min(len(epochs) for epochs, *_ in curves)
        mean, spread = mean_and_error([column.scale * y[:length] for _, y, _ in curves])
        return curves[0][0][:length], mean, curves[0][2] if len(curves) == 1 else spread


class Comparison:
    """Figures and tables of an experiment's arms: by learning rate, and by epoch at the best.

    Args:
      experiment: what is compared.
      runs: of one program.
      output: gets NAME-rates and NAME-curves, figures, and NAME and NAME-rates, tables.
      name: NAME, unless the output has one.
    """

    def __init__(
        self, experiment: Experiment, runs: list[FinishedRun], output: "Output", name: str
    ):
        self.experiment, self.runs, self.output = experiment, runs, output
        self.name = output.name or name
        order = [*runs[0].config.ARMS, *sorted({run.arm for run in runs})]
        arms = [Arm(experiment, some) for some in group(runs, lambda r: (r.arm, r.preset)).values()]
        self.arms = sorted(arms, key=lambda arm: (order.index(arm.name), arm.preset))
        self.colors = {arm.name: f"C{order.index(arm.name) % 10}" for arm in arms}
        self.presets = sorted({arm.preset for arm in arms})
        if not any(arm.runs for arm in arms):
            raise UserError(f"none of the {experiment.title} runs has finished an epoch yet")

    def draw(self) -> None:
        """Draws the figures and makes the tables."""
        self.draw_curves()
        self.table()
        if any(len(arm.rates) > 1 for arm in self.arms):
            self.draw_rates()
            self.rates_table()

    @property
    def title(self) -> str:
        """The title of figures and tables, with the preset unless that is the paper's."""
        if self.presets == ["paper"] or len(self.presets) > 1:
            return self.experiment.title
        return f"{self.experiment.title} [{preset_name(self.presets[0])}]"

    def label(self, arm: Arm) -> str:
        """Returns an arm's name in words, with its preset if there are several."""
        name = self.experiment.labels.get(arm.name, arm.name.replace("_", " ").replace("bn", "BN"))
        return name + (f" [{preset_name(arm.preset)}]" if len(self.presets) > 1 else "")

    def style(self, arm: Arm) -> dict[str, Any]:
        """Returns the color, of the arm, and the line, of the preset."""
        lines = ["-", "--", ":", "-."]
        return {
            "color": self.colors[arm.name],
            "ls": lines[self.presets.index(arm.preset) % 4],
            "label": self.label(arm),
        }

    def draw_curves(self) -> None:
        """Draws each arm at its best rate, the mean of its seeds and the standard error."""
        import matplotlib.ticker

        column = self.experiment.curve
        with self.output.figure(f"{self.name}-curves", self.title, "epochs", column.label) as axes:
            for arm in self.arms:
                if arm.runs:
                    epochs, mean, spread = arm.curve(column)
                    style = self.style(arm)
                    style["label"] += f", rate {arm.best:g}, {arm.unit()}"
                    axes.plot(epochs, mean, **style)
                    band = {"color": style["color"], "alpha": 0.2, "lw": 0}
                    axes.fill_between(epochs, mean - spread, mean + spread, **band)
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
            if self.experiment.limits and self.presets == ["paper"]:
                axes.set(xlim=self.experiment.limits[0], ylim=self.experiment.limits[1])

    def draw_rates(self) -> None:
        """Draws the measure in the last epoch by learning rate; a cross is a diverged run."""
        column = self.experiment.columns[0]
        with self.output.figure(
            f"{self.name}-rates", self.title, "learning rate", column.label
        ) as axes:
            # Errors differ by factors, bounds and scores by differences.
            errors = self.arms[0].config.LOWER_IS_BETTER
            axes.set(xscale="log", yscale="log" if errors else "linear")
            for arm in self.arms:
                points = []
                for rate, runs in arm.rates.items():
                    ended = [run for run in runs if arm.ends(run)]
                    if ended:
                        values = [column.of(run, arm.ends(run)) for run in ended]
                        points.append((rate, *mean_and_error(values)))
                    if len(ended) < len(runs):
                        height = 0.97 if errors else 0.03
                        cross = {"marker": "x", "color": self.colors[arm.name], "clip_on": False}
                        axes.plot(rate, height, transform=axes.get_xaxis_transform(), **cross)
                if points:
                    axes.errorbar(
                        *zip(*points, strict=True), marker="o", capsize=3, **self.style(arm)
                    )

    def table(self) -> None:
        """Makes the table of each arm at its best rate."""
        columns, rows = list(self.experiment.columns), []
        arms = [arm for arm in self.arms if arm.runs]
        sign = -1 if arms[0].config.LOWER_IS_BETTER else 1
        # How soon each has what the last of them has at the end.
        level = min(sign * arm.curve(columns[0])[1][-1] for arm in arms)
        for arm in arms:
            values = [arm.value(column) for column in columns]
            epochs, mean, _ = arm.curve(columns[0])
            reached = f"{first_reached(epochs, sign * mean, level):.1f}"
            papers = self.experiment.paper.values()
            paper = [str(self.experiment.paper.get(arm.name) or "")] if any(papers) else []
            rate, rates = f"{arm.best:g}", f"{len(arm.rates)}"
            done = f"{arm.epoch:g} of {arm.config.last_epoch:g}"
            rows.append([self.label(arm), *values, reached, *paper, rate, rates, done, arm.unit()])
        heads = [column.label for column in columns]
        heads += [f"epochs to {sign * level:{columns[0].form}}"]
        heads += ["paper, 200 epochs"] if any(self.experiment.paper.values()) else []
        heads += ["best rate", "rates tried", "epochs", "± over"]
        self.output.table(self.name, self.title, ["", *heads], rows, self.notes())

    def rates_table(self) -> None:
        """Makes the table of the measure in the last epoch, by arm and rate, with one seed."""
        column, rows = self.experiment.columns[0], []
        rates = sorted({rate for arm in self.arms for rate in arm.rates})
        for arm in self.arms:
            cells = []
            for rate in rates:
                run = arm.first(rate)
                if run is None:
                    cells.append("")
                elif run.outcome == "diverged":
                    cells.append("diverged")
                else:
                    text = f"{column.of(run, math.inf):{column.form}}"
                    cells.append(f"**{text}**" if rate == arm.best else text)
            rows.append([f"{self.label(arm)}, seed {arm.seed}", *cells])
        columns = [f"{column.label}, by rate", *(f"{rate:g}" for rate in rates)]
        self.output.table(f"{self.name}-rates", self.title, columns, rows, self.notes())

    def notes(self) -> str:
        """Returns what to say below a table."""
        presets = {run.config.PRESETS[run.config.preset].about for run in self.runs}
        caveats = {run.caveats for run in self.runs if run.caveats}
        return "; ".join(sorted(presets) + sorted(caveats))


def first_reached(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Returns where the curve first reaches `level`, interpolated linearly."""
    index = int(np.argmax(y >= level))
    if index == 0:
        return float(x[0])
    before, after = y[index - 1 : index + 1]
    return float(x[index - 1] + (level - before) / (after - before) * (x[index] - x[index - 1]))


def preset_name(name: str) -> str:
    """Returns the name of a run's preset in words."""
    return options.shorten(name) if "changed: " in name else f"{name} preset"


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
