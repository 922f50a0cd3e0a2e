"""Tests benchmarks/cuda.py with the kernels emulated on the CPU and a fake CUDA driver."""

import ctypes
import json
import subprocess
import sysconfig

import numpy as np
import pytest

from benchmarks import cuda as benchmark
from benchmarks import cuda_checks, cuda_driver, timing
from benchmarks.cuda_checks import FLOAT, TYPES, Case


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
    Case("columns", (37, 8)),
    Case("odd columns", (37, 9)),
    Case("rows", (5, 33), 0),
    Case("inner", (3, 7, 40), -2),
    Case("whole", (65,), None),
    Case("no elements", (0, 7)),
]


def test_right_kernels_pass(gpu, cuda, capsys):
    assert cuda_checks.check_all(gpu, cuda, SMALL, edges=True) == 0
    *left_out, checked = capsys.readouterr().out.splitlines()
    settings = len(TYPES) + 3 + 4
    edges = len(cuda_checks.EDGES) * 4 * 4 + 3 * 4 + 2
    assert checked.startswith(f"checked {len(SMALL) * settings + edges} times")
    (reason,) = left_out
    assert reason.startswith("more than 2^31 elements: left out: it needs 16,4")


def test_large_weights(gpu, cuda, monkeypatch):
    monkeypatch.setattr(gpu, "free_bytes", lambda: 1 << 40)
    random = np.random.default_rng(0)
    assert cuda_checks.check_large(gpu, cuda, random, least=(1 << 15) + 1) == ""

    def change_the_last(array):
        array.write(np.zeros(2, np.uint8), array.nbytes - 2)

    wrong = Wrong(cuda, change_the_last)
    assert "a copy of the block" in cuda_checks.check_large(gpu, wrong, random, least=(1 << 15) + 1)


class Wrong:
    """The kernels, except that each backward pass spoils its grad_v."""

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
    inputs = cuda_checks.random_inputs(SMALL[0], TYPES[0], np.random.default_rng(0))

    def check(spoil):
        return cuda_checks.check(gpu, Wrong(cuda, spoil), SMALL[0], inputs)

    assert check(lambda array: None) == ""
    assert "grad_v differs by" in check(change_a_value)
    with pytest.raises(AssertionError, match="wrote outside"):
        check(write_too_far)


def leave_noise(array):
    values = array.numpy()
    values[:] = np.where(values == 0, 1e-12, values)
    array.fill(values)


def test_noise_where_a_gradient_is_zero_is_wrong(gpu, cuda):
    wrong = set()
    for what, case, inputs in cuda_checks.edge_inputs(np.random.default_rng(0)):
        if inputs[0].dtype == FLOAT and what not in ("NaN", "infinity"):
            assert cuda_checks.check_edge(gpu, cuda, what, case, inputs) == ""
            found = cuda_checks.check_edge(gpu, Wrong(cuda, leave_noise), what, case, inputs)
            if found:
                wrong.add(what)
    assert wrong == {"zero unit", "one element is not zero", "single element"}


def test_one_failure_does_not_end_the_checks(gpu, cuda, capsys):
    def fail(array):
        raise RuntimeError("CUDA: no luck")

    assert cuda_checks.check_all(gpu, Wrong(cuda, fail), SMALL[:2], edges=False) == 34
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith("RuntimeError: CUDA: no luck")]) == 34


def test_infinities_and_nan_are_compared_by_place():
    truth = np.array([1.0, np.inf, np.nan])
    assert cuda_checks.error_of(truth.astype(FLOAT), truth, 0) == 0
    for other in ([1, -np.inf, np.nan], [1, np.inf, 0], [np.nan, np.inf, np.nan]):
        assert cuda_checks.error_of(np.array(other, FLOAT), truth, 0) == np.inf


def test_the_sum_of_two_tensors(gpu):
    a, b = np.arange(1000, dtype=np.uint32), np.full(1000, 7, np.uint32)
    to = gpu.array(np.zeros_like(a))
    gpu.add(to, gpu.array(a), gpu.array(b), a.nbytes)
    assert np.array_equal(to.numpy(), a + b)


def test_times_are_written(gpu, cuda, tmp_path, capsys, monkeypatch):
    measure = benchmark.measure

    def fail_once(gpu, native, case, kind, backward, rounds):
        if case.name == "columns" and kind is FLOAT and backward:
            raise RuntimeError("no luck")
        if case.name == "odd columns" and backward:  # earlier rows are on disk by now
            assert json.loads((tmp_path / "cuda.json").read_text())["results"]
        return measure(gpu, native, case, kind, backward, rounds)

    monkeypatch.setattr(benchmark, "measure", fail_once)
    assert benchmark.time_all(gpu, cuda, SMALL[:2], 2, tmp_path) == 1
    results = json.loads((tmp_path / "cuda.json").read_text())["results"]
    assert len(results) == 7
    assert all(len(row["seconds"][name]) == 2 for row in results for name in ("ours", "copy"))
    output = capsys.readouterr().out
    assert output.count("bfloat16") == 4
    assert "FAILED: RuntimeError: no luck" in output


def test_slow_rows_end_early(gpu, cuda, monkeypatch):
    monkeypatch.setattr(benchmark, "ROW_SECONDS", 0.0)
    times = benchmark.measure(gpu, cuda, SMALL[0], FLOAT, False, 50)
    assert len(times.seconds["ours"]) == 3


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert timing.describe_machine()["commit"] == ""


def test_builds_for_this_python_and_this_gpu(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(
        benchmark.subprocess, "run", lambda *a, **options: calls.append((a, options)) or done
    )
    path = benchmark.build(90)
    assert path.name == f"native{sysconfig.get_config_var('EXT_SUFFIX')}"
    ((_, options),) = calls
    assert options["env"]["TFWN_CUDA_ARCHITECTURES"] == "90"
    assert not (options["cwd"] / "pyproject.toml").exists()
    assert (options["cwd"] / "csrc").is_symlink()


def test_a_wrong_case_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.cuda", "--case", "typo"])
    with pytest.raises(SystemExit, match=r"--case must be .* 'typo'.*LSTM 1040x1024"):
        benchmark.main()


def test_a_file_that_is_no_module_is_refused(tmp_path):
    path = tmp_path / "native.so"
    path.write_bytes(b"not one")
    with pytest.raises(SystemExit, match=r"native\.so does not load in Python"):
        benchmark.load(path)
    with pytest.raises(SystemExit, match="--native must name a native"):
        benchmark.load(tmp_path / "native.txt")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.cuda"])

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    with pytest.raises(SystemExit, match="there is no GPU to run on: no NVIDIA driver"):
        benchmark.main()
