"""A run's learning curve, and the paper's figures 5 and 6."""

from pathlib import Path

import numpy as np

from models.common import metrics
from models.dqn.config import PAPER, Config


def learning_curve(run: Path, config: Config) -> Path:
    """Draws test score, training score and Q over the steps of a run; returns the file.

    Error bars are the standard error over the games of a test.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    table = {name: np.array(column) for name, column in metrics.read(run).items()}
    for axes, name, error, label, style in (
        (above, "score", "", "in training, with exploration", {"color": "0.7"}),
        (above, "test_score", "test_stderr", "in tests", {"color": "C0", "marker": "o"}),
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


def test_of(test: str, test_steps: int) -> str:
    """Returns what a test consists of."""
    return f"{test}: " + (
        f"{test_steps:,} steps" if test == "paper" else "30 games of at most 5 minutes"
    )
