"""benchmarks/cuda.py, with the kernels on the CPU and a stand-in for the driver."""

import ctypes
import json
import subprocess

import numpy as np
import pytest

from benchmarks import cuda as benchmark
from benchmarks import cuda_driver


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    library = tmp_path / "libcuda.so"
    source = benchmark.ROOT / "tests/csrc/cuda_on_cpu/driver.c"
    subprocess.run(["g++", "-x", "c", "-O1", "-fPIC", "-shared", source, "-o", library], check=True)
    driver = ctypes.CDLL(str(library))
    monkeypatch.setattr(cuda_driver.Gpu, "graph", lambda self, launch: launch)
    monkeypatch.setattr(benchmark, "torch_contender", lambda *arguments: None)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_driver.ctypes, "CDLL", lambda name: driver)
        return cuda_driver.Gpu()


SMALL = [
    benchmark.Case("columns", (37, 8)),
    benchmark.Case("rows", (5, 33), 0),
    benchmark.Case("inner", (3, 7, 40), -2),
    benchmark.Case("whole", (65,), None),
    benchmark.Case("no elements", (0, 7)),
]


def test_right_kernels_pass(gpu, cuda, capsys):
    assert benchmark.check_all(gpu, cuda, SMALL) == 0
    assert capsys.readouterr().out == "checked 75 times against float64: 0 failures\n"


class Wrong:
    """The kernels, but for one thing."""

    def __init__(self, native, spoil):
        self.native, self.spoil = native, spoil

    def weight_norm(self, *arguments, **options):
        self.native.weight_norm(*arguments, **options)

    def weight_norm_grad(self, *arguments, out, **options):
        self.native.weight_norm_grad(*arguments, out=out, **options)
        self.spoil(out[0])


def change_a_value(array):
    values = array.numpy()
    values[0, 0] += 1e-5
    array.fill(values)


def write_too_far(array):
    ctypes.memset(array.pointer + array.nbytes, 0, 1)


def test_wrong_kernels_do_not(gpu, cuda):
    random = np.random.default_rng(0)

    def check(spoil):
        wrong = Wrong(cuda, spoil)
        return benchmark.check(gpu, wrong, SMALL[0], benchmark.TYPES[0], random)

    assert check(lambda array: None) == ""
    assert "grad_v differs by" in check(change_a_value)
    with pytest.raises(AssertionError, match="wrote outside"):
        check(write_too_far)


def test_times_are_written(gpu, cuda, tmp_path, capsys):
    benchmark.time_all(gpu, cuda, SMALL[:2], 2, tmp_path)
    results = json.loads((tmp_path / "cuda.json").read_text())["results"]
    assert len(results) == 8
    assert all(len(row["seconds"][name]) == 2 for row in results for name in ("ours", "copy"))
    assert capsys.readouterr().out.count("bfloat16") == 4


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.cuda"])

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    with pytest.raises(SystemExit, match="there is no GPU to run on: no NVIDIA driver"):
        benchmark.main()
