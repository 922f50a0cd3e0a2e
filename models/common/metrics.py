"""A run's metrics.csv, which is truncated to the checkpoint when the run is resumed."""

import csv
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path

from models.common import files


class Metrics:
    """Writes rows of numbers by step, with blanks where a row lacks a column.

    Args:
      folder: the run folder.
      rows: how many rows of an existing file to keep (those of the checkpoint resumed from).
    """

    def __init__(self, folder: Path, rows: int = 0):
        self.path = folder / "metrics.csv"
        self.columns: list[str] = ["step", "time"]
        self._rows = _read(self.path)[:rows]
        for row in self._rows:
            self.columns += [name for name in row if name not in self.columns]
        self._started = time.monotonic()
        self._before = float(self._rows[-1]["time"]) if self._rows else 0.0
        self._rewrite()

    @property
    def rows(self) -> int:
        """The number of rows so far, including those from before a resume."""
        return len(self._rows)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row."""
        elapsed = round(self._before + time.monotonic() - self._started, 2)
        row = {"step": str(step), "time": str(elapsed)}
        row |= {name: f"{value:.8g}" for name, value in values.items()}
        new = [name for name in row if name not in self.columns]
        self._rows.append(row)
        if new:
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        files.write_atomically(self.path, text.getvalue())


def read(path: str | Path) -> dict[str, list[float]]:
    """Returns a metrics.csv (or a run folder's) as {column: values}, with NaN for blanks."""
    path = Path(path)
    rows = _read(path / "metrics.csv" if path.is_dir() else path)
    columns = dict.fromkeys(name for row in rows for name in row)
    return {name: [float(row.get(name) or math.nan) for row in rows] for name in columns}


def last(path: str | Path, column: str, highest: bool = False) -> float:
    """Returns the last (or highest) value in a column, NaN if there is none."""
    values = [value for value in read(path).get(column, []) if not math.isnan(value)]
    if not values:
        return math.nan
    return max(values) if highest else values[-1]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        text = file.read()
    # A crash or a full disk may cut the last row short: it counts only with its line break.
    whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
    return [
        {name: value for name, value in row.items() if name and value}
        for row in csv.DictReader(whole)
    ]
