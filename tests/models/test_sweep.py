"""Tests sweeps: all arms and rates, more seeds at the best rate, failing and killed runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from models.cifar.config import Config as Cifar
from models.common import command_line, metrics, options, run_folder
from models.common.errors import UserError
from models.dqn.config import Config as Dqn
from models.draw.config import Config as Draw
from models.mechanism.config import Config as Mechanism
from models.vae.config import Config as Vae

# A program without TensorFlow. Its best rate is 0.2, or 0.1 with weight_norm.
TINY = """
import dataclasses, sys, time
from typing import Any, ClassVar, Literal

from models.common import command_line, metrics, run_folder
from models.common.errors import NotFinite
from models.common.options import Preset, SweepConfig, option


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    parameterization: Literal["normal", "weight_norm"] = "weight_norm"
    learning_rate: float = 0.5
    learning_rates: tuple[float, ...] = option((0.1, 0.2, 0.3), resume="free")
    seconds: float = option(0.0, resume="free")
    epochs: int = 3
    fail: str = option("", resume="free")
    ARMS: ClassVar[dict[str, Any]] = {
        name: {"parameterization": name} for name in ("normal", "weight_norm")
    }
    PRESETS: ClassVar = {"paper": Preset("")}
    MEASURE: ClassVar = "score"


def train(config):
    name = f"{config.parameterization}-{config.learning_rate:g}-{config.seed}"
    if config.fail == "before":
        raise run_folder.UserError("no data")
    folder = run_folder.RunFolder(config)
    folder.write_config(config)
    rows = metrics.Metrics(folder.path, 100).rows
    table = metrics.Metrics(folder.path, rows)
    for epoch in range(rows + 1, config.epochs + 1):
        if name == config.fail:
            raise run_folder.UserError("the disk is full")
        if config.learning_rate == 0.3 and config.parameterization == "normal" and epoch == 2:
            folder.write_diverged("loss is nan")
            raise NotFinite("loss is nan")
        time.sleep(config.seconds)
        best = 0.1 if config.parameterization == "weight_norm" else 0.2
        table.write(epoch, {"epoch": epoch, "score": 1 - abs(config.learning_rate - best)})


if __name__ == "__main__":
    command_line.main({Config: f"{__name__}.train"})
"""
FIRST = [f"{arm}-{rate}-0" for arm in ("normal", "weight_norm") for rate in (0.1, 0.2, 0.3)]
MORE = [f"{best}-{seed}" for best in ("normal-0.2", "weight_norm-0.1") for seed in (1, 2)]


@pytest.fixture
def tiny(tmp_path):
    """A function that starts a sweep of this program."""
    (tmp_path / "tiny.py").write_text(TINY)

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "tiny", "--sweep", "--out", "sweep", *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def runs(folder):
    return sorted(path.name for path in (folder / "sweep").iterdir() if path.is_dir())


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_arm_has_its_best_rate_with_all_seeds(tiny, tmp_path, jobs):
    status, out = finish(tiny("--jobs", jobs))
    assert status == 0, out
    assert runs(tmp_path) == sorted(FIRST + MORE)
    lines = out.splitlines()
    assert len(lines) == len(FIRST + MORE) + 3  # Runs, two best rates, the end.
    assert any("normal-0.3-0" in line and "diverged: loss is nan" in line for line in lines)
    assert "weight_norm: best rate 0.1, score 1, 1, 1" in out
    assert "all 10 runs have ended, 1 of them diverged" in out
    saved = json.loads((tmp_path / "sweep" / MORE[0] / "config.json").read_text())["config"]
    assert (saved["learning_rate"], saved["seed"], saved["sweep"]) == (0.2, 1, False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.csv")}
    assert finish(tiny("--jobs", jobs))[0] == 0  # Nothing is left to do.
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.csv")}
    status, out = finish(tiny("--seeds", 0, 4, "--learning-rates", 0.1, "--arms", "normal"))
    assert (status, "all 2 runs" in out) == (0, True)  # The grid may change.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_stopped_takes_its_runs_with_it_and_continues(tiny, tmp_path, number):
    process = tiny("--jobs", 2, "--seconds", 0.3)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "sweep").glob("*/metrics.csv"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    finish(process)
    pids = [file.read_text().split()[1] for file in (tmp_path / "sweep").glob("*/lock")]
    deadline = time.monotonic() + (20 if number == signal.SIGKILL else 0)
    while living := [pid for pid in pids if Path("/proc", pid).exists()]:
        assert time.monotonic() < deadline, living
        time.sleep(0.05)
    status, out = finish(tiny("--jobs", 2))
    assert status == 0, out
    for name in FIRST + MORE:
        rows = metrics.read(tmp_path / "sweep" / name).get("epoch", [])
        assert rows == ([1] if name == "normal-0.3-0" else [1, 2, 3])


def test_a_run_that_fails_does_not_end_the_others_and_is_tried_again(tiny, tmp_path):
    status, out = finish(tiny("--fail", "weight_norm-0.2-0"))
    assert status == 2
    assert "weight_norm-0.2-0 failed, see sweep/NAME.log" in out
    assert "the disk is full" in out
    expected = [name for name in FIRST + MORE if name not in MORE[2:]]  # The best rate is unknown.
    assert runs(tmp_path) == sorted(expected)
    status, out = finish(tiny())
    assert (status, runs(tmp_path)) == (0, sorted(FIRST + MORE)), out


def test_a_failure_before_the_first_run_begins_ends_the_sweep(tiny, tmp_path):
    status, out = finish(tiny("--fail", "before"))
    assert (status, runs(tmp_path)) == (2, [])
    assert out.count("no data") == 1


def test_other_hyper_parameters_are_refused_unless_accepted(tiny, tmp_path):
    grid = ["--learning-rates", 0.1, "--seeds", 0]
    assert finish(tiny(*grid))[0] == 0
    status, out = finish(tiny(*grid, "--epochs", 4))
    assert (status, out.count("\n")) == (2, 1)
    assert "normal-0.1-0: --epochs was 3 and is now 4" in out
    assert finish(tiny(*grid, "--epochs", 4, "--accept-changes"))[0] == 0
    assert metrics.read(tmp_path / "sweep" / "normal-0.1-0")["epoch"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--arms", "norml"], "did you mean normal?"),
        (["--learning-rates"], "--learning-rates takes at least one number"),
        (["--strategy", "multi_worker"], "--sweep is for one machine"),
        (["--resume"], "omit it"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--out", "/proc/sweep"], "--out /proc/sweep: cannot write there"),
        (["--seeds", "0", "1e12"], "--seeds must be from 0 to 4,294,967,295"),
        (["--seed", "0"], "--seed has no effect with --sweep: use --seeds"),
        (["--learning_rate=1"], "--learning-rate has no effect with --sweep: use --learning-rates"),
        (["--parameterization", "normal"], "with --sweep: use --arms"),
    ],
)
def test_a_mistake_names_the_flag_and_leaves_nothing(tiny, tmp_path, words, named):
    status, out = finish(tiny(*words))
    assert (status, named in out) == (2, True), out
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("config_class", [Cifar, Vae, Draw, Dqn, Mechanism])
def test_every_arm_is_a_valid_config_and_known_by_its_values(config_class):
    for preset in config_class.PRESETS:
        for name, values in config_class.ARMS.items():
            config = dataclasses.replace(config_class.of_preset(preset), **values)
            config.check()
            assert config.arm == name
            assert config.last_epoch > 0
            assert config.rate in config.learning_rates


def test_flags_make_the_config():
    """A sweep passes a Config to each run as flags, which must parse to an equal Config."""
    default = Vae.of_preset("cpu")
    config = Vae.of_preset(
        "cpu", out="a", made=(7, 8), epsilon=1.23456789e-8, free_bits=None, epochs=None,
        jit_compile=True, data_dependent_init=False, data_dir="a b",
    )  # fmt: skip
    words = options.flags(config, default)
    assert command_line.parse(Vae, ["--preset", "cpu", *words]) == config


def test_how_a_run_ended(tmp_path):
    config = Dqn.of_preset("smoke", out=str(tmp_path / "a"), steps=700)  # 3.5 epochs.
    assert run_folder.outcome(config) == ""
    folder = run_folder.RunFolder(config)
    folder.write_config(config)
    table = metrics.Metrics(folder.path)
    table.write(600, {"epoch": 3.0})
    assert run_folder.outcome(config) == ""
    table.write(700, {"epoch": 700 / 200})
    table.write(700, {"loss": 1.0})
    assert run_folder.outcome(config) == "finished"
    folder.write_diverged("loss is nan")
    assert run_folder.outcome(config) == "diverged"
    folder.close()


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["--arms", "normal"], "--frozen-g and --parameterization"),
        (["--learning-rates", "0.1"], "--learning-rate"),
        (["--seeds=1"], "--seed"),
        (["--jobs", "1"], ""),
    ],
)
def test_options_of_a_sweep_are_refused_without_it(words, instead):
    with pytest.raises(
        UserError, match=f"{words[0][:5]}.* has no effect without --sweep: .*{instead}$"
    ):
        command_line.parse(Cifar, words)
    with pytest.raises(UserError, match="--frozen-g has no effect with --sweep: use --arms"):
        command_line.parse(Cifar, ["--sweep", "--no-frozen-g"])


@pytest.mark.parametrize("config_class", [Cifar, Vae, Draw, Mechanism])
def test_what_determines_an_epochs_length_cannot_change(config_class, tmp_path):
    saved = config_class.of_preset("paper", out=str(tmp_path), accept_changes=True)
    names = {"dataset", "batch_size", "train_examples", "train_images"}
    for field in dataclasses.fields(saved):
        if field.name in names:
            config = dataclasses.replace(saved, **{field.name: 7})
            with pytest.raises(UserError, match="cannot change within a run"):
                run_folder.refuse_changes(saved, config, "--resume")


def test_frozen_g_is_of_the_normal_parameterization():
    for config_class in (Cifar, Vae, Dqn):
        with pytest.raises(UserError, match="--frozen-g"):
            config_class(frozen_g=True, parameterization="weight_norm").check()
