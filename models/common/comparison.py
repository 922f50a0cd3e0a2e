"""Compares the arms of an experiment by learning rate, and by epoch at each arm's best rate."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.common import options
from models.common.errors import UserError
from models.common.figures import (
    FinishedRun,
    Output,
    check_same_settings,
    group,
    mean_and_error,
    with_error,
)


@dataclasses.dataclass(frozen=True)
class Column:
    """A table column that shows the last (or highest) value of a column of metrics.csv.

    Attributes:
      name: the column's name in metrics.csv.
      label: a description with the unit.
      form: the format of the numbers.
      scale: a factor for the values, such as 100 for percent.
      highest: whether to show the highest value instead of the last.
    """

    name: str
    label: str
    form: str = ".2f"
    scale: float = 1
    highest: bool = False

    def of(self, run: FinishedRun, epoch: float) -> float:
        """Returns a run's value as of this epoch, NaN if it has none."""
        epochs, values = run.curve(self.name)
        values = self.scale * values[epochs <= epoch * (1 + 1e-6)]
        return float(values.max() if self.highest else values[-1]) if len(values) else math.nan


@dataclasses.dataclass(frozen=True)
class Experiment:
    """How a program's arms are compared.

    Attributes:
      title: the title of figures and tables.
      curve: the column that is drawn by epoch.
      columns: the columns of the table. The first is the measure that selects the best rate.
      paper: the paper's result for each arm.
      labels: the labels of arms whose names are not descriptive enough.
      styles: matplotlib's line properties of arms; by default, each arm has its own color.
      limits: the axis limits of the paper's figure, ((x), (y)), for runs of the paper's preset.
      gradual: whether the measure improves steadily; the table then shows when it reaches a level.
      error: for a single run, the columns of metrics.csv with the standard error of the measure's
        last value and the sample size, and what the sample consists of ("games").
    """

    title: str
    curve: Column
    columns: tuple[Column, ...]
    paper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    styles: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None
    gradual: bool = True
    error: tuple[str, str, str] | None = None


class Arm:
    """The runs of one arm and preset: those at each learning rate, and those at the best rate.

    The best rate has the best measure with the first seed, at the last epoch that all rates reach.
    """

    def __init__(self, experiment: Experiment, runs: list[FinishedRun]):
        self.experiment, self.config = experiment, runs[0].config
        self.name, self.preset = runs[0].arm, runs[0].preset
        self.measure = experiment.columns[0]
        by_seed = group(runs, lambda run: run.config.seed)
        # The first seed of a sweep is the one with all rates.
        self.seed = min(by_seed, key=lambda s: (-len({r.config.rate for r in by_seed[s]}), s))
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
        self.diverged = all(run.outcome == "diverged" for run in runs)

    def first(self, rate: float) -> FinishedRun | None:
        """Returns the first seed's run at a rate, None if there is none."""
        return next((r for r in self.rates.get(rate, []) if r.config.seed == self.seed), None)

    def ends(self, run: FinishedRun) -> float:
        """Returns the last epoch of a run, 0 if it diverged or has none."""
        epochs = run.curve(self.measure.name)[0]
        return float(epochs[-1]) if len(epochs) and run.outcome != "diverged" else 0.0

    def value(self, column: Column) -> str:
        """Returns the mean of a column over the seeds and its standard error, as text."""
        mean, error = mean_and_error([column.of(run, self.epoch) for run in self.runs])
        shown = (column.name, column.highest) == (self.measure.name, False)
        if len(self.runs) == 1 and shown and self.experiment.error:
            error = Column(self.experiment.error[0], "").of(self.runs[0], self.epoch)
        return with_error(mean, error, column.form)

    def unit(self) -> str:
        """Returns what the standard errors are taken over: "3 seeds" or "30 games, 1 seed"."""
        count = len(self.runs)
        text = f"{count} seed" + "s" * (count > 1)
        if lost := sum(run.outcome == "diverged" for run in self.rates[self.best]):
            text = f"{count} of {count + lost} seeds, {lost} diverged"
        if count == 1 and self.experiment.error:
            _, size, over = self.experiment.error
            number = Column(size, "").of(self.runs[0], self.epoch)
            text = f"{number:.0f} {over}, {text}" if number > 0 else text
        return text

    def curve(self, column: Column) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns epochs, the mean over the seeds up to the shortest run, and its error."""
        error = self.experiment.error[0] if self.experiment.error else ""
        curves = [run.curve(column.name, error) for run in self.runs]
        length = min(len(epochs) for epochs, *_ in curves)
        mean, spread = mean_and_error([column.scale * y[:length] for _, y, _ in curves])
        return curves[0][0][:length], mean, curves[0][2] if len(curves) == 1 else spread


class Comparison:
    """Figures and tables of an experiment's arms: by learning rate, and by epoch at the best rate.

    Args:
      experiment: the experiment.
      runs: the runs, all of one program.
      output: receives the figures NAME-curves and NAME-rates, and the tables NAME and NAME-rates.
      name: NAME, unless the output has a name.
    """

    def __init__(
        self, experiment: Experiment, runs: list[FinishedRun], output: "Output", name: str
    ):
        self.experiment, self.runs, self.output = experiment, runs, output
        self.name = output.name or name
        order = [*runs[0].config.ARMS, *sorted({run.arm for run in runs})]
        arms = [Arm(experiment, some) for some in group(runs, lambda r: (r.arm, r.preset)).values()]
        self.arms = sorted(arms, key=lambda arm: (order.index(arm.name), arm.preset))
        names = list(dict.fromkeys(arm.name for arm in self.arms))
        self.colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
        self.presets = sorted({arm.preset for arm in arms})
        if not any(arm.runs for arm in arms):
            diverged = sum(run.outcome == "diverged" for run in runs)
            raise UserError(
                f"{experiment.title}: no run can be drawn: {diverged} diverged, "
                f"{len(runs) - diverged} have not finished an epoch yet"
            )

    def draw(self) -> None:
        """Draws the figures and creates the tables."""
        self.draw_curves()
        self.table()
        if any(len(arm.rates) > 1 for arm in self.arms):
            self.draw_rates()
            self.rates_table()

    @property
    def title(self) -> str:
        """The title of figures and tables, with the preset if all runs share it, except "paper"."""
        if self.presets == ["paper"] or len(self.presets) > 1:
            return self.experiment.title
        return f"{self.experiment.title} [{preset_name(self.presets[0])}]"

    def label(self, arm: Arm) -> str:
        """Returns an arm's name in words, with its preset if there are several."""
        name = self.experiment.labels.get(arm.name, arm.name.replace("_", " ").replace("bn", "BN"))
        return name + (f" [{preset_name(arm.preset)}]" if len(self.presets) > 1 else "")

    def style(self, arm: Arm) -> dict[str, Any]:
        """Returns the color, line style and label of an arm's lines."""
        lines = ["-", "--", ":", "-."]
        return {
            "color": self.colors[arm.name],
            "ls": lines[self.presets.index(arm.preset) % 4],
            "label": self.label(arm) + (", diverged" if arm.diverged else ""),
            **self.experiment.styles.get(arm.name, {}),
        }

    def draw_curves(self) -> None:
        """Draws each arm at its best rate: the mean over the seeds and its standard error."""
        import matplotlib.ticker

        column = self.experiment.curve
        with self.output.figure(f"{self.name}-curves", self.title, "epochs", column.label) as axes:
            for arm in self.arms:
                style = self.style(arm)
                if arm.diverged:
                    axes.plot([], [], **style)
                elif arm.runs:
                    epochs, mean, spread = arm.curve(column)
                    style["label"] += f", rate {arm.best:g}, {arm.unit()}"
                    axes.plot(epochs, mean, **style)
                    band = {"color": style["color"], "alpha": 0.2, "lw": 0}
                    axes.fill_between(epochs, mean - spread, mean + spread, **band)
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
            if self.experiment.limits and self.presets == ["paper"]:
                axes.set(xlim=self.experiment.limits[0], ylim=self.experiment.limits[1])

    def draw_rates(self) -> None:
        """Draws the measure by learning rate; crosses mark diverged runs."""
        import matplotlib.ticker

        column = self.experiment.columns[0]
        with self.output.figure(
            f"{self.name}-rates", self.title, "learning rate", column.label
        ) as axes:
            # Errors are compared by their ratio, bounds and scores by their difference.
            errors = self.arms[0].config.LOWER_IS_BETTER
            axes.set(xscale="log", yscale="log" if errors else "linear")
            if errors:  # 40, not 4 x 10^1
                axes.yaxis.set_major_formatter("{x:g}")
                formatter = matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5))
                axes.yaxis.set_minor_formatter(formatter)
            rates = sorted({rate for arm in self.arms for rate in arm.rates})
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.set_xticks([], minor=True)
            crosses = False
            for arm in self.arms:
                points = []
                for rate, runs in arm.rates.items():
                    ended = [run for run in runs if arm.ends(run)]
                    values = [column.of(run, arm.ends(run)) for run in ended]
                    # NaN leaves a gap in the line if no run has a value.
                    points.append((rate, *(mean_and_error(values) if ended else (math.nan,) * 2)))
                    if any(run.outcome == "diverged" for run in runs):
                        height = 0.97 if errors else 0.03
                        cross = {"marker": "x", "color": self.style(arm)["color"], "clip_on": False}
                        axes.plot(rate, height, transform=axes.get_xaxis_transform(), **cross)
                        crosses = True
                if points:
                    axes.errorbar(
                        *zip(*points, strict=True), marker="o", capsize=3, **self.style(arm)
                    )
            if crosses:
                axes.plot([], [], "kx", label="diverged")

    def table(self) -> None:
        """Creates the table of all arms, each at its best rate."""
        columns, rows = list(self.experiment.columns), []
        sign = -1 if self.arms[0].config.LOWER_IS_BETTER else 1
        # The final value of the worst arm: the table lists when each arm reaches it.
        level = min(sign * arm.curve(columns[0])[1][-1] for arm in self.arms if arm.runs)
        gradual, papers = self.experiment.gradual, any(self.experiment.paper.values())
        for arm in self.arms:
            paper = [str(self.experiment.paper.get(arm.name) or "")] * papers
            rates = f"{len(arm.rates)}"
            if arm.runs:
                values = [arm.value(column) for column in columns]
                epochs, mean, _ = arm.curve(columns[0])
                reached = [f"{first_reached(epochs, sign * mean, level):.1f}"] * gradual
                done = f"{arm.epoch:g} of {arm.config.last_epoch:g}"
                cells = [*values, *reached, *paper, f"{arm.best:g}", rates, done, arm.unit()]
                rows.append([self.label(arm), *cells])
            elif arm.diverged:
                blanks = [""] * (len(columns) - 1 + gradual)
                rows.append([self.label(arm), "diverged", *blanks, *paper, "", rates, "", ""])
        heads = [column.label for column in columns]
        heads += [f"epochs to {sign * level:{columns[0].form}}"] * gradual
        heads += ["paper, 200 epochs"] * papers
        heads += ["best rate", "rates tried", "epochs", "± over"]
        self.output.table(self.name, self.title, ["", *heads], rows, self.notes())

    def rates_table(self) -> None:
        """Creates the table of the first seed's measure, by arm and rate."""
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
                    text = with_error(column.of(run, math.inf), math.nan, column.form)
                    best = rate == arm.best and len(arm.rates) > 1
                    cells.append(f"**{text}**" if best else text)
            rows.append([f"{self.label(arm)}, seed {arm.seed}", *cells])
        columns = [f"{column.label}, by rate", *(f"{rate:g}" for rate in rates)]
        self.output.table(f"{self.name}-rates", self.title, columns, rows, self.notes())

    def notes(self) -> str:
        """Returns the presets and caveats to show below a table."""
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
    """Returns a run's preset in words."""
    return options.shorten(name) if "changed: " in name else f"{name} preset"
