"""How far a long piece of work is: a live line in a terminal, an occasional plain one elsewhere."""

import collections
import time
from typing import Any

import rich.console
import rich.progress
from rich.markup import escape

PLAIN_EVERY = 30.0  # Seconds between lines where the output is not a terminal.


class Progress:
    """Shows step, epoch, values, rate and time left; a context manager.

    Args:
      total: the last step.
      start: the step begun with.
      unit: what a step is called in the rate ("frames", "images", ...).
      per_step: how many units a step is.
      steps_per_epoch: shows the epoch where given.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        unit: str = "steps",
        per_step: float = 1,
        steps_per_epoch: int | None = None,
        console: rich.console.Console | None = None,
    ):
        self._total, self._unit, self._per_step = total, unit, per_step
        self._steps_per_epoch = steps_per_epoch
        self._console = console or rich.console.Console()
        self._values: dict[str, Any] = {}
        self._recent = collections.deque([(time.monotonic(), start)], maxlen=200)
        self._printed = time.monotonic() - PLAIN_EVERY / 2
        self._bar: rich.progress.Progress | None = None
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=total, completed=start, text="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, **values: Any) -> None:
        """Sets values of the line."""
        self._values |= values

    def update(self, step: int) -> None:
        """Moves to a step."""
        now = time.monotonic()
        if now - self._recent[-1][0] > 0.25 or len(self._recent) == 1:
            self._recent.append((now, step))
        if self._bar:
            self._bar.update(self._task, completed=step, text=escape(self.line(step)))
        elif now - self._printed >= PLAIN_EVERY:
            self._printed = now
            self.say(self.line(step))

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def line(self, step: int) -> str:
        """Returns the line's text."""
        parts = [f"step {step:,}/{self._total:,}"]
        if self._steps_per_epoch:
            parts.append(f"epoch {step / self._steps_per_epoch:.1f}")
        parts += [f"{name} {_short(value)}" for name, value in self._values.items()]
        (then, before), (now, at) = self._recent[0], self._recent[-1]
        if at > before:
            rate = (at - before) / (now - then)
            parts.append(f"{_short(rate * self._per_step)} {self._unit}/s")
            parts.append(f"{duration((self._total - step) / rate)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns seconds as 45s, 12m30s, 3h05m or 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 172_800:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    number = float(value)
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"
