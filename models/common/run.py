"""A training run: its folder, state and metrics, and the loops around the program's steps."""

import contextlib
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.common import (
    checkpoints,
    files,
    metrics,
    options,
    progress,
    run_folder,
    runtime,
    tensorboard,
)
from models.common.errors import NotFinite


class Run:
    """A run in the folder that its Config names; a context manager.

    Args:
      config: the Config.
      title: a description of the run, printed at the start.
      caveats: limitations, which are shown with the results and stored in config.json.

    Attributes:
      config, path: the Config and the run folder.
      strategy: create the model and optimizer under strategy.scope(); step with strategy.run().
      dtype: the compute dtype (`--mixed-precision`).
      chief: whether this process writes the run folder.
      step: the number of completed steps.
      best: the best score so far (see keep_best), None before the first.
    """

    def __init__(self, config: options.RunConfig, title: str = "", *caveats: str):
        self.config, self.path, self._caveats = config, Path(config.out), caveats
        self.chief = runtime.is_chief(config)
        self._stop: signal.Signals | None = None
        self.strategy = runtime.configure(config)
        self.dtype = runtime.compute_dtype(config)
        self._folder = run_folder.RunFolder(config) if self.chief else None
        self.step = 0
        self.best: float | None = None
        self._done = ""  # The message at the end.
        self._saved: dict[str, Any] | None = None  # The last checkpoint's metadata.
        self._metrics: metrics.Metrics | None = None
        self._tensorboard: tensorboard.TensorBoard | None = None
        self._progress: progress.Progress | None = None
        self._open = contextlib.ExitStack()  # Signal handlers and progress, from the first step.
        if title:
            self.say(f"{title}, preset {config.preset}{config.note(*caveats)}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self._progress = None
        self._open.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._folder:
            if isinstance(error, NotFinite):
                self._folder.write_diverged(str(error))
            self._folder.close()
        if error is None and self._done:
            self.say(f"{self._done}; the run is in {self.path}")
        if error is None and self._stop is not None:  # The signal came too late.
            sys.exit(128 + self._stop)

    def begin(
        self,
        trackables: Mapping[str, Any],
        extras: Mapping[str, checkpoints.Stateful] | None = None,
        sums: int = 0,
    ) -> int:
        """Registers the run's whole state, restores it when resuming, and returns the step.

        Args:
          trackables: modules, built optimizers, variables and tf.random.Generators, by name.
          extras: other state by name, as objects with state_dict() and load_state_dict(state).
          sums: the length of the vectors that are passed to Epoch.add.
        """
        if sums:
            self._totals = tf.Variable(tf.zeros([sums], tf.float64), name="totals")
            trackables = {**trackables, "totals": self._totals}
        self._checkpoints = checkpoints.Checkpoints(
            self.path, trackables, extras, self.config.keep, self.say, self.chief
        )
        rows = 0
        if self.config.resume:
            # A checkpoint restores its learning rate, but the Config's may be a newer one.
            found: list[Any] = [getattr(t, "learning_rate", None) for t in trackables.values()]
            rates = [(r, tf.convert_to_tensor(r)) for r in found if hasattr(r, "assign")]
            state = self._checkpoints.restore()
            for rate, value in rates:
                rate.assign(value)
            if state is None:
                self.say("no checkpoint yet: starting from the beginning")
            else:
                self._saved = state
                self.step, rows, self.best = state["step"], state["rows"], state["best"]
                self.say(f"resumed at step {self.step:,}")
        if self._folder:
            caveats = "; ".join(filter(None, self._caveats))
            self._folder.write_config(self.config, caveats, self.step)
            self._metrics = metrics.Metrics(self.path, rows)
            self._tensorboard = tensorboard.TensorBoard(self.path, self.step)
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
        """Yields the number of completed steps until it reaches `total`.

        Between iterations it shows progress and saves checkpoints: every `--checkpoint-every`
        seconds, every `save_every` steps, at the end, and before exiting on SIGTERM or Ctrl-C.
        Signals stay handled after the last step, so that a final evaluation can be stopped safely.

        Args:
          total: the number of steps of the whole run.
          stride: steps per iteration.
          save_every: the maximum number of steps between checkpoints.
          warm_up: the step after which the rate is measured.
          unit: the unit of the displayed rate.
          per_step: units per step.
          steps_per_epoch: if given, the epoch is displayed.
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
                self._progress.show(evaluated=None)
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

    def epochs(self, count: int, per_epoch: int, batch_size: int) -> Iterator["Epoch"]:
        """Yields epochs, each of which yields its steps; see Epoch.

        Code after an epoch's steps must not change the state, because it runs again if the run is
        resumed there. The epoch has no steps then.

        Args:
          count: the number of epochs.
          per_epoch: steps per epoch.
          batch_size: examples per step.
        """
        steps = self.steps(
            count * per_epoch, unit="images", per_step=batch_size, steps_per_epoch=per_epoch
        )
        ahead = next(steps, None)

        def until(end: int) -> Iterator[int]:
            nonlocal ahead
            while ahead is not None and ahead < end:
                yield ahead
                ahead = next(steps, None)  # May save, even after an epoch's last step.

        for number in range(max(-(-self.step // per_epoch) - 1, 0), count):
            here = until((number + 1) * per_epoch)
            yield Epoch(number, here, per_epoch, batch_size, self._totals)

    def save(self) -> None:
        """Saves a checkpoint of the current state."""
        self._saved = {"step": self.step, **self._metadata()}
        if self._metrics:
            files.sync(self._metrics.path)  # The checkpoint counts its rows.
        self._checkpoints.save(self.step, self._metadata())

    def keep_best(self, score: float) -> bool:
        """Saves checkpoints/best, without extras, and returns True if the score is a new best."""
        if not math.isfinite(score) or (self.best is not None and score <= self.best):
            return False
        self.best = float(score)
        self._checkpoints.save(self.step, self._metadata() | {"score": self.best}, best=True)
        return True

    def log(self, step: int | None = None, **values: Any) -> None:
        """Adds a row to metrics.csv and TensorBoard; values that are None stay blank.

        Raises:
          NotFinite: a value with "loss" in its name is not finite.
        """
        step = self.step if step is None else step
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        self._refuse_nan(step, numbers)
        if self._metrics and self._tensorboard:
            self._metrics.write(step, numbers)
            self._tensorboard.write(step, numbers)

    def image(self, name: str, png: bytes) -> None:
        """Adds a PNG image to samples/ and TensorBoard."""
        if self._tensorboard:
            folder = self.path / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}-{self.step:09d}.png").write_bytes(png)
            self._tensorboard.image(self.step, name, png)

    def show(self, **values: Any) -> None:
        """Sets values on the progress line; waits for tensors, so do not call it at every step.

        Raises:
          NotFinite: a value with "loss" in its name is not finite.
        """
        self._refuse_nan(self.step, values)
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

    @property
    def rate(self) -> float | None:
        """Steps per second without pauses; None before the first measurement."""
        return self._progress.rate if self._progress else None

    def evaluating(self, done: int, total: int) -> None:
        """Shows the progress of an evaluation; saves and exits after SIGTERM or Ctrl-C.

        Call it now and then in an evaluation, which must not change the state. In a cluster it does
        not exit, because all workers must exit at the same step.
        """
        if self._progress:
            self._progress.show(evaluated=f"{done / total:.0%}")
            self._progress.refresh()
        if self._stop is not None and self.config.strategy != "multi_worker":
            self._leave()

    def _refuse_nan(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if "loss" in name and not math.isfinite(value):
                kept = self._checkpoints.latest()
                raise NotFinite(
                    f"{name} is {float(value)} at step {step}; the last good checkpoint is "
                    f"{kept.name if kept else 'none'}: lower --learning-rate, or look for the "
                    f"cause in {self.path / 'metrics.csv'}"
                )

    def _leave(self) -> None:
        if self._saved != {"step": self.step, **self._metadata()}:
            self.save()
        self.say(f"stopped at step {self.step:,}, saved; continue with --resume --out {self.path}")
        sys.exit(128 + (self._stop or signal.SIGTERM))

    def _metadata(self) -> dict[str, Any]:
        return {"rows": self._metrics.rows if self._metrics else 0, "best": self.best}

    def _agree(self, due: bool, stride: int) -> tuple[bool, bool]:
        """Returns whether to save and whether to exit, the same for all workers of a cluster."""
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
        """Turns SIGTERM and Ctrl-C into a request to stop; a second one exits immediately."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: Any) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number)
            self.say(f"{self._stop.name}: saving, then exiting (repeat to exit immediately)")

        before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Epoch:
    """One pass over the training examples; iterating over it yields its steps.

    Attributes:
      number: the epoch, counted from 0.
      slice: the positions of the current step's batch in the epoch's permutation of the examples.
      seconds: the duration of all its steps, extrapolated after a resume; None if none were left.
    """

    def __init__(
        self, number: int, steps: Iterator[int], per_epoch: int, batch_size: int, totals: Any
    ):
        self.number = number
        self.seconds: float | None = None
        self._steps, self._per_epoch, self._batch_size = steps, per_epoch, batch_size
        self._totals = totals

    def __iter__(self) -> Iterator[int]:
        began, count = time.monotonic(), 0
        for step in self._steps:
            position = step % self._per_epoch
            if position == 0:
                self._totals.assign(tf.zeros_like(self._totals))
            self.slice = slice(position * self._batch_size, (position + 1) * self._batch_size)
            yield step
            count += 1
        if count:
            self.seconds = (time.monotonic() - began) / count * self._per_epoch

    def add(self, sums: tf.Tensor) -> None:
        """Adds a step's sums over its batch to the epoch's totals."""
        self._totals.assign_add(tf.cast(sums, tf.float64))

    @property
    def means(self) -> np.ndarray:
        """Returns the totals divided by the number of examples, float64."""
        return self._totals.numpy() / (self._per_epoch * self._batch_size)
