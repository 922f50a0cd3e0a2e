"""One run of a program: its folder, state, metrics and step loop; the program owns the body."""

import contextlib
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from models.common import checkpoints, metrics, options, progress, run_folder, runtime
from models.common.errors import NotFinite


class Run:
    """Opens the run folder of a Config; a context manager.

    Attributes:
      config: the Config.
      path: the run folder.
      strategy: build model and optimizer under strategy.scope(), step by strategy.run().
      dtype: the compute type (`--mixed-precision`).
      step: completed steps.
      best: the best score so far (see keep_best), None before the first.
    """

    def __init__(self, config: options.RunConfig, program: str = ""):
        self.config = config
        self.chief = runtime.is_chief(config)
        self._stop: signal.Signals | None = None
        self.strategy = runtime.configure(config)
        self.dtype = runtime.compute_dtype(config)
        self._program = program or run_folder.program_of(type(config))
        self._folder = run_folder.RunFolder(config) if self.chief else None
        self.path = self._folder.path if self._folder else run_folder.Path(config.out)
        self.step = 0
        self.best: float | None = None
        self._done = ""  # What to say at the end.
        self._metrics: metrics.Metrics | None = None
        self._progress: progress.Progress | None = None
        self._open = contextlib.ExitStack()  # From the first step on: signals, the progress line.

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress = None
        self._open.close()
        if self._metrics:
            self._metrics.close()
        if self._folder:
            self._folder.close()
        if kind is None and self._done:
            self.say(f"{self._done}; the run is in {self.path}")
        if kind is None and self._stop is not None:  # It came too late to stop this run.
            sys.exit(128 + self._stop)

    def begin(
        self,
        trackables: Mapping[str, Any],
        extras: Mapping[str, checkpoints.Stateful] | None = None,
    ) -> int:
        """Names the run's whole state, restores it when resuming, and returns the step.

        Args:
          trackables: modules, optimizers (built), variables, tf.random.Generators, by name.
          extras: other state, by name: objects with state_dict() and load_state_dict(state).
        """
        self._checkpoints = checkpoints.Checkpoints(
            self.path, trackables, extras, self.config.keep, self.say, self.chief
        )
        rows = 0
        if self.config.resume:
            # An optimizer's checkpoint holds its learning rate; the one asked for now is the new.
            found: list[Any] = [getattr(t, "learning_rate", None) for t in trackables.values()]
            rates = [(r, tf.convert_to_tensor(r)) for r in found if hasattr(r, "assign")]
            state = self._checkpoints.restore()
            if self.config.accept_changes:
                for rate, value in rates:
                    rate.assign(value)
            if state is None:
                self.say("no checkpoint yet: starting from the beginning")
            else:
                self.step, rows, self.best = state["step"], state["rows"], state["best"]
                self.say(f"resumed at step {self.step:,}")
        if self._folder:
            self._folder.write_config(self.config, self._program)
            self._metrics = metrics.Metrics(self.path, rows, self.step)
        return self.step

    def steps(
        self,
        total: int,
        *,
        stride: int = 1,
        save_every: int | None = None,
        warm_up: int = 0,
        unit: str = "steps",
        per_step: float = 1,
        steps_per_epoch: int | None = None,
    ) -> Iterator[int]:
        """Yields the number of completed steps until `total`, while the program trains.

        Between the bodies it saves (every `--checkpoint-every` seconds, every `save_every`
        steps, at the end, and before leaving on SIGTERM or Ctrl-C) and shows progress. Signals and
        the progress line stay as they are until the run ends, for a last test after the steps.

        Args:
          total: the last step.
          stride: how many steps one body is.
          save_every: also saves when so many steps have passed.
          warm_up: shows no rate up to this step: those before it are faster or slower.
          unit: the name of what the rate counts.
          per_step: how many units a step is.
          steps_per_epoch: shows the epoch where given.
        """
        saved_at, saved_step = time.monotonic(), self.step
        self._open.enter_context(self._signals())
        if self.chief:
            line = progress.Progress(total, self.step, warm_up, unit, per_step, steps_per_epoch)
            self._progress = self._open.enter_context(line)
        while self.step < total:
            yield self.step
            self.step += stride
            if self._progress:
                self._progress.show(tested=None)
                self._progress.update(self.step)
            due = time.monotonic() - saved_at >= self.config.checkpoint_every or (
                save_every is not None and self.step - saved_step >= save_every
            )
            due, leave = self._agree(due, stride)
            if leave:
                self._leave()
            if due:
                self.save()
                saved_at, saved_step = time.monotonic(), self.step
        if saved_step != self.step or not self._checkpoints.all():
            self.save()
        self._done = f"{self.step:,} {unit if per_step == 1 else 'steps'} done"

    def save(self) -> None:
        """Saves a checkpoint of the present state."""
        self._checkpoints.save(self.step, self._metadata())

    def keep_best(self, score: float) -> bool:
        """Saves checkpoints/best (without the extras) when `score` is the highest so far."""
        if not math.isfinite(score) or (self.best is not None and score <= self.best):
            return False
        self.best = float(score)
        self._checkpoints.save(self.step, self._metadata() | {"score": self.best}, best=True)
        return True

    def log(self, step: int | None = None, **values: Any) -> None:
        """Adds a row to metrics.csv and TensorBoard; stops the run where a loss is not finite."""
        step = self.step if step is None else step
        numbers = {name: float(value) for name, value in values.items()}
        for name, value in numbers.items():
            if "loss" in name and not math.isfinite(value):
                kept = self._checkpoints.latest()
                raise NotFinite(
                    f"{name} is {value} at step {step}; the last good checkpoint is "
                    f"{kept.name if kept else 'none'}: lower --learning-rate, or look for the "
                    f"cause in {self.path / 'metrics.csv'}"
                )
        if self._metrics:
            self._metrics.write(step, numbers)

    def introduce(self, what: str, note: str) -> None:
        """Says what is run, and keeps in note.txt what is to be said beside its results."""
        self.say(f"{what}, preset {self.config.preset}{note}")
        if self.chief:
            (self.path / "note.txt").write_text(note.strip())

    def image(self, name: str, png: bytes) -> None:
        """Adds an encoded image to samples/ and TensorBoard."""
        if self._metrics:
            folder = self.path / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}-{self.step:09d}.png").write_bytes(png)
            self._metrics.image(self.step, name, png)

    def show(self, **values: Any) -> None:
        """Sets values on the progress line."""
        if self._progress:
            self._progress.show(**values)

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self.chief:
            return
        if self._progress:
            self._progress.say(text)
        else:
            print(text, flush=True)

    def testing(self, done: int, total: int) -> None:
        """Shows how far a test is, and saves and leaves when SIGTERM or Ctrl-C has come.

        Call it now and then in a test inside a body, or after the steps, and only where the state
        is that of `step`: before the body has changed anything.
        """
        if self._progress:
            self._progress.show(tested=f"{done / total:.0%}")
            self._progress.refresh()
        if self._stop is not None and self.config.strategy != "multi_worker":
            self._leave()

    def _leave(self) -> None:
        self.save()
        self.say(
            f"stopped at step {self.step:,}, saved; go on with --resume --out {self.config.out}"
        )
        sys.exit(128 + (self._stop or signal.SIGTERM))

    def _metadata(self) -> dict[str, Any]:
        return {"rows": self._metrics.rows if self._metrics else 0, "best": self.best}

    def _agree(self, due: bool, stride: int) -> tuple[bool, bool]:
        """Makes all workers of a cluster save, and leave, at the same step."""
        leave = self._stop is not None
        if self.config.strategy != "multi_worker":
            return due, leave
        if (self.step // stride) % 10:
            return False, False
        flags = self._total(tf.constant([float(due and self.chief), float(leave)]))
        return bool(flags[0] > 0), bool(flags[1] > 0)

    @functools.cached_property
    def _total(self) -> Any:
        def total(flags: tf.Tensor) -> tf.Tensor:
            mine = self.strategy.run(tf.identity, (flags,))
            return self.strategy.reduce(tf.distribute.ReduceOp.SUM, mine, axis=None)

        return tf.function(total)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Makes SIGTERM and Ctrl-C ask for a stop; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: Any) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number)
            self.say(f"{self._stop.name}: saving, then leaving (once more to leave at once)")

        before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
