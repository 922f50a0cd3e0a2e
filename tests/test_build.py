"""setup.py and build_backend.py: what a wheel requires, which GPUs, and what a build refuses."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("tfwn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requires_tensorflow_where_there_is_none(setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "find_tensorflow", lambda: None)
    assert setup_module.SUPPORTED in setup_module.requirements()["install_requires"]


def test_requires_the_tensorflow_of_an_isolated_build(setup_module, monkeypatch):
    of_the_build = setup_module.TensorFlow("2.20.1", "", "", (), installed=False)
    monkeypatch.setattr(setup_module, "find_tensorflow", lambda: of_the_build)
    assert "tensorflow>=2.20,<2.21" in setup_module.requirements()["install_requires"]


def test_finds_the_installed_tensorflow_past_a_build_environment(setup_module, monkeypatch):
    for name, value in {"PYTHONPATH": "/nowhere", "PYTHONNOUSERSITE": "1"}.items():
        monkeypatch.setenv(name, value)
    setup_module.find_tensorflow.cache_clear()
    found = setup_module.find_tensorflow()
    assert found.installed
    assert found.version == tf.__version__


@pytest.fixture
def nvcc(tmp_path):
    """A compiler that knows its version and architectures, listed out of order as nvcc's are."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        "#!/bin/sh\n"
        "case $1 in\n"
        "--version) echo 'Cuda compilation tools, release 12.9, V12.9.41';;\n"
        "--list-gpu-arch) printf 'compute_%s\\n' 50 75 80 86 90 100 110 103 120;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return str(path)


def test_cuda_architectures_by_default(setup_module, nvcc, monkeypatch):
    monkeypatch.delenv("TFWN_CUDA_ARCHITECTURES", raising=False)
    cuda = setup_module.Cuda(nvcc)
    assert cuda.version == "12.9"
    assert cuda.architectures == [75, 80, 90, 100, 110, 120]
    codes = [flag for flag in cuda.compile_command if flag.startswith("-gencode")]
    assert codes[0] == "-gencode=arch=compute_75,code=sm_75"
    assert codes[-2:] == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_cuda_architectures_chosen(setup_module, nvcc, monkeypatch):
    monkeypatch.setenv("TFWN_CUDA_ARCHITECTURES", "90;86")
    assert setup_module.Cuda(nvcc).architectures == [86, 90]


def test_cuda_architecture_unknown_to_nvcc(setup_module, nvcc, monkeypatch):
    monkeypatch.setenv("TFWN_CUDA_ARCHITECTURES", "90 130")
    with pytest.raises(SystemExit, match=r"names \[130\], which .*nvcc \(12.9\) does not know"):
        setup_module.Cuda(nvcc)


def test_cuda_off(setup_module, nvcc, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_HOME", str(pathlib.Path(nvcc).parents[1]))
    assert setup_module.Cuda.find().version == "12.9"
    monkeypatch.setenv("TFWN_CUDA", "0")
    assert setup_module.Cuda.find() is None


def test_no_compiler():
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "tfwn: no C++ compiler: no-such-compiler not found. Install g++, or set CXX"
    )
