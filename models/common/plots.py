"""Pictures of a run."""

from pathlib import Path

import numpy as np

from models.common import metrics
from models.common.errors import UserError


def learning_curve(run: Path, title: str, random_play: float | None = None) -> Path:
    """Draws test score, training score and Q over the steps of a DQN run.

    Tests have error bars: the standard error over the games.
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
    if random_play is not None:
        above.axhline(random_play, color="0.5", linestyle=":", label="random play")
    for axes in (above, below):
        axes.legend(frameon=False)
    above.set(ylabel="score per game", title=title)
    below.set(xlabel="steps", ylabel="mean of the largest Q")
    below.xaxis.set_major_formatter("{x:,.0f}")
    path = run / "learning_curve.png"
    figure.savefig(path)
    return path


def tile(images, columns: int = 10, gap: int = 1) -> np.ndarray:
    """Returns pictures in rows with black between them, uint8 [height, width, ...].

    Arguments:
      images: floats in [0, 1] or uint8, [count, height, width] or [count, height, width, 3].
      columns: pictures per row.
      gap: pixels between pictures.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = (images.clip(0, 1) * 255).round().astype(np.uint8)
    more = [(0, -len(images) % columns), (0, gap), (0, gap)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, more)
    rows = padded.reshape(-1, columns, *padded.shape[1:])
    whole = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    return whole[: len(whole) - gap, : whole.shape[1] - gap]


def png(picture: np.ndarray, scale: int = 1) -> bytes:
    """Returns a picture, uint8 [height, width] or [height, width, 3], enlarged and encoded."""
    import tensorflow as tf

    large = picture.repeat(scale, 0).repeat(scale, 1)
    return tf.io.encode_png(large.reshape(*large.shape[:2], -1)).numpy()


def write(path: str | Path, png: bytes) -> None:
    """Writes the picture that --out names, with the folders it needs, and says where."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(png)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot write there ({error.strerror}); name another file"
        ) from None
    print(f"wrote {path}")
