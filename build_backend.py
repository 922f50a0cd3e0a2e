"""PEP 517 backend: setuptools, plus TensorFlow as a build requirement if none is installed.

The op must be built against the TensorFlow that it will run in. An isolated build cannot see that
TensorFlow, so a process that runs outside the isolation looks for it.
"""

import functools
import glob
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change

SUPPORTED = "tensorflow>=2.20,<2.22"

_PROBE = """
import importlib.util, json, sys
if importlib.util.find_spec("tensorflow") is None:
    sys.exit(3)
import tensorflow as tf
print(json.dumps([
    tf.__version__,
    tf.sysconfig.get_include(),
    tf.sysconfig.get_lib(),
    [f for f in tf.sysconfig.get_compile_flags() if not f.startswith(("-I", "-std", "--std"))],
]))
"""


@dataclass(frozen=True)
class TensorFlow:
    """A TensorFlow to build against."""

    version: str
    include: str
    lib: str
    compile_flags: tuple[str, ...]
    installed: bool  # in the user's environment, not only in the build's

    @property
    def requirement(self) -> str:
        """The versions that can load a library built against this one: same minor, any patch."""
        major, minor = map(int, self.version.split(".")[:2])
        return f">={major}.{minor},<{major}.{minor + 1}"


def _probe(environment: dict[str, str], *, installed: bool) -> TensorFlow | None:
    environment = environment | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    # Not run in this directory, where a folder named tensorflow would be imported.
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, cwd="/", capture_output=True, text=True
    )
    if done.returncode == 3:
        return None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SystemExit(f"tfwn: the installed TensorFlow cannot be imported: {last}")
    version, include, lib, flags = json.loads(done.stdout.splitlines()[-1])
    return TensorFlow(version, include, lib, tuple(flags), installed)


@functools.cache
def find_tensorflow() -> TensorFlow | None:
    """Returns the user's TensorFlow, or else the build environment's, or else None."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    outside = {name: value for name, value in os.environ.items() if name not in hidden}
    return _probe(outside, installed=True) or _probe(dict(os.environ), installed=False)


def _build_requirements() -> list[str]:
    return [] if find_tensorflow() else [SUPPORTED]


def get_requires_for_build_wheel(config_settings=None):
    """Adds TensorFlow to setuptools' requirements if none is installed."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _build_requirements()


def get_requires_for_build_editable(config_settings=None):
    """Adds TensorFlow to setuptools' requirements if none is installed."""
    return build_meta.get_requires_for_build_editable(config_settings) + _build_requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Empties build/lib first, because setuptools would ship what an earlier build left there."""
    for old in glob.glob("build/lib*"):
        shutil.rmtree(old)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
