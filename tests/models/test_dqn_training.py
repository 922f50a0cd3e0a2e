"""Tests models/dqn: learning, reproducible runs, resuming without its files, errors."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from catch import CATCH, config_of
from support import ROOT, assert_same_run

from models.common import command_line, metrics, run_folder
from models.common.errors import UserError
from models.dqn import play, replay, training
from models.dqn.__main__ import FUNCTIONS
from models.dqn.config import Config
from models.dqn.replay import Replay


@pytest.fixture
def run(command):
    """A function that runs the command line and returns (exit status, stdout, stderr)."""
    return lambda *argv: command(FUNCTIONS, *argv)


@pytest.mark.parametrize("num_envs", [1, 8])
@pytest.mark.parametrize("parameterization", ["normal", "weight_norm"])
def test_a_small_game_is_solved(tmp_path, parameterization, num_envs):
    config = config_of(
        out=str(tmp_path / "a"),
        game=CATCH,
        parameterization=parameterization,
        num_envs=num_envs,
        steps=4000,
        learning_starts=800,
        replay=4000,
        batch_size=32,
        target_every=80,
        learning_rate=3e-3,
        epsilon_steps=1000,
        filters=(8, 8, 8),
        hidden=32,
        test_every=4000,
        test_steps=400,
        test_epsilon=0.0,
    )
    training.train(config)
    table = metrics.read(tmp_path / "a")
    assert table["test_score"][-1] == 1.0


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_same_seed_gives_the_same_run_and_another_another(run, tmp_path, num_envs):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = ["--preset", "smoke", "--num-envs", num_envs, "--seed", seed]
        status, _, err = run(*argv, "--out", tmp_path / name)
        assert (status, err) == (0, "")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics.read(tmp_path / "a")["loss"] != metrics.read(tmp_path / "c")["loss"]


@pytest.mark.parametrize("saved", [True, False])
def test_without_its_replay_memory_a_resumed_run_fills_it_anew(run, tmp_path, saved):
    folder, ring = tmp_path / "a", tmp_path / "a" / "replay.ring"
    argv = ["--preset", "smoke", "--steps", 400, "--out", folder]
    status, out, _ = run(*argv, *([] if saved else ["--no-save-replay"]))
    assert (status, str(ring) in out) == (0, saved)
    ring.unlink(missing_ok=True)
    argv = ["--resume", "--out", folder, "--accept-changes", "--steps"]
    status, out, _ = run(*argv, 800)
    assert "holds 0 transitions" in out
    table = metrics.read(folder)
    learns = [
        step
        for step, loss in zip(table["step"], table["loss"], strict=True)
        if not math.isnan(loss)
    ]
    assert (status, learns) == (0, [300, 400, 700, 800])


def test_without_its_held_out_states_a_resumed_run_holds_out_others(run, tmp_path):
    folder = tmp_path / "a"
    run("--preset", "smoke", "--steps", 400, "--out", folder)
    states = np.load(folder / "held_out.npy")
    text = f"{folder / 'held_out.npy'} is missing or damaged"
    for spoil in (lambda file: file.write_bytes(b""), lambda file: file.unlink()):
        spoil(folder / "held_out.npy")
        status, out, err = run("--resume", "--out", folder)
        assert (status, err, text in out) == (0, "", True)  # Only the test is left to do.
    argv = ["--resume", "--accept-changes", "--out", folder, "--steps"]
    status, out, err = run(*argv, 600)
    assert (status, err, text in out) == (0, "", True)
    assert np.load(folder / "held_out.npy").shape == states.shape
    status, out, err = run(*argv, 800)
    assert (status, err, text in out) == (0, "", False)
    there = np.isfinite(metrics.read(folder)["held_out_q"])
    np.testing.assert_array_equal(
        np.array(metrics.read(folder)["step"])[there], [200, 400, 600, 800]
    )


def test_a_game_has_one_name_in_any_spelling(run, tmp_path, monkeypatch):
    argv = ["--preset", "smoke", "--steps", 240, "--game", "space_invaders"]
    monkeypatch.chdir(tmp_path)
    assert run(*argv)[::2] == (0, "")
    folder = Path("runs/dqn-SpaceInvaders-smoke-weight_norm-0")
    assert run_folder.load(folder)["config"]["game"] == "SpaceInvaders"
    assert run("--resume", "--game", "space-invaders", "--out", folder)[::2] == (0, "")
    # As older runs stored it.
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"SpaceInvaders"', '"space_invaders"'))
    assert run("--resume", "--game", "SpaceInvaders", "--out", folder)[::2] == (0, "")
    assert "--game was SpaceInvaders" in run("--resume", "--game", "pong", "--out", folder)[2]


def test_games_that_cannot_be_saved_begin_anew_in_a_resumed_run(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # The processes must find catch.
    argv = ["--preset", "smoke", "--out", tmp_path / "a", "--game"]
    status, out, err = run(*argv, "catch:Unsaved-v0", "--steps", 400)
    assert (status, err, "start over" in out) == (0, "", False)
    argv = ["--resume", "--accept-changes", "--steps", 600, "--out", tmp_path / "a"]
    status, out, err = run(*argv)
    assert (status, err) == (0, "")
    assert "catch:Unsaved-v0 cannot save its state, so its games start over" in out
    status, out, err = run("watch", tmp_path / "a", "--seconds", 1)
    assert (status, err) == (0, "")


def test_what_a_run_s_state_does_not_fit_is_refused_before_anything_is_written(run, tmp_path):
    """--accept-changes must not accept options that the saved state does not fit."""
    folder = tmp_path / "a"
    run("--preset", "smoke", "--steps", 240, "--out", folder)
    argv = ["--resume", "--accept-changes", "--steps", 400, "--out", folder]
    (folder / "replay.ring").unlink()
    for change in (
        ("--num-envs", "2"),
        ("--game", "Pong"),
        ("--scaling", "area"),
        ("--filters", "4", "4", "8"),
        ("--hidden", "8"),
        ("--optimizer", "rmsprop"),
        ("--parameterization", "normal"),
        ("--mixed-precision", "bfloat16"),
    ):
        status, out, err = run(*argv, *change)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{change[0]} was " in err
        assert not (folder / "replay.ring").exists()
    assert run(*argv)[::2] == (0, "")


def test_a_run_is_evaluated_and_watched(run, tmp_path, monkeypatch):
    run("--preset", "smoke", "--game", "Breakout", "--out", tmp_path / "a")
    assert (tmp_path / "a" / "learning_curve.png").stat().st_size > 5000
    status, out, err = run("evaluate", tmp_path / "a", "--games", 3)
    assert (status, err) == (0, "")
    about = Config.PRESETS["smoke"].about
    assert f"3 games ({about}; step-" in out
    again = run("evaluate", tmp_path / "a", "--games", 3)
    assert again == (status, out, err)
    assert re.search(
        r"^score \d+\.\d, 1 game \(", run("evaluate", tmp_path / "a", "--games", 1)[1], re.M
    )
    seen = []
    whole = play.play_games
    monkeypatch.setattr(
        play, "play_games", lambda c, *a, **k: (seen.append(c), whole(c, *a, **k))[1]
    )
    paper = ["evaluate", tmp_path / "a", "--protocol", "paper"]
    assert "200 steps in all" in run(*paper)[1]
    assert "80 steps in all" in run(*paper, "--test-steps", 80)[1]
    assert [(c.protocol, c.test_steps) for c in seen] == [("paper", 200), ("paper", 80)]
    assert "--test-steps" in run("evaluate", tmp_path / "a", "--test-steps", 80)[2]
    status, out, err = run("watch", tmp_path / "a", "--seconds", 2)
    assert (status, err) == (0, "")
    import imageio.v3 as imageio

    frames = imageio.imread(tmp_path / "a" / "game.gif", index=None)
    assert 20 <= len(frames) <= 30
    assert frames.shape[1:] == (460, 320, 3)
    assert (frames[0] != frames[-1]).any()


def test_a_signal_in_the_last_evaluation_leaves_it_to_the_resumed_run(run, tmp_path, monkeypatch):
    evaluating, reports = training.Run.evaluating, []

    def ask(self, done, total):
        reports.append((self.step, done, total))
        if self.step == 600 and done:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluating(self, done, total)

    monkeypatch.setattr(training.Run, "evaluating", ask)
    argv = ["--out", tmp_path / "a", "--test-steps", 400, "--game", "Breakout"]
    status, out, _ = run("--preset", "smoke", *argv)
    assert status == 128 + signal.SIGTERM
    assert "stopped at step 600, saved" in out
    assert reports == [(step, done, 400) for step in (200, 400, 600) for done in (0, 256)]
    assert metrics.read(tmp_path / "a")["epoch"][-1] != 3
    monkeypatch.setattr(training.Run, "evaluating", evaluating)
    status, out, _ = run("--resume", "--out", tmp_path / "a")
    assert (status, out.count(": score")) == (0, 1)
    assert metrics.read(tmp_path / "a")["epoch"][-1] == 3


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--game", "Brakout"], "--game Brakout: not one of ale-py's 108 games; did you mean Br"),
        (["--game", "CartPole-v1"], "--game CartPole-v1: its observations are Box"),
        (["--game", "catch:Float-v0"], "of type float64; DQN needs images"),
        (["--game", "nowhere:Game-v0"], "No module named 'nowhere'"),
        (["--strategy", "mirrored"], "--strategy"),
        (["--data-dir", "/data"], "--data-dir"),
        (["--steps", "100"], "--steps 100"),
        (["--num-envs", "7"], "--num-envs 7"),
        (["--variant", "deep_q_rl"], "--variant deep_q_rl"),
        (["--filters", "4", "4"], "--filters"),
        (["--learning-starts", "8"], "--learning-starts"),
        (["--replay-file", "/proc/no/ring"], "/proc/no/ring"),
        (["--sweep", "--num-envs", "1", "--replay-file", "ring"], "omit --replay-file"),
    ],
)
def test_a_mistake_is_named_in_one_line_and_leaves_no_folder(run, tmp_path, argv, named):
    status, _, err = run("--preset", "smoke", "--out", tmp_path / "a", *argv)
    assert status == 2
    assert named in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_options_that_dqn_lacks_are_not_in_its_help_but_in_its_old_configs(run, tmp_path):
    status, out, _ = run("--help")
    assert (status, "--mixed-precision" in out) == (0, True)
    assert "--strategy" not in out
    assert "--data-dir" not in out
    saved = dataclasses.asdict(Config.of_preset("smoke")) | {"data_dir": "/data"}
    content = {"program": "models.dqn", "config": saved}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = command_line.parse(Config, ["--resume", "--out", str(tmp_path)])
    assert (config.preset, config.data_dir, config.strategy) == ("smoke", "/data", "none")
    with pytest.raises(UserError, match="--strategy mirrored: DQN trains on one device"):
        dataclasses.replace(config, strategy="mirrored").check()


def test_a_replay_file_is_of_one_run_and_of_one_process(run, tmp_path):
    memory = Replay(400, 4, file=tmp_path / "ring", in_memory=False, spare=40)
    memory.add(np.zeros((4, 84, 84), np.uint8), *np.zeros((3, 4), int))
    argv = ["--preset", "smoke", "--replay-file", tmp_path / "ring", "--out", tmp_path / "a"]
    in_use = run(*argv)
    memory.close()
    for text, (status, _, err) in (
        ("is in use by another process", in_use),
        ("holds another run's replay memory", run(*argv)),
    ):
        assert (status, err.count("\n")) == (2, 1)
        assert f"{tmp_path / 'ring'}: {text}" in err
    assert not (tmp_path / "a" / "config.json").exists()


def test_too_little_memory_names_the_remedy(run, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "available_memory", lambda: 2**20)
    status, _, err = run("--preset", "smoke", "--out", tmp_path / "a")
    assert status == 2
    assert "--replay-file" in err


def test_games_and_replay_need_no_tensorflow_and_the_config_not_even_ale_py():
    code = """
import sys
import models.dqn.config
assert not {"tensorflow", "ale_py", "gymnasium", "tensorflow_datasets"} & set(sys.modules)
import models.dqn.replay, models.dqn.vector
assert "tensorflow" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
