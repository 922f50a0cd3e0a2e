"""The modules under test: tfwn.native as built, and a build whose CUDA kernels run on the CPU."""

import fcntl
import hashlib
import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cpu():
    # By its suffix, because the bindings of other Pythons may be there too.
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return load("tfwn.native", ROOT / "tfwn" / f"native{suffix}")


@pytest.fixture(scope="session")
def cuda():
    import pybind11

    source = ROOT / "csrc"
    emulation = ROOT / "tests/csrc/cuda_on_cpu"
    command = [
        *("g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-w"),
        *("-DTFWN_CUDA", "-x", "c++"),
        '-DTFWN_TENSORFLOW_VERSION="2.21.0"',
        '-DTFWN_CUDA_VERSION="13.0"',
        '-DTFWN_CUDA_ARCHITECTURES="80,90"',
        *(f"-I{folder}" for folder in (emulation, source, pybind11.get_include())),
        f"-I{sysconfig.get_path('include')}",
        *(str(source / name) for name in ("python_bindings.cc", "weight_norm_cpu.cc")),
        *(str(source / "weight_norm_cuda.cu"), str(emulation / "cuda_on_cpu.cc")),
    ]
    inputs = [p for folder in (source, emulation) for p in sorted(folder.iterdir())]
    key = hashlib.sha256(b"".join([*map(str.encode, command), *(p.read_bytes() for p in inputs)]))
    path = ROOT / f"build/tests/native-{key.hexdigest()[:12]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:  # one test process builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_suffix(".part")
            subprocess.run([*command, "-o", str(part)], check=True)
            part.replace(path)
    return load("emulated.native", path)  # another name, because pybind11 caches modules by name
