"""metrics.csv and TensorBoard events of a run, cut back to the checkpoint when it is resumed."""

import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import tensorflow as tf


class Metrics:
    """Rows of scalars by step: `metrics.csv` (blank where a row lacks a column) and TensorBoard.

    Args:
      folder: the run folder.
      rows: how many rows to keep of an existing file (those of the checkpoint resumed from).
      step: the step resumed from; TensorBoard forgets what came after it.
    """

    def __init__(self, folder: Path, rows: int = 0, step: int = 0):
        self.path = folder / "metrics.csv"
        self.columns: list[str] = ["step", "time"]
        self._rows = _read(self.path)[:rows]
        for row in self._rows:
            self.columns += [name for name in row if name not in self.columns]
        self._started = time.monotonic()
        self._before = float(self._rows[-1]["time"]) if self._rows else 0.0
        self._rewrite()
        logs = folder / "tensorboard"
        logs.mkdir(exist_ok=True)
        number = len(list(logs.iterdir()))
        self._events = tf.io.TFRecordWriter(
            str(logs / f"events.out.tfevents.{int(time.time())}.{number:04d}")
        )
        self._event(file_version="brain.Event:2")
        start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
        self._event(step=step, session_log=start)

    @property
    def rows(self) -> int:
        """Rows written so far, the resumed ones included."""
        return len(self._rows)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds a row; a value is anything float() takes."""
        numbers = {name: float(value) for name, value in values.items()}
        elapsed = round(self._before + time.monotonic() - self._started, 2)
        row = {"step": str(step), "time": str(elapsed)}
        row |= {name: f"{value:.8g}" for name, value in numbers.items()}
        new = [name for name in row if name not in self.columns]
        self._rows.append(row)
        if new:
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        self._event(
            step=step,
            summary=tf.compat.v1.Summary(
                value=[
                    tf.compat.v1.Summary.Value(tag=name, simple_value=value)
                    for name, value in numbers.items()
                ]
            ),
        )

    def image(self, step: int, name: str, png: bytes) -> None:
        """Adds an encoded image to TensorBoard."""
        picture = tf.compat.v1.Summary.Image(encoded_image_string=png)
        value = tf.compat.v1.Summary.Value(tag=name, image=picture)
        self._event(step=step, summary=tf.compat.v1.Summary(value=[value]))

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()

    def _event(self, **content: Any) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), **content)
        self._events.write(event.SerializeToString())
        self._events.flush()

    def _rewrite(self) -> None:
        temporary = self.path.with_name("metrics.csv.new")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def read(path: str | Path) -> dict[str, list[float]]:
    """Returns metrics.csv (or that of a run folder) as {column: values}, nan where blank."""
    path = Path(path)
    rows = _read(path / "metrics.csv" if path.is_dir() else path)
    columns = dict.fromkeys(name for row in rows for name in row)
    return {name: [float(row.get(name) or math.nan) for row in rows] for name in columns}


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        # A row cut short by a crash lacks columns; it is newer than any checkpoint.
        return [
            {name: value for name, value in row.items() if name and value}
            for row in csv.DictReader(file)
        ]
