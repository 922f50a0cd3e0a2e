"""The package's requirements, and a PEP 517 backend that adds TensorFlow to setuptools' own.

The op must be built against the TensorFlow that it will run in. An isolated build cannot see that
TensorFlow, so a process that runs outside the isolation looks for it. If there is none, TensorFlow
becomes a build requirement.
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

MINORS = range(20, 22)  # of TensorFlow 2
SUPPORTED = f"tensorflow>=2.{MINORS.start},<2.{MINORS.stop}"

# The paper's experiments (models/, run from a checkout).
MODELS = [
    "tensorflow-datasets>=4.9.8",  # CIFAR-10 and MNIST
    "importlib_resources",  # tensorflow-datasets imports it without requiring it
    "ale-py>=0.11",  # Atari games, ROMs included
    "gymnasium>=1.1",  # the games' interface
    "tyro>=1.0",  # command lines
    "rich>=13.9",  # progress lines and tables
    "matplotlib>=3.9",  # the paper's figures
    "imageio>=2.36",  # videos of games, GIFs of canvases
    "tensorboard>=2.20",  # training curves
]
# Optional dependencies. The layers alone need only TensorFlow and NumPy.
EXTRAS = {
    "models": MODELS,
    "benchmark": [
        *MODELS,  # the programs that are timed
        "torch==2.13.0",  # the op's peer
        "stable-baselines3>=2.7",  # DQN's peer
        "opencv-python-headless>=4.10",  # its games' frames
    ],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",  # parallel tests
        "hypothesis>=6.115",  # random shapes, types and magnitudes
        "keras>=3.10",  # the layers' counterparts
        "dm-sonnet>=2.0.2",  # modules to reparameterize
    ],
    "dev": [
        "ruff>=0.14",  # lint and format
        "mypy>=1.18",  # types
        "clang-format>=20",  # C++ and CUDA format
        "build>=1.2",  # wheels
        "setuptools>=77",  # builds in place, without isolation
        "pybind11>=2.13",  # likewise
    ],
}

_PROBE = """
import importlib.util, json, sys
spec = importlib.util.find_spec("tensorflow")
if spec is None or spec.origin is None:  # None, or a folder that pip left behind
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
    def supported(self) -> bool:
        """Whether the sources are known to compile and work with this version."""
        major, minor = self.version.split(".")[:2]
        return major == "2" and int(minor) in MINORS

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
        raise SystemExit(
            f"tfwn: the installed TensorFlow cannot be imported: {last}. Repair or uninstall it"
        )
    version, include, lib, flags = json.loads(done.stdout.splitlines()[-1])
    return TensorFlow(version, include, lib, tuple(flags), installed)


@functools.cache
def find_tensorflow() -> TensorFlow | None:
    """Returns the user's TensorFlow, or else the build environment's, or else None."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    outside = {name: value for name, value in os.environ.items() if name not in hidden}
    return _probe(outside, installed=True) or _probe(dict(os.environ), installed=False)


def requirements() -> dict:
    """Returns the package's requirements, which depend on the TensorFlow that is installed.

    The op runs only on the minor version that it was built for. However, requiring `tensorflow`
    would make pip install it over an existing `tensorflow-cpu`, or vice versa, and a requirement
    cannot name alternatives. So a wheel built with an installed TensorFlow pins the version in
    extras only, and the import checks it. Without one, the wheel requires `tensorflow` itself.
    """
    tensorflow = find_tensorflow()
    if tensorflow is None:
        return {"install_requires": ["numpy", SUPPORTED], "extras_require": EXTRAS}
    pins = {
        "tensorflow": [f"tensorflow{tensorflow.requirement}"],
        "tensorflow-cpu": [f"tensorflow-cpu{tensorflow.requirement}"],
        "and-cuda": [f"tensorflow[and-cuda]{tensorflow.requirement}"],
    }
    install = ["numpy"] if tensorflow.installed else ["numpy", *pins["tensorflow"]]
    return {"install_requires": install, "extras_require": pins | EXTRAS}


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
