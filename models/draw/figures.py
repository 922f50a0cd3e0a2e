"""Figure 4 (the bound on the test set) of section 5.3."""

import numpy as np

from models.common.figures import (
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
    """Draws figure 4, and prints the epochs in which each reaches the same bound."""
    runs = finished(runs, "test_bound", "the DRAW")
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
        # The bound that all parameterizations of this preset have reached.
        level = min(other[-1] for (name, _), (_, other, _) in means.items() if name == preset)
        seeds = groups[preset, kind]
        rows.append(
            [
                row_label(seeds[0].config, output),
                with_error(mean[-1], error[-1]),
                f"{first_reached(x, mean, level):.1f} to {level:.2f}",
                f"{len(seeds)}",
                f"{x[-1]:.0f} of {seeds[0].config['epochs']}",
            ]
        )
    columns = ["", "bound, nats", "epochs to the same bound", "seeds", "epochs"]
    output.table("DRAW (figure 4)", columns, rows, notes_of(runs))


def first_reached(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """Returns where the curve first reaches `level`, interpolated linearly."""
    index = int(np.argmax(y >= level))
    if index == 0:
        return float(x[0])
    before, after = y[index - 1 : index + 1]
    return float(x[index - 1] + (level - before) / (after - before) * (x[index] - x[index - 1]))
