"""Video files."""

from pathlib import Path
from typing import Any

import numpy as np

from models.common import files
from models.common.errors import UserError


class Video:
    """A .gif or .mp4 file; a context manager.

    Args:
      path: the file.
      rate: frames per second.
    """

    def __init__(self, path: Path, rate: float):
        import imageio.v2 as imageio

        self._path = path
        if path.suffix not in (".gif", ".mp4"):
            raise UserError(f"--out {path}: the name must end in .gif or .mp4")
        try:
            choices: dict[str, Any] = {"fps": rate, "macro_block_size": 2}
            if path.suffix == ".gif":
                choices = {"duration": 1000 / rate, "loop": 0, "subrectangles": True}
            with files.writing(path):
                self._writer = imageio.get_writer(path, **choices)
        except (ImportError, ValueError):
            raise UserError(f"--out {path}: .mp4 needs: pip install imageio-ffmpeg") from None

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def frame(self, picture: np.ndarray) -> None:
        """Adds a frame, uint8 [height, width, 3]."""
        self._writer.append_data(picture)
