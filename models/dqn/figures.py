"""A run's learning curve, and the paper's figures 5 and 6."""

from pathlib import Path

import numpy as np

from models.common import figures, metrics
from models.common.errors import UserError
from models.dqn.config import PAPER, Config


def learning_curve(run: Path, config: Config) -> Path:
    """Draws score and Q over the steps of a run; returns the file.

    Error bars are the standard error over the games of an evaluation.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    table = {name: np.array(column) for name, column in metrics.read(run).items()}
    for axes, name, error, label, style in (
        (above, "score", "", "in training, with exploration", {"color": "0.7"}),
        (above, "test_score", "test_stderr", "in evaluation", {"color": "C0", "marker": "o"}),
        (below, "held_out_q", "", "of held-out states", {"color": "C2", "marker": "o"}),
    ):
        if name in table:
            there = np.isfinite(table[name])
            bars = table[error][there] if error in table else None
            axes.errorbar(
                table["step"][there], table[name][there], bars, label=label, capsize=3, **style
            )
    if config.game in PAPER:
        above.axhline(PAPER[config.game]["random"], color="0.5", ls=":", label="random play")
    for axes in (above, below):
        axes.legend(frameon=False)
    above.set(ylabel="score per game", title=config.title)
    below.set(xlabel="steps", ylabel="mean of the largest Q")
    below.xaxis.set_major_formatter("{x:,.0f}")
    path = run / "learning_curve.png"
    figure.savefig(path)
    return path


def draw(runs: list[figures.FinishedRun], output: figures.Output) -> None:
    """Draws figure 5, scores by epoch, for each game, and prints figure 6, the highest of each."""
    runs = figures.finished(runs, "test_score", "the DQN")
    rows: list[list[str]] = []
    for (game,), here in figures.group(runs, "game").items():
        with output.attempt():
            rows += draw_game(game, here, output)
    columns = [
        "", "highest score", "paper, 200 epochs", "Mnih et al.", "protocol", "seeds", "epochs",
    ]  # fmt: skip
    epochs = {
        f"{run.config['preset']}: epochs of {run.config['test_every']:,} steps, not the paper's "
        "250,000"
        for run in runs
        if run.config["test_every"] != 250_000
    }
    if rows:
        output.table(
            "DQN (figure 6)", columns, sorted(rows), figures.notes_of(runs, *sorted(epochs))
        )


def draw_game(
    game: str, runs: list[figures.FinishedRun], output: figures.Output
) -> list[list[str]]:
    """Draws figure 5 for one game, and returns its rows of figure 6."""
    protocols = {run.config["protocol"] for run in runs}
    if len(protocols) > 1:
        raise UserError(
            f"some runs of {game} have --protocol paper and some nature: their scores are not "
            "comparable; draw them apart"
        )
    rows, paper = [], PAPER.get(game, {})
    y = f"score per game ({protocols.pop()} protocol)"
    name = f"figure-5-{game.replace('/', '-')}"  # An id of gymnasium may have a namespace.
    with output.figure(name, f"DQN on {game}", runs, "epochs", y) as figure:
        for (kind, _), seeds in sorted(figures.group(runs, "parameterization", "preset").items()):
            figures.check_same_settings(seeds)
            curves = [run.curve("epoch", "test_score") for run in seeds]
            figure.line(seeds, "epoch", "test_score", "test_stderr")
            config = seeds[0].config
            length = f"{config['test_steps']:,} steps"
            if config["protocol"] == "nature":
                length = "30 games of at most 5 minutes"
            rows.append(
                [
                    f"{game}, {figures.row_label(config, output)}",
                    figures.with_error(
                        *figures.mean_and_error([y.max() for _, y in curves]), ",.1f"
                    ),
                    f"{paper[kind]:,}" if paper else "",
                    f"{paper['nature']:,}" if paper else "",
                    f"{config['protocol']}: {length}",
                    f"{len(seeds)}",
                    f"{max(x[-1] for x, _ in curves):.0f}",
                ]
            )
        if paper:
            figure.axes.axhline(paper["random"], color="0.5", ls=":", label="random play")
        figure.axes.set_ylim(bottom=min(0, figure.axes.get_ylim()[0]))  # Pong's are negative.
    return rows
