"""Tests how setup.py finds nvcc, its architectures and CUDA's headers."""

import os
import pathlib
import subprocess

import pytest

import setup as build

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def nvcc(tmp_path):
    """A fake nvcc that reports its version and, out of order like nvcc, its architectures."""
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


def test_cuda_architectures_by_default(nvcc, monkeypatch):
    monkeypatch.delenv("TFWN_CUDA_ARCHITECTURES", raising=False)
    cuda = build.Cuda(nvcc)
    assert cuda.version == "12.9"
    assert cuda.architectures == [75, 80, 90, 100, 110, 120]
    codes = [flag for flag in cuda.compile_command if flag.startswith("-gencode")]
    assert codes[0] == "-gencode=arch=compute_75,code=sm_75"
    assert codes[-2:] == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_cuda_architectures_chosen(nvcc, monkeypatch):
    monkeypatch.setenv("TFWN_CUDA_ARCHITECTURES", "90;86")
    assert build.Cuda(nvcc).architectures == [86, 90]


def test_cuda_architecture_unknown_to_nvcc(nvcc, monkeypatch):
    monkeypatch.setenv("TFWN_CUDA_ARCHITECTURES", "90 130")
    with pytest.raises(SystemExit, match=r"names \[130\], which .*nvcc \(12.9\) does not know"):
        build.Cuda(nvcc)


def test_cuda_architecture_with_too_little_shared_memory(nvcc, monkeypatch):
    monkeypatch.setenv("TFWN_CUDA_ARCHITECTURES", "50;90")
    with pytest.raises(SystemExit, match=r"names \[50\].*70"):
        build.Cuda(nvcc)


@pytest.mark.parametrize("words", ["native", "8.9", "80;90a"])
def test_cuda_architectures_that_are_no_numbers(nvcc, monkeypatch, words):
    monkeypatch.setenv("TFWN_CUDA_ARCHITECTURES", words)
    with pytest.raises(SystemExit, match="must list numbers, such as 80;90, but names"):
        build.Cuda(nvcc)


def test_an_unusable_nvcc(nvcc):
    pathlib.Path(nvcc).write_text("#!/bin/sh\necho release 10.2,\ntest $1 = --version\n")
    with pytest.raises(SystemExit, match=r"nvcc does not run, or is older.*TFWN_CUDA=0"):
        build.Cuda(nvcc)


def test_a_failure_of_nvcc_names_the_ways_out(nvcc, tmp_path):
    pathlib.Path(nvcc).write_text("#!/bin/sh\necho unsupported GNU version >&2; exit 1\n")
    with pytest.raises(SystemExit, match=r"unsupported GNU version\n.*TFWN_CUDA=0"):
        build.run([nvcc], tmp_path / "a.o")


def test_cuda_in_usr_does_not_hide_the_c_headers(tmp_path):
    """Debian's own packages put CUDA's headers into /usr/include."""
    source = tmp_path / "a.cc"
    source.write_text("#include <cstdlib>\n")
    flags = build.search("/usr/include", str(tmp_path))
    assert flags == ["-isystem", str(tmp_path)]
    subprocess.run([*build.CXX, *flags, "-fsyntax-only", source], check=True)


def test_cuda_from_conda(nvcc, tmp_path):
    target = tmp_path / "cuda" / "targets" / f"{os.uname().machine}-linux"
    for file in ("include/cuda_runtime_api.h", "lib/libcudart_static.a"):
        (target / file).parent.mkdir(parents=True)
        (target / file).touch()
    cuda = build.Cuda(nvcc)
    assert str(target) in cuda.folders
    assert f"-L{target}/lib" in cuda.link_flags


def test_cuda_off(nvcc, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_HOME", str(pathlib.Path(nvcc).parents[1]))
    monkeypatch.delenv("TFWN_CUDA", raising=False)
    assert build.Cuda.find().version == "12.9"
    monkeypatch.setenv("TFWN_CUDA", "0")
    assert build.Cuda.find() is None
