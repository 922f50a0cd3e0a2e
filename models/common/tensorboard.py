"""A run's scalars and images for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

SessionLog, Summary = tf.compat.v1.SessionLog, tf.compat.v1.Summary


class TensorBoard:
    """Writes an event file.

    Args:
      folder: the run folder.
      step: the step resumed from; TensorBoard discards what was written for later steps.
    """

    def __init__(self, folder: Path, step: int = 0):
        logs = folder / "tensorboard"
        logs.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{len(list(logs.iterdir())):04d}"
        self._file = tf.io.TFRecordWriter(str(logs / name))
        self._event(file_version="brain.Event:2")
        # tf.summary's writers cannot write this event.
        self._event(step=step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars."""
        summary = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(step=step, summary=Summary(value=summary))

    def image(self, step: int, name: str, png: bytes) -> None:
        """Adds a PNG image."""
        picture = Summary.Value(tag=name, image=Summary.Image(encoded_image_string=png))
        self._event(step=step, summary=Summary(value=[picture]))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _event(self, **content: Any) -> None:
        self._file.write(tf.compat.v1.Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
