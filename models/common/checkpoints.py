"""Checkpoints of a run, on top of tf.train.CheckpointManager.

The manager writes and rotates files with checksums. This module adds state outside TensorFlow,
skips damaged checkpoints, handles full disks, refuses NaN weights, and finds the one to use.

checkpoints/step-20.index, step-20.data-*    variables, and `state`: step, extras, ...
checkpoints/best/step-10.index, ...          the best so far, without extras
"""

import dataclasses
import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from models.common import files, run_folder
from models.common.errors import NotFinite, UserError, first_line


class Stateful(Protocol):
    """An object with state outside TensorFlow variables: replay, generators, environments."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nested dicts and lists of arrays, bytes, numbers, strings and None."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state that state_dict returned."""


class Checkpoints:
    """Writes, lists and restores the checkpoints of a run folder.

    Args:
      folder: the run folder.
      trackables: modules, optimizers and variables by name, for tf.train.Checkpoint.
      extras: other state by name.
      keep: how many of the latest checkpoints to keep.
      say: a function that prints a line.
      write: False in all workers of a cluster but the chief.
    """

    def __init__(
        self,
        folder: Path,
        trackables: Mapping[str, Any],
        extras: Mapping[str, Stateful] | None = None,
        keep: int = 2,
        say: Callable[[str], None] = print,
        write: bool = True,
    ):
        self.folder = folder / "checkpoints"
        self._trackables, self._extras = dict(trackables), dict(extras or {})
        self._say, self._write = say, write
        self._state = _State()
        self._tf = tf.train.Checkpoint(**trackables, state=self._state)
        self._managers = {
            best: tf.train.CheckpointManager(
                self._tf, str(self.folder / "best" if best else self.folder),
                max_to_keep=1 if best else keep, checkpoint_name="step",
            )
            for best in (False, True)
        }  # fmt: skip

    def save(self, step: int, metadata: dict[str, Any], best: bool = False) -> None:
        """Writes a checkpoint; if that fails, keeps the earlier ones and raises UserError."""
        self._refuse_nan(step)
        extras = {} if best else {name: e.state_dict() for name, e in self._extras.items()}
        self._state.value = {"step": step, **metadata, "extras": extras}
        try:
            if self._write:
                self._managers[best].save(checkpoint_number=step, check_interval=False)
                # TensorFlow does not sync its files to the disk.
                for path in (self.folder / "best" if best else self.folder).glob(f"step-{step}.*"):
                    files.sync(path)
            else:  # All workers must take part, because variables may be spread over them.
                with tempfile.TemporaryDirectory() as unused:
                    self._tf.write(f"{unused}/step")
        except (OSError, tf.errors.OpError) as error:
            kept = self.latest()
            free = shutil.disk_usage(self.folder).free / 2**30
            self._clean(self.folder / "best" if best else self.folder, f"step-{step}")
            raise UserError(
                f"could not write the checkpoint of step {step} ({first_line(error)}; "
                f"{free:.1f} GiB free at {self.folder}): make room, then --resume from "
                + (f"{kept.name}, which is intact" if kept else "the start")
            ) from error

    def all(self) -> list[Path]:
        """Returns the checkpoints, oldest first."""
        return [path for path in _list(self.folder) if path.name != "tf"]

    def latest(self) -> Path | None:
        """Returns the newest intact checkpoint, None if there is none."""
        return next((path for path in reversed(self.all()) if damage(path) is None), None)

    def restore(self) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint; returns its metadata, or None if there is none."""
        for rest in self.folder.glob("**/step-*_temp") if self._write else ():  # Left by a crash.
            shutil.rmtree(rest, ignore_errors=True)
        for path in reversed(self.all()):
            if problem := damage(path):
                self._say(f"{path.name} is damaged ({problem}); trying the previous one")
                continue
            _read(self._tf, path)
            state = self._state.value
            for name, extra in self._extras.items():
                extra.load_state_dict(state["extras"][name])
            return {key: value for key, value in state.items() if key != "extras"}
        if self.all():
            raise UserError(f"every checkpoint in {self.folder} is damaged: start a new run")
        if _list(self.folder):
            raise UserError(
                f"{self.folder} was written by an earlier version, "
                f"{_version(self.folder.parent)}: resume it with that version; this version can "
                "evaluate it, but not resume it"
            )
        return None

    def _clean(self, folder: Path, name: str) -> None:
        """Removes the files that an interrupted write left behind."""
        shutil.rmtree(folder / f"{name}_temp", ignore_errors=True)
        if damage(folder / name):
            for file in folder.glob(f"{name}.*"):
                file.unlink()

    def _refuse_nan(self, step: int) -> None:
        for variable in _variables(list(self._trackables.values())):
            value = tf.convert_to_tensor(variable)
            if value.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(value))):
                kept = self.latest()
                raise NotFinite(
                    f"{variable.name} is not finite at step {step}; nothing was saved. The last "
                    f"good checkpoint is {kept.name if kept else 'none'}: lower --learning-rate"
                )


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint to use rather than resume: its path, and its run's folder and Config."""

    path: Path
    folder: Path
    config: Any

    def restore(self, **trackables: Any) -> None:
        """Restores all variables of the trackables, which have the same names as in Run.begin."""
        _read(tf.train.Checkpoint(**trackables), self.path)

    def note(self, *caveats: str) -> str:
        """Returns Config.note with the checkpoint's name, and how the run changed or diverged."""
        content = run_folder.load(self.folder)
        name = self.path.parent.name if self.path.name == "tf" else self.path.name
        name += " of a run that diverged" if "diverged" in content else ""
        return self.config.note(name, *content.get("changes", ()), *caveats)


def open_run(path: str | Path, config_class: type) -> Found:
    """Returns the checkpoint that `find` picks, with its run's folder and Config."""
    found = find(path)
    above = found.resolve().parents
    folder = next((f for f in above if f.name == "checkpoints"), above[1]).parent
    if not (folder / "config.json").exists():
        raise UserError(
            f"{path}: this checkpoint needs the config.json of its run; move it back to "
            "RUN/checkpoints/NAME"
        )
    return Found(found, folder, run_folder.load_config(folder, config_class))


def find(path: str | Path) -> Path:
    """Returns a checkpoint's prefix: `path` itself, or the best (else the last) one of a run."""
    path = Path(path)
    candidates = [path] if Path(f"{path}.index").exists() else _list(path)
    if not candidates:
        run_folder.load(path)
        folder = path / "checkpoints"
        candidates = [*_list(folder), *_list(folder / "best")]
    if not candidates:
        raise UserError(f"{path}: the run has no checkpoint yet")
    for candidate in reversed(candidates):
        problem = damage(candidate)
        if problem is None:
            return candidate
        print(f"{candidate} is damaged ({problem})", flush=True)
    raise UserError(f"{path}: no checkpoint is intact")


def damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if all can be read."""
    try:
        reader = tf.train.load_checkpoint(str(path))
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)  # Verifies the checksum.
    except Exception as error:  # Its type depends on the damage.
        return first_line(error)
    return None


def _list(folder: Path) -> list[Path]:
    """Returns the prefixes of the checkpoints in a folder, oldest first.

    It does not use CheckpointManager.checkpoints, which relies on a file that may be damaged, too.
    Earlier versions wrote step-NNN/tf and best/tf.
    """

    def step(prefix: Path) -> int:
        return int(re.sub(r"\D", "", (prefix.parent if prefix.name == "tf" else prefix).name) or 0)

    found = itertools.chain(*map(folder.glob, ("step-*.index", "tf.index", "step-*/tf.index")))
    return sorted((file.with_suffix("") for file in found), key=step)


class _State(tf.train.experimental.PythonState):
    """Nested dicts and lists, serialized as an archive of arrays with the rest as JSON."""

    value: dict[str, Any]

    def serialize(self) -> bytes:
        """Returns `value` as bytes."""
        arrays: dict[str, np.ndarray] = {}

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(k): plain(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            if isinstance(value, bytes):
                return {"__bytes__": plain(np.frombuffer(value, np.uint8))}
            if isinstance(value, np.ndarray):
                arrays[name := f"a{len(arrays)}"] = value
                return {"__array__": name}
            return value.item() if isinstance(value, np.generic) else value

        text, file = json.dumps(plain(self.value)), io.BytesIO()
        np.savez(file, text=np.array(text), **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Sets `value` from its serialized bytes."""
        with np.load(io.BytesIO(string_value)) as arrays:

            def rich(value: Any) -> Any:
                if isinstance(value, list):
                    return [rich(v) for v in value]
                if isinstance(value, dict):
                    if "__array__" in value:
                        return arrays[value["__array__"]]
                    if "__bytes__" in value:
                        return rich(value["__bytes__"]).tobytes()
                    return {k: rich(v) for k, v in value.items()}
                return value

            self.value = rich(json.loads(arrays["text"].item()))


def _variables(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [variable for item in value for variable in _variables(item)]
    if isinstance(value, tf.Variable):
        return [value]
    return list(getattr(value, "variables", ()))


def _read(target: tf.train.Checkpoint, path: Path) -> None:
    """Reads all variables of `target` from a checkpoint, which may contain more."""
    try:
        target.read(str(path)).expect_partial().assert_existing_objects_matched()
    except (tf.errors.OpError, ValueError, AssertionError) as error:
        raise UserError(f"{path}: does not fit this configuration ({first_line(error)})") from error


def _version(folder: Path) -> str:
    session = run_folder.load(folder)["sessions"][-1]
    version = session["versions"].get("tensorflow-weight-norm", "version unknown")
    return f"{version}, commit {session['git'].get('commit', 'unknown')[:10]}"
