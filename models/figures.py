"""Draws the paper's figures and prints its tables, ours beside the paper's, from any runs.

    python -m models.figures runs/cifar-paper-sweep runs/dqn-* --out figures

A folder stands for all the runs in it. Of several seeds the mean and its standard error are shown.
Every figure is a function in FIGURES, by program; it gets that program's runs and an Output.
"""

import argparse
import collections
import dataclasses
import importlib
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table
from rich.markup import escape

from models.common import metrics, options, run_folder
from models.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """One run folder: its Config as a dict, metrics.csv by column, and what to say beside it.

    Where flags changed the preset, config["preset"] says how: "cpu, changed: width 4, epochs 1" is
    a preset of its own.
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


def find_runs(paths: Sequence[str]) -> list[FinishedRun]:
    """Returns the runs in the folders, each folder being a run or holding some."""
    found = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder")
        configs = sorted(path.rglob("config.json"))
        folders = [file.parent for file in configs if (file.parent / "metrics.csv").exists()]
        if not folders:
            raise UserError(f"{path}: no run there (no config.json and metrics.csv, nor below)")
        for folder in folders:
            program = run_folder.load(folder)["program"].removeprefix("models.")
            if program not in FIGURES:
                raise UserError(f"{folder}: no figures for the program {program!r}")
            name = f"models.{program}" + (".config" if program in ("dqn", "vae") else "")
            module = importlib.import_module(name)
            config = run_folder.load_config(folder, module.Config)
            changed = options.changes(module.PRESETS, config)
            preset = config.preset + (f", {changed}" if changed else "")
            note = folder / "note.txt"
            found[folder.resolve()] = FinishedRun(  # Once, also where two of `paths` hold it.
                folder,
                program,
                dataclasses.asdict(config) | {"preset": preset},
                options.differences(config),
                metrics.read(folder),
                note.read_text().strip() if note.exists() else "",
            )
    return list(found.values())


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


def check_parameterizations(runs: Sequence[FinishedRun]) -> None:
    """Refuses runs of a parameterization that no figure knows."""
    for run in runs:
        kind = run.config.get("parameterization")
        if kind not in COLORS:
            raise UserError(
                f"{run.path}: its config.json has parameterization {kind!r}, which must be one of "
                f"{', '.join(COLORS)}; leave this run out"
            )


def check_presets(runs: Sequence[FinishedRun], label: bool) -> None:
    """Refuses to put runs of different presets together, unless each is to be labelled."""
    presets = {run.config["preset"]: run.path for run in runs}
    if len(presets) > 1 and not label:
        told = "; ".join(
            f"{path} is --preset {options.shorten(name)}" for name, path in presets.items()
        )
        raise UserError(
            f"{told}. Scaled runs and the paper's are not comparable. Draw them apart, or give "
            "--label-presets to have each line and row named"
        )


class Output:
    """Where figures and tables go: PNG files, and tables both printed and in TABLES.md."""

    def __init__(self, folder: Path, label_presets: bool):
        self.folder, self.label_presets = folder, label_presets
        self._console = rich.console.Console()
        self._tables: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot write there ({error.strerror})") from None

    def figure(self, name: str, title: str, runs: Sequence[FinishedRun], x: str, y: str) -> "Axes":
        """Returns a context with matplotlib's axes; the picture is NAME.png."""
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

    A parameterization has the same colour in every figure, a preset its line style; where all runs
    have one preset the title names it, else the legend.
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
        """Draws the mean of several seeds' curves, as far as all of them reach, and its error.

        Args:
          runs: the seeds.
          x: a column of metrics.csv.
          y: a column of metrics.csv.
          error: the column with the standard error of y, shown where there is but one seed.
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


COLORS = {
    "normal": "C0",
    "weight_norm": "C1",
    "batch_norm": "C2",
    "mean_only_bn": "C3",
    "weight_norm_mean_only_bn": "C4",
}


def parameterization(config: dict[str, Any]) -> str:
    """Returns the name of a run's parameterization, for people."""
    return config["parameterization"].replace("_", " ").replace("bn", "BN")


def preset_name(name: str) -> str:
    """Returns the name of a run's preset, for people."""
    return options.shorten(name) if "changed: " in name else f"{name} preset"


def row_label(config: dict[str, Any], output: Output) -> str:
    """Returns a table row's name: parameterization, and preset; scaled presets are named always."""
    shown = config["preset"] != "paper" or output.label_presets
    return parameterization(config) + (f" [{preset_name(config['preset'])}]" if shown else "")


def cifar(runs: list[FinishedRun], output: Output) -> None:
    """Figure 1 (training error) and figure 2 (test error) of section 5.1."""
    from models.cifar import PAPER, default_rate

    runs = [run for run in runs if len(run.curve("epoch", "test_error")[0])]
    for run in runs:
        if run.config["learning_rate"] is None:
            run.config["learning_rate"] = default_rate(run.config["parameterization"])
    if not runs:
        raise UserError("none of the CIFAR-10 runs has finished an epoch yet")
    chosen = {}
    for (preset, kind), candidates in group(runs, "preset", "parameterization").items():
        # "For each case we pick the optimal learning rate": here by the error in training.
        rates = group(candidates, "learning_rate")
        for seeds in rates.values():
            check_same_settings(seeds)
        finals = {
            rate: np.mean([run.curve("epoch", "train_error")[1][-1] for run in some])
            for rate, some in rates.items()
        }
        chosen[kind, preset] = rates[min(finals, key=lambda rate: finals[rate])]
    title, y = "CIFAR-10", "training error"
    with output.figure("figure-1", title, runs, "training epochs", y) as figure:
        for _, seeds in sorted(chosen.items(), key=lambda item: list(COLORS).index(item[0][0])):
            figure.line(seeds, "epoch", "train_error")
        if all(run.config["preset"] == "paper" for run in runs):
            figure.axes.set(xlim=(0, 200), ylim=(0, 0.1))
    rows = []
    for (kind, _), seeds in sorted(chosen.items(), key=lambda item: -PAPER[item[0][0]]):
        config = seeds[0].config
        ends = [min(int(run.metrics["epoch"][-1]) for run in seeds), config["epochs"]]
        train, test = (
            mean_and_error([100 * run.curve("epoch", name)[1][ends[0] - 1] for run in seeds])
            for name in ("train_error", "test_error")
        )
        rows.append(
            [
                row_label(config, output),
                percent(*train),
                percent(*test),
                f"{PAPER[kind]} %",
                f"{len(seeds)}",
                f"{config['learning_rate']:g}",
                "{} of {}".format(*ends),
            ]
        )
    columns = ["", "training error", "test error", "paper, 200 epochs", "seeds", "rate", "epochs"]
    notes = {run.note for run in runs if run.note}
    output.table("CIFAR-10 (figure 2)", columns, rows, "; ".join(sorted(notes)))


def vae(runs: list[FinishedRun], output: Output) -> None:
    """Figure 3: the bound on the test images, MNIST (top) and CIFAR-10 (bottom), section 5.2."""
    runs = [run for run in runs if len(run.curve("epoch", "test_bound")[0])]
    if not runs:
        raise UserError("none of the auto-encoders' runs has finished an epoch yet")
    if all(run.config["dataset"].startswith("synthetic") for run in runs):
        raise UserError("the auto-encoders' runs are of synthetic images, of which is no figure")
    for name, title, column, limits in (
        ("mnist", "MNIST", "test_bound", ((50, 300), (-88, -84))),
        ("cifar10", "CIFAR-10", "test_paper_axis", ((0, 450), (8000, 10_000))),
    ):
        here = [run for run in runs if run.config["dataset"] == name]
        if not here:
            continue
        if len(group(here, "binarization")) > 1 and name == "mnist":
            raise UserError(
                "some MNIST runs have --binarization static and some dynamic: their bounds are "
                "not comparable; draw them apart"
            )
        measured = [run for run in here if len(run.curve("epoch", "test_log_likelihood")[0])]
        samples = sorted({run.config["eval_samples"] for run in measured})
        if len(samples) > 1:
            raise UserError(
                f"some {title} runs have --eval-samples {samples[0]} and some {samples[1]}: their "
                "log-likelihoods are not comparable; draw them apart"
            )
        rows = []
        y = "bound on marginal likelihood, nats"
        with output.figure(
            f"figure-3-{name}", f"Convolutional VAE on {title}", here, "training epochs", y
        ) as figure:
            for _, seeds in sorted(group(here, "parameterization", "preset").items()):
                check_same_settings(seeds)
                figure.line(seeds, "epoch", column)
                rows.append([row_label(seeds[0].config, output), *vae_row(seeds, column)])
            if all(run.config["preset"] == "paper" for run in here):
                figure.axes.set(xlim=limits[0], ylim=limits[1])
        likelihood = "log-likelihood, nats" + "".join(f" ({n} samples)" for n in samples)
        columns = ["", "bound, nats", likelihood, "seeds", "epochs"]
        if name == "cifar10":
            columns[2:2] = ["in figure 3", "bits/dim"]
        notes = {run.note for run in here if run.note}
        axis = f"the paper's axis: {limits[1][0]} to {limits[1][1]}, to epoch {limits[0][1]}"
        output.table(f"{title} (figure 3)", columns, rows, "; ".join([axis, *sorted(notes)]))


def vae_row(seeds: list[FinishedRun], column: str) -> list[str]:
    """Returns a line's values at the last epoch that all its seeds have reached."""
    epoch = min(run.curve("epoch", column)[0][-1] for run in seeds)

    def value(name: str, digits: int = 2) -> str:
        found = []
        for run in seeds:
            epochs, values = run.curve("epoch", name)
            found += list(values[epochs == epoch])
        if len(found) < len(seeds):
            return ""
        mean, error = mean_and_error(found)
        text = f"{mean:.{digits}f}"
        return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"

    values = [value("test_bound")]
    if column == "test_paper_axis":
        values += [value(column, 0), value("test_bits_per_dim", 3)]
    return [*values, value("test_log_likelihood"), f"{len(seeds)}", f"{epoch:.0f}"]


def percent(mean: float, error: float) -> str:
    """Returns "8.46 ± 0.05 %", without the error for a single run."""
    return f"{mean:.2f} %" if math.isnan(error) else f"{mean:.2f} ± {error:.2f} %"


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Figure 4 (the bound on the test set) of section 5.3, and the epochs to reach one bound."""
    runs = [run for run in runs if len(run.curve("epoch", "test_bound")[0])]
    if not runs:
        raise UserError("none of the DRAW runs has finished an epoch yet")
    groups = group(runs, "preset", "parameterization")
    for seeds in groups.values():
        check_same_settings(seeds)
    curves = {
        key: [run.curve("epoch", "test_bound") for run in seeds] for key, seeds in groups.items()
    }
    title, y = "DRAW on MNIST", "bound on marginal log likelihood, nats"
    with output.figure("figure-4", title, runs, "training epochs", y) as figure:
        for _, seeds in sorted(groups.items()):
            figure.line(seeds, "epoch", "test_bound")
        if all(run.config["preset"] == "paper" for run in runs):
            figure.axes.set(xlim=(0, 100), ylim=(-120, -80))
    means = {}
    for key, some in curves.items():
        length = min(len(x) for x, _ in some)
        means[key] = some[0][0][:length], *mean_and_error([y[:length] for _, y in some])
    rows = []
    for (preset, kind), (x, mean, error) in sorted(means.items()):
        # The bound that all parameterisations of this preset have reached.
        level = min(other[-1] for (name, _), (_, other, _) in means.items() if name == preset)
        seeds = groups[preset, kind]
        bound = f"{mean[-1]:.2f}" + ("" if math.isnan(error[-1]) else f" ± {error[-1]:.2f}")
        rows.append(
            [
                row_label(seeds[0].config, output),
                bound,
                f"{first_reached(x, mean, level):.1f} to {level:.2f}",
                f"{len(seeds)}",
                f"{x[-1]:.0f} of {seeds[0].config['epochs']}",
            ]
        )
    columns = ["", "bound, nats", "epochs to the same bound", "seeds", "epochs"]
    notes = {run.note for run in runs if run.note}
    output.table("DRAW (figure 4)", columns, rows, "; ".join(sorted(notes)))


def dqn(runs: list[FinishedRun], output: Output) -> None:
    """Figure 5 (test scores by epoch), one for each game, and figure 6 (the highest of each)."""
    from models.dqn.config import PAPER
    from models.dqn.figures import test_of

    runs = [run for run in runs if len(run.curve("epoch", "test_score")[0])]
    if not runs:
        raise UserError("none of the DQN runs has finished an epoch yet")
    rows = []
    for (game,), here in group(runs, "game").items():
        tests = {run.config["test"] for run in here}
        if len(tests) > 1:
            raise UserError(
                f"some runs of {game} have --test paper and some nature: their scores are not "
                "comparable; draw them apart"
            )
        y = f"score per game ({tests.pop()} test)"
        paper = PAPER.get(game, {})
        with output.figure(f"figure-5-{game}", f"DQN on {game}", here, "epochs", y) as figure:
            for (kind, _), seeds in sorted(group(here, "parameterization", "preset").items()):
                check_same_settings(seeds)
                curves = [run.curve("epoch", "test_score") for run in seeds]
                figure.line(seeds, "epoch", "test_score", "test_stderr")
                mean, error = mean_and_error([scores.max() for _, scores in curves])
                config = seeds[0].config
                rows.append(
                    [
                        f"{game}, {row_label(config, output)}",
                        f"{mean:,.1f}" + ("" if math.isnan(error) else f" ± {error:,.1f}"),
                        f"{paper[kind]:,}" if paper else "",
                        f"{paper['nature']:,}" if paper else "",
                        test_of(config["test"], config["test_steps"]),
                        f"{len(seeds)}",
                        f"{max(x[-1] for x, _ in curves):.0f}",
                    ]
                )
            if paper:
                figure.axes.axhline(paper["random"], color="0.5", ls=":", label="random play")
            figure.axes.set_ylim(bottom=min(0, figure.axes.get_ylim()[0]))  # Pong's are negative.
    columns = ["", "highest score", "paper, 200 epochs", "Mnih et al.", "test", "seeds", "epochs"]
    notes = {run.note for run in runs if run.note} | {
        f"{run.config['preset']}: epochs of {run.config['test_every']:,} steps, for the paper's "
        "250,000"
        for run in runs
        if run.config["test_every"] != 250_000
    }
    output.table("DQN (figure 6)", columns, sorted(rows), "; ".join(sorted(notes)))


def check_same_settings(seeds: Sequence[FinishedRun]) -> None:
    """Refuses to average runs that differ in more than their seed, or do not differ in it."""
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


def first_reached(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Returns where the curve is first at `level` or above, between points on a straight line."""
    index = int(np.argmax(y >= level))
    if index == 0:
        return float(x[0])
    before, after = y[index - 1 : index + 1]
    return float(x[index - 1] + (level - before) / (after - before) * (x[index] - x[index - 1]))


FIGURES: dict[str, Callable[[list[FinishedRun], Output], None]] = {
    "cifar": cifar,
    "vae": vae,
    "draw": draw,
    "dqn": dqn,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or one of runs")
    parser.add_argument("--out", default="figures", help="where to write (default: figures)")
    parser.add_argument(
        "--label-presets", action="store_true", help="allow several presets, each labelled"
    )
    asked = parser.parse_args(argv)
    try:
        runs = find_runs(asked.runs)
        output = Output(Path(asked.out), asked.label_presets)
        by_program = collections.defaultdict(list)
        for run in runs:
            by_program[run.program].append(run)
        for program, some in by_program.items():
            check_parameterizations(some)
            check_presets(some, asked.label_presets)
            FIGURES[program](some, output)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
