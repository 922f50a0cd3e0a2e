"""Video files."""

from pathlib import Path
from typing import Any

import numpy as np

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
            if path.suffix == ".gif":
                self._writer: Any = imageio.get_writer(
                    path, duration=1000 / rate, loop=0, subrectangles=True
                )
            else:
                self._writer = imageio.get_writer(path, fps=rate, macro_block_size=2)
        except (ImportError, ValueError):
            raise UserError(f"--out {path}: .mp4 needs: pip install imageio-ffmpeg") from None
        except OSError as error:
            raise UserError(f"--out {path}: cannot write there ({error.strerror})") from None

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def frame(self, picture: np.ndarray) -> None:
        """Adds a frame, uint8 [height, width, 3]."""
        self._writer.append_data(picture)
