"""Checks that the documentation's snippets and commands run and that what it names exists."""

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = ROOT / "docs" / "run-the-experiments.md"
COMMON = ROOT / "models" / "common" / "README.md"  # models/conftest.py runs its snippet.
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), COMMON])
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Commands that are not run here, with the reason or with where they are tested.
NOT_RUN = {
    "pip install .": "compiles for minutes; tests/test_build.py installs a wheel instead",
    "pip install dist/tensorflow_weight_norm-*+tf2.21-*.whl": "`make test-wheel` does it",
    "make wheels": "takes many minutes; `make wheel` does it for one TensorFlow",
    "make test-wheels": "takes many minutes; `make test-wheel` does it for one Python",
    "python setup.py build_ext --inplace": "compiles; `make test` does it before the tests",
    "make demo": "takes minutes; tests/models/test_dqn_training.py tests its program",
    "make test": "runs these tests",
    'make test TENSORFLOW="tensorflow-cpu==2.20.*" PYTHON=python3.10': "needs another Python",
    "PYTHON=$PWD/.venv/bin/python bazel build :all": "needs Bazel",
    "nvcc -I. -std=c++17 -O3 -arch=sm_90 -Xptxas -v -c csrc/weight_norm_cuda.cu -o kernels.o": (
        "needs nvcc; prints a table"
    ),
    "python -m benchmarks.cuda": "needs a GPU; tests/csrc/test_cuda_benchmark.py fakes one",
}

# Sizes in snippets that train for minutes, and their replacements that run in seconds.
SMOKE = {
    "tutorial.md": {"EPOCHS = 5": "EPOCHS = 2", "EXAMPLES = 50_000": "EXAMPLES = 1000"},
    "causal-convolutions.md": {
        "STEPS = 100": "STEPS = 20",
        "EXAMPLES = 10_000": "EXAMPLES = 200",
        "EPOCHS = 10": "EPOCHS = 1",
        "range(4)": "range(2)",
    },
    "vocoders.md": {"CHANNELS = 512": "CHANNELS = 32"},
}
NEEDS = {"causal-convolutions.md": "tcn", "vocoders.md": "torch"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    """Returns the page's commands, except those that start several processes at once."""
    lines = "\n".join(b for b in blocks(page, "sh") if "TF_CONFIG" not in b)
    lines = lines.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pages_with(language):
    pages = [page for page in PAGES if page != COMMON and blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def programs():
    """Returns the Config of each program in models/ by the program's name."""
    paths = ROOT.glob("models/*/config.py")
    return {
        path.parent.name: importlib.import_module(f"models.{path.parent.name}.config").Config
        for path in paths
    }


@pages_with("python")
def test_snippets_run(page, tmp_path, monkeypatch, request):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    text = "\n".join(blocks(page, "python"))
    sizes = dict(SMOKE.get(page.name, {}))
    if "DATA_DIR = None" in text:
        sizes["DATA_DIR = None"] = f"DATA_DIR = {str(request.getfixturevalue('data_dir'))!r}"
    for full, small in sizes.items():
        assert text.count(full) == 1, full
        text = text.replace(full, small)
    script = tmp_path / f"{page.stem}.py"  # AutoGraph needs a source file.
    script.write_text(text)
    runpy.run_path(str(script))


@pages_with("sh")
def test_commands_run(page, tmp_path, monkeypatch):
    """Runs a page's commands in order in one folder, and programs with the preset `smoke`."""
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if command not in NOT_RUN:
            python, option, module, *words = shlex.split(command)
            assert (python, option) == ("python", "-m"), f"add to NOT_RUN: {command}"
            assert run_module(module, as_smoke(module, words), monkeypatch) == 0, command


def run_module(module, words, monkeypatch):
    """Does what `python -m module words` does without importing TensorFlow again."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        for name in (module, f"{module}.__main__"):  # runpy warns if it is loaded already.
            patch.delitem(sys.modules, name, raising=False)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            return error.code or 0
    return 0


def as_smoke(module, words):
    """Makes a training run small: preset `smoke`, one rate and seed; returns others unchanged."""
    trains = module.removeprefix("models.") in programs() and words[0].startswith("-")
    if not trains or "--resume" in words or "--help" in words:
        return words
    if "--sweep" in words:
        words += ["--learning-rates", "0.003", "--seeds", "0"]
    if "--preset" in words:
        words[words.index("--preset") + 1] = "smoke"
        return words
    return [*words, "--preset", "smoke"]


@pytest.mark.slow
def test_several_processes(tmp_path):
    """Runs the block with TF_CONFIG in a shell, with free ports and the preset `smoke`."""
    (block,) = [b for b in blocks(EXPERIMENTS, "sh") if "TF_CONFIG" in b]
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    for port, free in zip(("12345", "12346"), sockets, strict=True):
        assert port in block
        block = block.replace(port, str(free.getsockname()[1]))
        free.close()
    block = block.replace("python ", f"{sys.executable} ").replace("--preset cpu", "--preset smoke")
    done = subprocess.run(
        ["bash", "-ec", block + "wait $!"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "epoch 2" in done.stdout
    assert list(tmp_path.glob("runs/two/checkpoints/step-*"))


def test_commands_that_are_not_run_are_documented():
    assert set(NOT_RUN) <= {command for page in PAGES for command in commands(page)}


def test_all_programs_are_documented():
    text = EXPERIMENTS.read_text()
    for name in programs():
        assert f"python -m models.{name} --" in text, f"{EXPERIMENTS.name} does not run {name}"


def test_presets_and_options_named_exist():
    text = EXPERIMENTS.read_text()
    fields = {
        "--" + field.name.replace("_", "-")
        for program in programs().values()
        for field in dataclasses.fields(program)
    }
    others = {"--help", "--keep", "--label-presets", "--logdir"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= fields | others
    presets = set(re.findall(r"^\| `(\w[\w-]*)`", text, re.MULTILINE))
    assert presets == {name for program in programs().values() for name in program.PRESETS}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            assert heading in [
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            ], target


@each_page
def test_files_and_modules_named_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:csrc|tfwn|models|tests|benchmarks)/[\w./]+)`", text):
        if "_build_info" not in path:
            assert (ROOT / path).exists(), path
    for module in re.findall(r"`python -m ((?:models|benchmarks)[\w.]*)", text):
        assert importlib.util.find_spec(module), module


def test_make_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?<!\w)make ([a-z-]+)(?:`|$| TENSORFLOW)", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


# The rows of the README's comparison table, each with a test that proves it for tfwn.
CLAIMS = {
    "runs on TensorFlow 2.21 and Keras 3": "tfwn/test_keras.py::test_fit",
    "kernels": "tfwn/test_ops_transforms.py::test_one_kernel_forward_and_one_backward",
    "axes that index units": "tfwn/test_ops_numerics.py::test_random_problems",
    "g is trained": "tfwn/test_weight.py::test_one_step_of_an_optimizer_is_the_step_by_hand",
    "wrapping a layer keeps its outputs": (
        "tfwn/test_keras.py::test_layer_keeps_its_outputs_and_gets_one_g_per_unit"
    ),
    "a unit with v = 0": (
        "tfwn/test_ops_numerics.py::test_a_zero_unit_has_zero_weights_and_gradients"
    ),
    "a unit with one element": (
        "tfwn/test_ops_numerics.py::test_a_unit_of_one_element_has_no_direction_to_learn"
    ),
    "float32 norms from 10⁻²⁵ to 10²⁵ [5]": (
        "tfwn/test_ops_numerics.py::test_norms_from_1e_minus_30_to_1e30"
    ),
    "g with the wrong shape": "tfwn/test_ops_errors.py::test_refused",
    "v in bfloat16 with g in float32": "tfwn/test_ops_numerics.py::test_types_mix",
    "results depend on the number of threads": (
        "tfwn/test_ops_numerics.py::test_bit_identical_for_any_number_of_threads_in_any_mode"
    ),
    "data-dependent initialization (section 3)": (
        "tfwn/test_data_dependent_init.py::test_all_pre_activations_of_a_deep_net_are_standard"
    ),
    "second derivatives, forward mode, XLA": (
        "tfwn/test_ops_derivatives.py::test_forward_accumulator"
    ),
}


def test_each_line_of_the_table_of_alternatives_has_a_test():
    text = (ROOT / "README.md").read_text()
    table = text.split("## Comparison")[1].split("## ")[0]
    rows = re.findall(r"^\| (?!\|)([^|]+) \|", table, re.MULTILINE)
    assert rows == list(CLAIMS)
    for claim, test in CLAIMS.items():
        file, _, function = test.partition("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), claim
