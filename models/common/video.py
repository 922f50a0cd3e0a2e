"""Videos: of games the screen, the score, and what the network thinks of each action."""

from pathlib import Path
from typing import Any

import numpy as np

from models.common.errors import UserError

_WIDTH, _HEIGHT, _PANEL = 320, 420, 40


class Video:
    """A .gif or .mp4 file that frames are added to; a context manager.

    Args:
      path: of the file.
      rate: frames per second.
    """

    def __init__(self, path: Path, rate: float):
        import imageio.v2 as imageio

        self._path = path
        if path.suffix not in (".gif", ".mp4"):
            raise UserError(f"--out {path}: a video's name ends in .gif or .mp4")
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

    def add(self, screen: np.ndarray, text: str, values: np.ndarray, chosen: int) -> None:
        """Adds a frame: the screen, uint8 [h, w, 3], above a line of text and bars of values."""
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (_WIDTH, _HEIGHT + _PANEL))
        picture.paste(Image.fromarray(screen).resize((_WIDTH, _HEIGHT), Image.Resampling.NEAREST))
        draw = ImageDraw.Draw(picture)
        draw.text((8, _HEIGHT + 12), text, fill="white", font_size=15)
        low, high = values.min(), values.max()
        width = min(14, 130 // len(values))
        for index, value in enumerate(values):
            height = 3 + round(29 * float((value - low) / max(high - low, 1e-9)))
            left = _WIDTH - 8 - width * (len(values) - index)
            box = (left, _HEIGHT + 36 - height, left + width - 3, _HEIGHT + 36)
            draw.rectangle(box, fill="orange" if index == chosen else "gray")
        self.frame(np.asarray(picture))

    def frame(self, picture: np.ndarray) -> None:
        """Adds a picture as it is, uint8 [h, w, 3]."""
        self._writer.append_data(picture)
