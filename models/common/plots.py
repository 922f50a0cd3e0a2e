"""Pictures of a run."""

import math
from pathlib import Path

from models.common import metrics


def learning_curve(run: Path, title: str) -> Path:
    """Draws test score, training score and Q over the steps of a DQN run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = metrics.read(run)
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=[2, 1], layout="constrained"
    )
    for axes, name, label, style in (
        (above, "score", "training (with exploration)", {"color": "0.7"}),
        (above, "test_score", "test", {"color": "C0", "marker": "o"}),
        (below, "held_out_q", "held-out states, max Q", {"color": "C1", "marker": "o"}),
    ):
        pairs = zip(table["step"], table.get(name, ()), strict=False)
        points = [(x, y) for x, y in pairs if not math.isnan(y)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
            axes.legend()
    above.set(ylabel="score per game", title=title)
    below.set(xlabel="steps", ylabel="Q")
    path = run / "learning_curve.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
