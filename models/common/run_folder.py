"""The run folder: config.json, the lock, and which hyper-parameters --resume may change."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from models.common import files, metrics, options
from models.common.errors import UserError

# A command's argument: a run folder, or a checkpoint inside one.
RunPath = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]


class RunFolder:
    """The folder of a new or resumed run, locked until close()."""

    def __init__(self, config: options.RunConfig):
        self.path = Path(config.out)
        check(config)
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        with files.writing(self.path, "folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+")  # noqa: SIM115 closed by close()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            with self._lock:
                raise UserError(
                    f"--out {self.path} is in use by another process ({self._lock.read()}); wait "
                    "for it or name another folder"
                ) from None
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {platform.node()}")
        self._lock.flush()

    def close(self) -> None:
        """Releases the lock, and removes the folder if no run has begun in it."""
        if not (self.path / "config.json").exists():
            (self.path / "lock").unlink()
            for folder in self._made:
                with contextlib.suppress(OSError):  # It is not empty.
                    folder.rmdir()
        self._lock.close()

    def write_config(self, config: options.RunConfig, caveats: str = "", step: int = 0) -> None:
        """Writes config.json, which makes the folder a run folder.

        Args:
          config: the Config.
          caveats: limitations of the results.
          step: the step at which the session begins; changes after step 0 are recorded.
        """
        path = self.path / "config.json"
        before = load(self.path) if path.exists() else {}
        history, changed = before.get("sessions", []), before.get("changes", [])
        if step and (new := changes(load_config(self.path, type(config)), config)):
            changed.append(f"from step {step:,}: {', '.join(new.values())}")
        history.append(
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": " ".join(sys.orig_argv[1:]),
                "versions": versions(),
                "git": git_state(),
                "hardware": hardware(),
            }
        )
        content = {
            "program": program_of(type(config)),
            "config": dataclasses.asdict(config),
            "differs_from_paper": {
                name: {"paper": paper, "here": here}
                for name, (paper, here) in config.differences().items()
            },
            "caveats": caveats,
            "changes": changed,
            "sessions": history,
        }
        files.write_atomically(path, json.dumps(content, indent=2) + "\n")

    def write_diverged(self, error: str) -> None:
        """Records in config.json that the run diverged; resuming it removes the record."""
        path = self.path / "config.json"
        if path.exists():
            content = json.loads(path.read_text()) | {"diverged": error}
            files.write_atomically(path, json.dumps(content, indent=2) + "\n")


def outcome(config: options.SweepConfig) -> Literal["finished", "diverged", ""]:
    """Returns how the run in `config.out` ended, "" if it has not ended or does not exist."""
    folder = Path(config.out)
    if not (folder / "config.json").exists():
        return ""
    if load(folder).get("diverged"):
        return "diverged"
    # The last epoch is logged after the last checkpoint. The file rounds fractions to 8 digits.
    return "finished" if metrics.last(folder, "epoch") > config.last_epoch - 1e-6 else ""


def check(config: options.RunConfig) -> None:
    """Raises UserError if --out holds a run but --resume is missing, or the other way around."""
    if config.resume:
        load(config.out)
    elif (Path(config.out) / "config.json").exists():
        raise UserError(
            f"--out {config.out} already holds a run: continue it with --resume, "
            "or name another folder"
        )


def program_of(cls: type) -> str:
    """Returns the program that a Config belongs to: its module's name without ".config"."""
    spec = getattr(sys.modules[cls.__module__], "__spec__", None)
    return (spec.name if spec else cls.__module__).removesuffix(".config")


def load(path: str | Path) -> dict[str, Any]:
    """Returns the content of a run folder's config.json."""
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if not Path(path).is_dir():
            raise UserError(f"{path}: there is no such folder") from None
        raise UserError(f"{path}: not a run folder (it has no config.json)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: damaged ({error})") from None
    if not (isinstance(content, dict) and {"program", "config"} <= content.keys()):
        raise UserError(f"{path}: not a run folder (its config.json was not written by a run)")
    return content


def load_config(path: str | Path, config_class: type[options.RunConfig]) -> Any:
    """Returns a run's Config; fields that are newer than the run keep their defaults."""
    content = load(path)
    if content["program"] != program_of(config_class):
        raise UserError(
            f"{path} is a run of {content['program']}, not of {program_of(config_class)}"
        )
    saved: dict[str, Any] = content["config"]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        for name in (field.metadata.get("was"), field.name):
            if name in saved:
                value = saved[name]
                values[field.name] = tuple(value) if isinstance(value, list) else value
    return config_class(**values)


def changes(saved: options.RunConfig, config: options.RunConfig) -> dict[str, str]:
    """Returns {field: "--steps was 1 and is now 2"} for changed fields that are not "free"."""
    found = {}
    for field in dataclasses.fields(config):
        before, now = getattr(saved, field.name), getattr(config, field.name)
        if field.metadata.get("resume") != "free" and before != now:
            flag = options.flag_of(field.name)
            found[field.name] = f"{flag} was {options.show(before)} and is now {options.show(now)}"
    return found


def refuse_changes(
    saved: options.RunConfig, config: options.RunConfig, where: str, besides: Collection[str] = ()
) -> None:
    """Raises UserError if a run would be resumed with changes that are not allowed.

    Args:
      saved, config: the run's Config before and now.
      where: the beginning of the error message.
      besides: fields to ignore.
    """
    changed = {n: text for n, text in changes(saved, config).items() if n not in besides}
    roles = {field.name: field.metadata.get("resume") for field in dataclasses.fields(config)}
    if never := [text for name, text in changed.items() if roles[name] == "never"]:
        raise UserError(
            f"{where}: {', '.join(never)}, which cannot change within a run; keep the earlier "
            "value, or start anew in another --out"
        )
    if changed and not config.accept_changes:
        raise UserError(
            f"{where}: {', '.join(changed.values())}; keep the earlier value, or give "
            "--accept-changes to continue with the new one"
        )


def versions() -> dict[str, str]:
    """Returns the versions of the software that a run's numbers depend on."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("tensorflow", "keras", "numpy", "ale-py", "gymnasium", "tensorflow-weight-norm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state() -> dict[str, Any]:
    """Returns the source tree's commit and whether it has uncommitted changes; {} outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {}


def hardware() -> dict[str, Any]:
    """Returns the machine's processor, cores, memory and GPUs."""
    found: dict[str, Any] = {"cpu": platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        found["cpu"] = names[0] if names else found["cpu"]
        bytes_of_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory_gib"] = round(bytes_of_memory / 2**30, 1)
    if "tensorflow" in sys.modules:
        config = sys.modules["tensorflow"].config
        details = map(config.experimental.get_device_details, config.list_physical_devices("GPU"))
        found["gpus"] = [gpu.get("device_name", "unknown") for gpu in details]
    return found
