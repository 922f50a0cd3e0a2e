"""Figure 1 (training error) and figure 2 (test error) of section 5.1."""

import numpy as np

from models.cifar.config import PAPER, Config
from models.common.figures import (
    COLORS,
    FinishedRun,
    Output,
    check_same_settings,
    finished,
    group,
    mean_and_error,
    notes_of,
    row_label,
    with_error,
)


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Draws figure 1, and prints figure 2 as a table."""
    runs = finished(runs, "test_error", "the CIFAR-10")
    for run in runs:
        rate, kind = run.config["learning_rate"], run.config["parameterization"]
        full = Config(learning_rate=rate, parameterization=kind)
        run.config["learning_rate"] = full.first_learning_rate
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
                with_error(*train) + " %",
                with_error(*test) + " %",
                f"{PAPER[kind]} %",
                f"{len(seeds)}",
                f"{config['learning_rate']:g}",
                "{} of {}".format(*ends),
            ]
        )
    columns = ["", "training error", "test error", "paper, 200 epochs", "seeds", "rate", "epochs"]
    output.table("CIFAR-10 (figure 2)", columns, rows, notes_of(runs))
