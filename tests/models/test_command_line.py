"""Tests the command line: fast help, strict checks, presets, and options with --resume."""

import dataclasses
import json
import subprocess
import sys
from typing import Annotated, ClassVar

import pytest
from support import ROOT

from models.common import command_line, options, run_folder
from models.common.errors import UserError


@pytest.mark.parametrize("program", ["cifar", "draw"])
@pytest.mark.parametrize(
    ("argv", "status"),
    [(["--help"], 0), (["evaluate", "--help"], 0), (["--batch-sise", "3"], 2),
     (["--epochs", "many"], 2), (["--epochs", "0"], 2), (["evaluate", "nowhere"], None)],
    ids=str,
)  # fmt: skip
def test_arguments_are_read_without_tensorflow(program, argv, status):
    code = (
        "import runpy, sys; sys.modules['tensorflow'] = None\n"
        f"sys.argv[1:] = {argv!r}\nrunpy.run_module('models.{program}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if status is None:  # A valid command goes on to import TensorFlow.
        assert "import of tensorflow halted" in done.stderr
    else:
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


def test_help_does_not_wait_for_tensorflow():
    command = [sys.executable, "-X", "importtime", "-m", "models.cifar", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "models.cifar" in imported
    assert not {"tensorflow", "keras", "matplotlib"} & imported


def test_help_has_every_option_and_the_papers_values_beside_a_presets(run):
    status, out, _ = run("--preset", "smoke", "--help")
    assert status == 0
    assert "The step size of SGD." in out
    assert "--steps  200 -> 10" in out
    for field in dataclasses.fields(options.RunConfig):
        assert options.flag_of(field.name) in out
    for part in ("Fits a line", "a quick check that it runs", "Prints the slope of the line."):
        assert part in out


def test_plain_help_names_the_fast_preset_if_there_is_one(line, run):
    assert "--preset cpu" not in run("--help")[1]
    line.Config.PRESETS["cpu"] = options.Preset("")
    assert "--preset cpu" in run("--help")[1]


def test_commands_take_a_run(run):
    assert "evaluate [-h] RUN" in run("evaluate", "--help")[1]
    assert "RUN" in run("evaluate")[2]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batchsize", "3"], "did you mean --batch-size?"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "2.5"], "--batch-size"),
        (["--batch-size", "inf"], "--batch-size"),
        (["--learning-rate", "x"], "--learning-rate"),
        (["--strategy", "all"], "--strategy"),
        (["--preset", "smok"], "did you mean smoke?"),
        (["evaluat", "x"], "did you mean evaluate?"),
        (["evaluate"], "run folder"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "."], "config.json"),
        (["evaluate", __file__], __file__),
        (["--resume"], "--out"),
        (["--resume", "--out", "nowhere"], "nowhere"),
        (["--resume", "--out", "."], "config.json"),
        (["--out", "/proc/run"], "--out /proc/run"),
        (["--out", "/dev/null"], "--out /dev/null"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--keep", "0"], "--keep"),
        (["--seed", "1e12"], "--seed must be from 0 to 4,294,967,295"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--strategy", "mirrored", "--jit-compile"], "--jit-compile"),
        (["--strategy", "multi_worker"], "TF_CONFIG"),
    ],
)
def test_a_mistake_names_the_flag_and_leaves_nothing(run, tmp_path, monkeypatch, argv, named):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
    assert not list((tmp_path / "here").iterdir())


def test_ranges():
    @dataclasses.dataclass(frozen=True)
    class Config(options.RunConfig):
        units: tuple[options.Count, ...] = (1, 2)
        rate: options.Fraction | None = None
        size: Annotated[int, options.Range(2)] = 2

    options.check_ranges(Config())
    options.check_ranges(Config(rate=0.0, units=()))
    for values in ({"units": (3, 0)}, {"rate": 1.5}, {"size": 1}, {"seed": -1}):
        with pytest.raises(UserError, match=f"--{next(iter(values))} must be"):
            options.check_ranges(Config(**values))


def test_whole_numbers_may_be_written_short(line):
    assert command_line.parse(line.Config, ["--steps", "1e3"]).steps == 1000
    assert command_line.parse(line.Config, ["--steps", "50_000"]).steps == 50_000


def test_a_renamed_option_keeps_its_flag_and_its_key(tmp_path):
    """Old commands and old config.json files still work after an option is renamed."""

    @dataclasses.dataclass(frozen=True)
    class Config(options.RunConfig):
        protocol: str = options.option("paper", was="test")
        limit: float | None = 1.0
        PRESETS: ClassVar = {"paper": options.Preset("")}

    for words in (["--test", "nature"], ["--test=nature"], ["--protocol", "nature"]):
        assert command_line.parse(Config, words).protocol == "nature"
    assert command_line.parse(Config, ["--limit", "none"]).limit is None
    content = {"program": run_folder.program_of(Config), "config": {"test": "nature"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert run_folder.load_config(tmp_path, Config).protocol == "nature"


def test_a_command_may_refuse_what_does_not_go_together(line, command, monkeypatch):
    def check(self):
        raise UserError("--a is of --b")

    monkeypatch.setattr(line.Evaluate, "check", check, raising=False)
    status, _, err = command(
        {line.Config: "line.train", line.Evaluate: "absent.f"}, "evaluate", "x"
    )
    assert (status, err) == (2, "python -m line: error: --a is of --b\n")


def test_of_two_presets_the_last_counts(line):
    config = command_line.parse(line.Config, ["--preset", "smoke", "--preset=paper"])
    assert (config.preset, config.steps) == ("paper", 200)


def test_the_run_folder_is_named_after_the_run(line):
    assert command_line.parse(line.Config, ["--seed", "3"]).out == "runs/line-paper-3"
    assert command_line.parse(line.Config, ["--out", "a/{seed}"]).out == "a/{seed}"


def test_changed_hyper_parameters_are_named_and_refused_unless_accepted(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    argv = ["--resume", "--out", tmp_path / "a"]
    status, _, err = run(*argv, "--steps", 20)
    assert (status, "--steps was 10 and is now 20" in err) == (2, True)
    status, _, err = run(*argv, "--preset", "paper", "--accept-changes")
    assert (status, "--preset was smoke and is now paper" in err) == (2, True)
    status, out, _ = run(*argv, "--steps", 20, "--keep", 5, "--accept-changes")
    assert (status, "resumed at step 10" in out) == (0, True)
    config = run_folder.load_config(tmp_path / "a", sys.modules["line"].Config)
    assert (config.preset, config.steps, config.keep) == ("smoke", 20, 5)
    assert run(*argv, "--preset", "smoke")[0] == 0  # Keeps the run's values, not the preset's.


def test_a_folder_holds_one_run_and_of_one_program(line, run, tmp_path, monkeypatch):
    run("--out", tmp_path / "a", "--preset", "smoke")
    monkeypatch.setattr(line, "train", None)  # The refusal must precede loading data.
    status, _, err = run("--out", tmp_path / "a")
    assert (status, "--resume" in err) == (2, True)
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"program": "models.circle"}))
    for argv in (["evaluate", tmp_path / "a"], ["--resume", "--out", tmp_path / "a"]):
        status, _, err = run(*argv)
        assert (status, "models.circle" in err) == (2, True), err


@pytest.mark.parametrize("content", ['{"architectures": []}', "[]", "{"])
def test_another_programs_config_is_no_run(run, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for argv in (["evaluate", tmp_path], ["--resume", "--out", tmp_path]):
        status, _, err = run(*argv)
        assert (status, "config.json" in err) == (2, True)


@pytest.mark.parametrize(
    ("argv", "status", "shown"),
    [
        ([], 0, "python -m models.cifar "),
        ([], 0, "--preset smoke"),
        (["cifar", "--help"], 0, "usage: python -m models.cifar"),
        (["cifr"], 1, "did you mean cifar?"),
    ],
)
def test_python_m_models_lists_and_runs_programs(argv, status, shown):
    done = subprocess.run([sys.executable, "-m", "models", *argv], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == status
    assert shown in done.stdout + done.stderr
