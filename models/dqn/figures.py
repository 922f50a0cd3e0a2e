"""A run's learning curve, and the paper's figures 5 and 6."""

import dataclasses
from pathlib import Path

import numpy as np

from models.common import comparison, figures, metrics
from models.dqn.config import PAPER, Config

ARMS = [arm.split("-") for arm in Config.ARMS]
LINES = {"normal": "--", "weight_norm": "-"}
INITS = {
    "nature": "Nature's initialization",
    "one": "data-dependent, initial Q 1",
    "hundredth": "data-dependent, initial Q .01",
}


def learning_curve(run: Path, config: Config) -> Path:
    """Plots a run's score and Q by step, and returns the file.

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
    """Compares the arms on each game: figure 5, and figure 6 as a table."""
    for game, here in figures.group(runs, lambda run: run.config.game).items():
        with output.attempt():
            figures.refuse_mixed(here, "protocol", f"runs of {game}")
            whose = {"nature": "Nature's", "paper": "the paper's"}[here[0].config.protocol]
            score = comparison.Column("test_score", f"score per game, {whose} protocol", ".1f")
            experiment = comparison.Experiment(
                f"DQN on {game}, epochs of {here[0].config.test_every:,} steps",
                score,
                (
                    dataclasses.replace(score, label=f"highest {score.label}", highest=True),
                    dataclasses.replace(score, label="last"),
                ),
                {f"{i}-{k}": PAPER.get(game, {}).get(k) for i, k in ARMS},
                {f"{i}-{k}": f"{INITS[i]}, {k.replace('_', ' ')}" for i, k in ARMS},
                styles={
                    f"{i}-{k}": {"color": f"C{[*INITS].index(i)}", "ls": LINES[k]} for i, k in ARMS
                },
                gradual=False,
                error=("test_stderr", "test_games", "games"),
            )
            comparison.Comparison(experiment, here, output, f"dqn-{game.replace('/', '-')}").draw()
