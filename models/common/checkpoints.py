"""Checkpoints of a run: whole or not there, the last few and the best, the damaged passed over.

checkpoints/step-000000120000/   tf.index, tf.data-*  variables (tf.train.Checkpoint)
                                 state.json, arrays.npz  everything else that decides the future
                                 files.json  size and CRC of each file, written last
"""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from models.common import run_folder
from models.common.errors import NotFinite, UserError


class Stateful(Protocol):
    """Anything whose state is not in TensorFlow variables: replay, generators, environments."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nested dicts and lists of arrays, bytes, numbers, strings, None."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what state_dict returned."""


class Checkpoints:
    """Writes, lists and restores the checkpoints of a run folder.

    Args:
      folder: the run folder.
      trackables: what tf.train.Checkpoint takes: modules, optimizers, variables.
      extras: other state by name.
      keep: how many of the latest to keep.
      say: told, in one line, of what was passed over.
      write: False in the workers of a cluster that are not the chief.
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
        self._trackables = dict(trackables)
        self._tf = tf.train.Checkpoint(**trackables)
        self._extras = dict(extras or {})
        self._keep = keep
        self._say = say
        self._write = write

    def save(self, step: int, metadata: dict[str, Any], best: bool = False) -> Path:
        """Writes a checkpoint; on a full disk the earlier ones stay and a UserError says so."""
        final = self.folder / ("best" if best else f"step-{step:012d}")
        worker = "" if self._write else f"-worker-{os.getpid()}"
        temporary = self.folder / f".writing-{final.name}{worker}"
        self._refuse_nan(step)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            state = {} if best else {k: e.state_dict() for k, e in self._extras.items()}
            self._tf.write(str(temporary / "tf"))
            write_state(temporary, {"step": step, **metadata, "extras": state})
            _seal(temporary)
            if self._write:
                old = self.folder / f".old-{final.name}"
                shutil.rmtree(old, ignore_errors=True)
                if final.exists():
                    final.replace(old)
                temporary.replace(final)
                _sync(self.folder)
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, tf.errors.OpError) as error:
            free = shutil.disk_usage(self.folder).free / 2**30
            kept = self.latest()
            raise UserError(
                f"could not write the checkpoint of step {step} ({_first_line(error)}; "
                f"{free:.1f} GiB free at {self.folder}): make room, then --resume from "
                + (f"{kept.name}, which is intact" if kept else "the start")
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not best:
            for path in self.all()[: -self._keep]:
                shutil.rmtree(path, ignore_errors=True)
        return final

    def all(self) -> list[Path]:
        """Returns the checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*"))

    def latest(self) -> Path | None:
        """Returns the newest checkpoint that is intact."""
        return next((path for path in reversed(self.all()) if damage(path) is None), None)

    def restore(self) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint and returns its metadata; None without any."""
        for path in reversed(self.all()):
            problem = damage(path)
            if problem:
                self._say(f"{path.name} is damaged ({problem}); trying the one before it")
                continue
            state = read_state(path)
            _restore_variables(self._tf, path)
            for name, extra in self._extras.items():
                extra.load_state_dict(state["extras"][name])
            return {key: value for key, value in state.items() if key != "extras"}
        if self.all():
            raise UserError(f"every checkpoint in {self.folder} is damaged: start a new run")
        return None

    def _refuse_nan(self, step: int) -> None:
        for variable in _variables(self._trackables):
            value = tf.convert_to_tensor(variable)
            if value.dtype.is_floating and not bool(tf.reduce_all(tf.math.is_finite(value))):
                kept = self.latest()
                raise NotFinite(
                    f"{variable.name} is not finite at step {step}; nothing was saved. The last "
                    f"good checkpoint is {kept.name if kept else 'none'}: lower --learning-rate"
                )


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint to use, not to go on from: its path, its run folder and the run's Config."""

    path: Path
    folder: Path
    config: Any

    def restore(self, **trackables: Any) -> None:
        """Restores variables: all of the trackables', by their names in Run.begin."""
        _restore_variables(tf.train.Checkpoint(**trackables), self.path).expect_partial()


def open_run(path: str | Path, config_class: type) -> Found:
    """Returns the checkpoint that `find` finds, with the Config of its run."""
    found = find(path)
    folder = found.resolve().parent.parent
    if not (folder / "config.json").exists():
        raise UserError(
            f"{path}: a checkpoint outside of its run, whose config.json says what it holds; put "
            f"it back as RUN/checkpoints/NAME, or copy the run's config.json to {folder}"
        )
    return Found(found, folder, run_folder.load_config(folder, config_class))


def find(path: str | Path) -> Path:
    """Returns the checkpoint a user means: a checkpoint itself, or the best or last of a run."""
    path = Path(path)
    if (path / "files.json").exists():
        chosen = [path]
    else:
        run_folder.load(path)
        chosen = [path / "checkpoints" / "best"]
        chosen += sorted((path / "checkpoints").glob("step-*"), reverse=True)
        chosen = [p for p in chosen if p.exists()]
    if not chosen:
        raise UserError(f"{path}: the run has no checkpoint yet")
    for candidate in chosen:
        problem = damage(candidate)
        if problem is None:
            return candidate
        print(f"{candidate.name} is damaged ({problem})", flush=True)
    raise UserError(f"{path}: no checkpoint is intact")


def damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, None when they are as written."""
    try:
        files = json.loads((path / "files.json").read_text())
    except (OSError, ValueError):
        return "files.json is missing or unreadable"
    for name, (size, crc) in files.items():
        try:
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, {size} were written"
            if _crc(path / name) != crc:
                return f"{name} has changed"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists: arrays and bytes to arrays.npz, the rest to state.json."""
    arrays: dict[str, np.ndarray] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, bytes):
            arrays[f"a{len(arrays)}"] = np.frombuffer(value, np.uint8)
            return {"__bytes__": f"a{len(arrays) - 1}"}
        if isinstance(value, np.ndarray):
            arrays[f"a{len(arrays)}"] = value
            return {"__array__": f"a{len(arrays) - 1}"}
        if isinstance(value, np.generic):
            return value.item()
        return value

    text = json.dumps(plain(state))
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (folder / "state.json").write_text(text)


def read_state(folder: Path) -> dict[str, Any]:
    """Returns what write_state wrote."""
    with np.load(folder / "arrays.npz") as arrays:

        def rich(value: Any) -> Any:
            if isinstance(value, list):
                return [rich(v) for v in value]
            if isinstance(value, dict):
                if "__array__" in value:
                    return arrays[value["__array__"]]
                if "__bytes__" in value:
                    return arrays[value["__bytes__"]].tobytes()
                return {k: rich(v) for k, v in value.items()}
            return value

        return rich(json.loads((folder / "state.json").read_text()))


def _variables(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [variable for item in value for variable in _variables(item)]
    if isinstance(value, tf.Variable):
        return [value]
    return list(getattr(value, "variables", ()))


def _restore_variables(target: tf.train.Checkpoint, path: Path) -> Any:
    """Reads all variables of `target` from a checkpoint; returns TensorFlow's load status."""
    try:
        return target.read(str(path / "tf")).assert_existing_objects_matched()
    except (tf.errors.OpError, ValueError, AssertionError) as error:
        raise UserError(
            f"{path}: does not fit this configuration ({_first_line(error)})"
        ) from error


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = (path.stat().st_size, _crc(path))
    (folder / "files.json").write_text(json.dumps(files))
    _sync(folder / "files.json")
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _first_line(error: BaseException) -> str:
    text = getattr(error, "message", None) or getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0][:160]
