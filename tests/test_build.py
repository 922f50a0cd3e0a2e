"""Tests setup.py and build_backend.py: a wheel's contents and requirements, and refused builds."""

import email
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile

import pytest
import tensorflow as tf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from setuptools import Distribution

import build_backend
import tfwn

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup_module():
    spec = importlib.util.spec_from_file_location("tfwn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requires_tensorflow_where_there_is_none(monkeypatch):
    monkeypatch.setattr(build_backend, "find_tensorflow", lambda: None)
    assert build_backend.SUPPORTED in build_backend.requirements()["install_requires"]


def test_requires_the_tensorflow_of_an_isolated_build(monkeypatch):
    of_the_build = build_backend.TensorFlow("2.20.1", "", "", (), installed=False)
    monkeypatch.setattr(build_backend, "find_tensorflow", lambda: of_the_build)
    assert "tensorflow>=2.20,<2.21" in build_backend.requirements()["install_requires"]


def test_finds_the_installed_tensorflow_past_a_build_environment(monkeypatch):
    """An isolated build must still see the TensorFlow that is installed outside of it."""
    for name, value in {"PYTHONPATH": "/nowhere", "PYTHONNOUSERSITE": "1"}.items():
        monkeypatch.setenv(name, value)
    build_backend.find_tensorflow.cache_clear()
    found = build_backend.find_tensorflow()
    assert found.installed
    assert found.version == tf.__version__


def test_a_folder_without_tensorflow_is_no_tensorflow(tmp_path):
    """pip leaves a folder behind if an uninstalled package has written files there."""
    (tmp_path / "tensorflow").mkdir()
    probe = [sys.executable, "-S", "-c", build_backend._PROBE]
    done = subprocess.run(probe, env={"PYTHONPATH": str(tmp_path)}, cwd="/")
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("version", "supported"),
    [("2.19.1", False), ("2.20.0", True), ("2.21.1", True), ("2.22.0-rc0", False), ("3.20", False)],
)
def test_only_supported_tensorflows_are_built_for(setup_module, monkeypatch, version, supported):
    installed = build_backend.TensorFlow(version, "", "", (), installed=True)
    monkeypatch.setattr(setup_module, "find_tensorflow", lambda: installed)
    monkeypatch.delenv("TFWN_TENSORFLOW", raising=False)
    missing = setup_module.missing_tools()
    assert len(missing) == (not supported)
    if missing:
        assert version in missing[0]
        assert f"pip install '{build_backend.SUPPORTED}'" in missing[0]


@pytest.mark.parametrize("extra", ["models", "benchmark"])
def test_an_extra_holds_what_its_programs_import(extra):
    folders = {"models": ["models"], "benchmark": ["models", "benchmarks"]}[extra]
    files = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    imports = r"^(?:import|from) (\w+)"
    names = {n for f in files for n in re.findall(imports, f.read_text(), re.MULTILINE)}
    names -= sys.stdlib_module_names | {"tfwn", "models", "benchmarks"}
    names -= {"tensorflow", "numpy", "ml_dtypes"}  # TensorFlow requires the others.
    assert {"tyro", "rich"} <= names
    required = {Requirement(text).name.replace("-", "_") for text in build_backend.EXTRAS[extra]}
    assert names <= required


@pytest.mark.parametrize("compiler", ["no-such-compiler", "no-such-compiler g++"])
def test_no_compiler(compiler):
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=ROOT,
        env=os.environ | {"CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "tfwn: no C++ compiler: no-such-compiler not found. Install g++, or set CXX"
    )


def test_all_that_is_missing_is_named_at_once(setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "CXX", ["no-such-compiler"])
    monkeypatch.setattr(setup_module, "find_tensorflow", lambda: None)
    monkeypatch.setattr(setup_module, "PYTHONS", [setup_module.Python("cp311", ".so", "/nowhere")])
    monkeypatch.delenv("TFWN_TENSORFLOW", raising=False)
    monkeypatch.setattr(setup_module.sys, "platform", "darwin")
    monkeypatch.setattr(setup_module.importlib.util, "find_spec", lambda name: None)
    system, pybind11, compiler, headers, tensorflow = setup_module.missing_tools()
    assert "needs Linux" in system
    assert "pip install 'pybind11" in pybind11
    assert "no-such-compiler" in compiler
    assert "Python.h in /nowhere" in headers
    assert "python3.11-dev" in headers
    assert setup_module.SUPPORTED in tensorflow


def test_nothing_is_missing_here(setup_module):
    """The check must not report a missing tool on a machine that builds tfwn."""
    assert setup_module.missing_tools() == []


def test_a_python_that_cannot_run(setup_module):
    with pytest.raises(SystemExit, match="TFWN_PYTHONS must list Pythons, but /no/python fails"):
        setup_module.Python.of("/no/python")


@pytest.fixture
def two_pythons(setup_module, monkeypatch):
    here = setup_module.PYTHONS[0]
    other = setup_module.Python("cp39", ".cpython-39-x86_64-linux-gnu.so", "/other/include")
    monkeypatch.setattr(setup_module, "PYTHONS", [here, other])
    return here, other


def test_the_bindings_are_built_for_each_python_and_the_rest_once(setup_module, two_pythons):
    extensions = setup_module.extensions()
    build = setup_module.Build(Distribution({"name": "x", "ext_modules": extensions}))
    files = [build.get_ext_filename(ext.name) for ext in extensions]
    bindings = [f"tfwn/native{python.suffix}" for python in two_pythons]
    assert files == [*bindings, "tfwn/_ops.so", "tfwn/_xla.so"]
    sources = [source for ext in extensions for source in setup_module.labels(ext)]
    assert len(sources) == len(set(sources))  # No two share an object file.
    for ext, python in zip(extensions, two_pythons, strict=False):
        info = {"tensorflow": None, "cuda": None, "cuda_architectures": []}
        assert python.include in setup_module.Build.compile_flags(ext, None, info)


def test_a_wheel_names_the_pythons_whose_bindings_it_holds(setup_module, two_pythons, monkeypatch):
    distribution = Distribution({"name": "x", "ext_modules": setup_module.extensions()})
    wheel = setup_module.Wheel(distribution)
    wheel.finalize_options()
    python, abi, _ = wheel.get_tag()
    assert (python, abi) == (f"{two_pythons[0].tag}.cp39", "none")
    for number, abi_of_one in ((0, two_pythons[0].tag), (1, "none")):
        monkeypatch.setattr(setup_module, "PYTHONS", [two_pythons[number]])
        assert wheel.get_tag()[:2] == (two_pythons[number].tag, abi_of_one)


def test_another_python_or_tensorflow_sets_up_another_environment(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python"
    wanted = tmp_path / ".venv" / ".wanted"
    seen = set()
    for version in ("3.10.1", "3.11.2"):
        python.write_text(f"#!/bin/sh\necho Python {version}\n")
        python.chmod(0o755)
        for tensorflow in ("tensorflow>=2.21,<2.22", "tensorflow-cpu==2.20.*"):
            times = set()
            for _ in range(2):
                make = ["make", ".venv/.wanted", f"PYTHON={python}", f"TENSORFLOW={tensorflow}"]
                subprocess.run(make, cwd=tmp_path, check=True)
                times.add(wanted.stat().st_mtime_ns)
            assert len(times) == 1  # The second time, nothing has changed.
            assert wanted.read_text() == f"{tensorflow} for Python {version}\n"
            seen |= times
    assert len(seen) == 4


PROGRAM = """#!{python}
import os, signal, sys, time

def leave(*_):
    time.sleep(0.5)
    sys.exit("saved" if os.environ["STATUS"] == "1" else 130)

signal.signal(signal.SIGINT, leave)
print("training", flush=True)
time.sleep(60)
"""


def test_an_interrupted_demo_says_how_to_go_on(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    for status, goes_on in (("130", True), ("1", False)):
        process = subprocess.Popen(
            ["make", "-o", ".venv/.have-models", "demo"],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if "MAKE" not in k} | {"STATUS": status},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        told = process.stdout.readline() + process.stdout.readline()
        assert told.splitlines()[1] == "training"
        os.killpg(process.pid, signal.SIGINT)  # Like Ctrl-C: make, its shell and the program.
        told += process.communicate(timeout=60)[0]
        assert ("Run make demo again to continue\n" in told) == goes_on, told
        assert f"Error {status}" in told
        assert process.returncode != 0


def test_a_compiler_may_have_a_launcher_and_flags(tmp_path):
    code = "import setup; print(setup.CXX, setup.Cuda('nvcc').compile_command)"
    for name, text in (
        ("nvcc", "echo Cuda compilation tools, release 12.9, V12.9.0; echo compute_90"),
        ("ccache", 'exec "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"CXX": "ccache g++ -m64", "PATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("['ccache', 'g++', '-m64']"), done.stderr
    assert "'-ccbin=g++'" in done.stdout


def test_compiling_says_which_files_and_compiles_only_what_changed(
    setup_module, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(setup_module, "CACHE", tmp_path)
    sources = [tmp_path / name for name in ("a.cc", "b.cc")]
    for source in sources:
        source.write_text("int f() { return 1; }\n")
    commands = {str(source): setup_module.CXX for source in sources}
    objects = setup_module.compile_all(commands, "", 1)
    assert all(path.exists() for path in objects.values())
    lines = capsys.readouterr().out.splitlines()
    compiler = pathlib.Path(setup_module.CXX[0]).name
    assert lines[0] == f"Compiling 2 of 2 files with {compiler} (takes minutes)"
    assert [line.split(",")[0] for line in lines[1:]] == ["[1/2] a.cc", "[2/2] b.cc"]
    setup_module.compile_all(commands, "", 1)
    assert capsys.readouterr().out == ""
    later = objects[str(sources[1])].stat().st_mtime + 1
    os.utime(sources[1], (later, later))
    setup_module.compile_all(commands, "", 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["[1/1] b.cc"]


def test_the_first_error_of_the_compiler_is_told_at_once(setup_module, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_module, "CACHE", tmp_path)
    command = ["sh", "-c", f"echo $0 >> {tmp_path}/begun; echo no such type >&2; exit 1"]
    with pytest.raises(SystemExit, match="no such type\ntfwn: failed"):
        setup_module.compile_all({f"{letter}.cc": command for letter in "abcdefgh"}, "", 1)
    begun = (tmp_path / "begun").read_text().splitlines()
    assert 1 <= len(begun) <= 2  # The second may start before the first error is noticed.


def python(*arguments, **options):
    """Runs Python, which must succeed, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """A source distribution of this checkout without its build outputs."""
    checkout = tmp_path_factory.mktemp("sdist") / "checkout"
    built = (".git", ".venv", "build", "dist", "runs", "bazel-*", "*.egg-info", "*.so")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*built))
    build = "import build_backend; build_backend.build_sdist('dist')"
    python("-c", build, cwd=checkout)
    (path,) = (checkout / "dist").glob("*.tar.gz")
    return path


@pytest.mark.slow
def test_sdist_holds_the_checkout(sdist):
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git and a git checkout to list the tracked files")
    tracked = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.split()) - held == {".gitignore", ".pre-commit-config.yaml"}


# Computed by hand: ||v|| = 5, grad_g = 3 / 5, grad_v = 10 / 5 * ([1, 0] - grad_g / 5 * v).
USE = """
import numpy as np
import tensorflow as tf
import tfwn
import tfwn.native

def w_and_gradients(v, g):
    with tf.GradientTape() as tape:
        tape.watch([v, g])
        w = tfwn.weight_norm(v, g)
    return w, *tape.gradient(w, [v, g], tf.constant([[1.0], [0.0]]))

v, g = np.float32([[3], [4]]), np.float32([10])
compiled = (tf.function(w_and_gradients, jit_compile=jit) for jit in (False, True))
for function in (w_and_gradients, *compiled):
    w, grad_v, grad_g = function(tf.constant(v), tf.constant(g))
    np.testing.assert_allclose(w, [[6], [8]], rtol=1e-6)
    np.testing.assert_allclose(grad_v, [[1.28], [-0.96]], rtol=1e-6)
    np.testing.assert_allclose(grad_g, [0.6], rtol=1e-6)
np.testing.assert_allclose(tfwn.native.weight_norm(v, g)[0], [[6], [8]], rtol=1e-6)
print(tfwn.__file__, tfwn.native.build_info()["tensorflow"])
"""


@pytest.mark.slow
def test_wheel(sdist, tmp_path):
    """A wheel built from the source distribution has the right contents and works."""
    parts = {"TFWN_CUDA": "0", "TFWN_TENSORFLOW": "1", "TFWN_XLA": "1"}
    options = ["--quiet", "--no-index", "--no-deps"]
    build = ["wheel", *options, "--no-build-isolation", "--wheel-dir", tmp_path, sdist]
    python("-m", "pip", *build, cwd=tmp_path, env=os.environ | parts)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = email.message_from_bytes(archive.read(metadata))
    assert headers["Version"] == tfwn.__version__
    libraries = {"_ops.so", "_xla.so", f"native{importlib.machinery.EXTENSION_SUFFIXES[0]}"}
    others = {"_build_info.json", "native.pyi", "py.typed"}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("tfwn/**/*.py")}
    held = {name for name in names if not name.startswith(metadata.partition("/")[0])}
    assert held == sources | {f"tfwn/{name}" for name in libraries | others}

    # TensorFlow is pinned in extras only, so that pip never replaces an installed tensorflow-cpu.
    requires = [Requirement(text) for text in headers.get_all("Requires-Dist")]
    assert [str(r) for r in requires if r.marker is None] == ["numpy"]
    minor = int(tf.__version__.split(".")[1])
    for extra in ("tensorflow", "tensorflow-cpu", "and-cuda"):
        (pinned,) = (r for r in requires if r.marker and r.marker.evaluate({"extra": extra}))
        assert pinned.name == ("tensorflow" if extra == "and-cuda" else extra)
        assert pinned.specifier == SpecifierSet(f">=2.{minor},<2.{minor + 1}")

    site = tmp_path / "site"
    python("-m", "pip", "install", *options, "--target", site, wheel)
    environment = os.environ | {"PYTHONPATH": str(site)}
    printed = python("-W", "error", "-c", USE, cwd=tmp_path, env=environment)
    assert printed.split() == [str(site / "tfwn" / "__init__.py"), tf.__version__]
