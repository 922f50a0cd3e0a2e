"""Progress display: a live line in a terminal, an occasional plain line elsewhere."""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress
from rich.markup import escape

PLAIN_EVERY = 30.0  # Seconds between lines if the output is not a terminal.
_BAR = 18  # Columns of the spinner, the bar, the percentage and the gaps around them.


class Progress:
    """Shows step, rate, time left, values and epoch; a context manager.

    The rate is a median over intervals of at least 0.25 s, so pauses, such as an evaluation, affect
    neither the rate nor the time left.

    Args:
      total: the last step.
      start: the first step.
      warm_up: the step after which the rate is measured.
      unit: the unit of the rate ("images", ...).
      per_step: units per step.
      steps_per_epoch: if given, the epoch is shown.
      console: where to print.
      delay: seconds before a terminal shows anything.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        warm_up: int = 0,
        unit: str = "steps",
        per_step: float = 1,
        steps_per_epoch: int | None = None,
        console: rich.console.Console | None = None,
        delay: float = 0,
    ):
        self._total, self._step, self._warm_up = total, start, warm_up
        self._unit, self._per_step, self._steps_per_epoch = unit, per_step, steps_per_epoch
        self._console = console or rich.console.Console()
        self._values: dict[str, Any] = {}
        self._since: tuple[float, int] | None = None  # Time and step of the last measurement.
        self._paces: collections.deque[float] = collections.deque(maxlen=100)  # Seconds per step.
        self._shown_from = time.monotonic() + delay
        self._printed = time.monotonic() - PLAIN_EVERY / 2
        self._bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),  # Spins even while an evaluation holds up the steps.
            rich.progress.BarColumn(bar_width=10),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=total, completed=start, text="")

    def __enter__(self) -> "Progress":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    @property
    def rate(self) -> float | None:
        """Steps per second; None before the first measurement."""
        return 1 / statistics.median(self._paces) if self._paces else None

    def show(self, **values: Any) -> None:
        """Sets values on the line, the latest first; None removes a value."""
        values |= {n: v for n, v in self._values.items() if n not in values}
        self._values = {n: v for n, v in values.items() if v is not None}

    def update(self, step: int) -> None:
        """Advances to a step."""
        now = time.monotonic()
        if self._since is None:
            if step > self._warm_up:  # The first step, which compiles, does not count.
                self._since = now, step
        elif now - self._since[0] >= 0.25 and step > self._since[1]:
            self._paces.append((now - self._since[0]) / (step - self._since[1]))
            self._since = now, step
        self._step = step
        self.refresh()

    def refresh(self) -> None:
        """Redraws the line."""
        now = time.monotonic()
        if self._console.is_terminal:
            text = escape(self.line(self._step, self._console.width - _BAR))
            self._bar.update(self._task, completed=self._step, text=text)
            self._start()
        elif now - self._printed >= PLAIN_EVERY:
            self._printed = now
            self.say(self.line(self._step))

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def line(self, step: int, room: int | None = None) -> str:
        """Returns the text of the line, with the values that fit into `room` columns."""
        line, rate = f"step {step:,}/{self._total:,}", self.rate
        if rate:
            line += f"  {_short(self._per_step * rate)} {self._unit}/s"
            if step < self._total:
                line += f"  {duration((self._total - step) / rate)} left"
        values = [f"{name} {_short(value)}" for name, value in self._values.items()]
        if self._steps_per_epoch:
            values.append(f"epoch {step / self._steps_per_epoch:.1f}")
        for value in values:
            if room is not None and len(line) + 2 + len(value) > room:
                break
            line += f"  {value}"
        return line

    def _start(self) -> None:
        if self._console.is_terminal and time.monotonic() >= self._shown_from:
            self._bar.start()


@contextlib.contextmanager
def evaluation() -> Iterator[Callable[[int, int], None]]:
    """Yields report(done, total), which shows the progress of a command that takes a while."""
    with contextlib.ExitStack() as stack:
        lines: list[Progress] = []

        def report(done: int, total: int) -> None:
            if not lines:
                lines.append(stack.enter_context(Progress(total, delay=3)))
            lines[0].update(done)

        yield report


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
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
