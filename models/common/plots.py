"""Grids of images, and PNG files."""

from pathlib import Path

import numpy as np

from models.common import files


def tile(images, columns: int = 10, gap: int = 1) -> np.ndarray:
    """Returns images in a grid with black gaps, uint8 [height, width, ...].

    Args:
      images: floats in [0, 1] or uint8, [count, height, width] or [count, height, width, 3].
      columns: images per row.
      gap: pixels between images.
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
    """Returns an image, uint8 [height, width] or [height, width, 3], enlarged, encoded as PNG."""
    import tensorflow as tf

    large = picture.repeat(scale, 0).repeat(scale, 1)
    return tf.io.encode_png(large.reshape(*large.shape[:2], -1)).numpy()


def write(path: str | Path, png: bytes) -> None:
    """Writes an image to the path of --out, creates its folder if needed, and prints the path."""
    with files.writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(png)
    print(f"wrote {path}")
