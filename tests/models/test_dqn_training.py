"""models/dqn: it learns, resumes, repeats itself, and says what is wrong."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from catch import config_of, make_catch

from models.common import checkpoints, command_line, metrics, run_folder
from models.common.errors import UserError
from models.dqn import play, replay, training
from models.dqn.config import PRESETS, Config, Evaluate, Watch
from models.dqn.replay import Replay

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _catch(monkeypatch):
    for module in (play, training):
        monkeypatch.setattr(module, "make_games", make_catch)


@pytest.fixture
def run(capsys):
    """Runs the command line; returns (exit status, stdout, stderr)."""

    def call(*argv):
        status = 0
        commands = {Evaluate: play.evaluate, Watch: play.watch}
        try:
            command_line.main(Config, training.train, PRESETS, commands, list(map(str, argv)))
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.usefixtures("_catch")
@pytest.mark.parametrize("num_envs", [1, 8])
@pytest.mark.parametrize("parameterization", ["normal", "weight_norm"])
def test_a_small_game_is_solved(tmp_path, parameterization, num_envs):
    config = config_of(
        out=str(tmp_path / "a"),
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


def rows_of(folder):
    """metrics.csv without what depends on the clock."""
    table = metrics.read(folder)
    return {k: v for k, v in table.items() if k not in ("time", "steps_per_second")}


def weights_of(folder):
    reader = tf.train.load_checkpoint(str(checkpoints.find(folder) / "tf"))
    names = [name for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
    return {name: reader.get_tensor(name) for name in names}


def check_same_run(one, other):
    np.testing.assert_equal(rows_of(other), rows_of(one))
    np.testing.assert_equal(weights_of(other), weights_of(one))
    states = [
        checkpoints.read_state(checkpoints.Checkpoints(f, {}).all()[-1]) for f in (one, other)
    ]
    for state in states:
        state.pop("rows")
        del state["extras"]["replay"]["id"]  # By chance.
    np.testing.assert_equal(states[0], states[1])


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_same_seed_gives_the_same_run_and_another_another(run, tmp_path, num_envs):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = ["--preset", "smoke", "--num-envs", num_envs, "--seed", seed]
        status, _, err = run(*argv, "--out", tmp_path / name)
        assert (status, err) == (0, "")
    check_same_run(tmp_path / "a", tmp_path / "b")
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "c")


@pytest.mark.parametrize("saved", [True, False])
def test_without_its_replay_memory_a_resumed_run_fills_it_anew(run, tmp_path, saved):
    folder, ring = tmp_path / "a", tmp_path / "a" / "replay.ring"
    argv = ["--preset", "smoke", "--steps", 400, "--out", folder]
    status, out, _ = run(*argv, *([] if saved else ["--no-save-replay"]))
    assert (status, str(ring) in out) == (0, saved)
    ring.unlink(missing_ok=True)
    argv = ["--resume", "--out", folder, "--accept-changes", "--steps"]
    status, out, _ = run(*argv, 800)
    assert "memory holds 0 transitions; learning goes on when it holds 200" in out
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
    told = f"{folder / 'held_out.npy'} is missing or damaged"
    for spoil in (lambda file: file.write_bytes(b""), lambda file: file.unlink()):
        spoil(folder / "held_out.npy")
        status, out, err = run("--resume", "--out", folder)
        assert (status, err, told in out) == (0, "", True)  # Over: there is nothing to do but test.
    argv = ["--resume", "--accept-changes", "--out", folder, "--steps"]
    status, out, err = run(*argv, 600)
    assert (status, err, told in out) == (0, "", True)
    assert np.load(folder / "held_out.npy").shape == states.shape
    status, out, err = run(*argv, 800)
    assert (status, err, told in out) == (0, "", False)
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
    # As runs of before have it.
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"SpaceInvaders"', '"space_invaders"'))
    assert run("--resume", "--game", "SpaceInvaders", "--out", folder)[::2] == (0, "")
    told = "--game was SpaceInvaders and is now Pong"
    assert told in run("--resume", "--game", "pong", "--out", folder)[2]


def test_what_a_run_s_state_does_not_fit_is_refused_before_anything_is_written(run, tmp_path):
    folder = tmp_path / "a"
    run("--preset", "smoke", "--steps", 240, "--out", folder)
    argv = ["--resume", "--accept-changes", "--steps", 400, "--out", folder]
    (folder / "replay.ring").unlink()
    for change in (
        ("--num-envs", "2"),
        ("--game", "Pong"),
        ("--filters", "4", "4", "8"),
        ("--hidden", "8"),
        ("--optimizer", "rmsprop"),
        ("--parameterization", "normal"),
        ("--mixed-precision", "bfloat16"),
    ):
        status, out, err = run(*argv, *change)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"--resume: {change[0]} was " in err
        assert "which the run's state does not fit; leave the option out" in err
        assert not (folder / "replay.ring").exists()
    assert run(*argv)[::2] == (0, "")


@pytest.mark.parametrize("file", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_is_the_run_that_was_not(run, tmp_path, file):
    shared = ["--preset", "smoke", "--steps", "1200", "--checkpoint-every", "0.2"]
    run(*shared, "--out", tmp_path / "whole")
    argv = [sys.executable, "-m", "models.dqn", "--out", str(tmp_path / "cut")]
    if file:
        shared += ["--replay-file", str(tmp_path / "frames")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    kills, chance = 0, random.Random(4)
    for _ in range(12):
        resume = (tmp_path / "cut" / "config.json").exists()
        words = argv + (["--resume"] if resume else shared)
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        begun = tmp_path / "cut" / "metrics.csv"
        deadline = time.monotonic() + 60
        while process.poll() is None and not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if kills < 2:
            time.sleep(chance.uniform(1.0, 4.0))
        else:
            process.wait(120)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.communicate()
            continue
        told = process.communicate()[0].decode()
        assert process.returncode == 0, told
        break
    assert kills > 0
    check_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_is_evaluated_and_watched(run, tmp_path, monkeypatch):
    run("--preset", "smoke", "--game", "Breakout", "--out", tmp_path / "a")
    assert (tmp_path / "a" / "learning_curve.png").stat().st_size > 5000
    status, out, err = run("evaluate", tmp_path / "a", "--games", 3)
    assert (status, err) == (0, "")
    about = PRESETS["smoke"].about
    assert f"3 games ({about})" in out
    assert (tmp_path / "a" / "note.txt").read_text() == f"({about})"
    assert "protocol nature: at most 5 minutes each, epsilon 0.05, raw rewards" in out
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
    assert "without a time limit, 200 steps in all, epsilon" in run(*paper)[1]
    assert "limit, 80 steps in all, epsilon" in run(*paper, "--test-steps", 80)[1]
    assert [(c.test, c.test_steps) for c in seen] == [("paper", 200), ("paper", 80)]
    assert "--test-steps" in run("evaluate", tmp_path / "a", "--test-steps", 80)[2]
    status, out, err = run("watch", tmp_path / "a", "--seconds", 2)
    assert (status, err) == (0, "")
    import imageio.v3 as imageio

    frames = imageio.imread(tmp_path / "a" / "game.gif", index=None)
    assert 20 <= len(frames) <= 30
    assert frames.shape[1:] == (460, 320, 3)
    assert (frames[0] != frames[-1]).any()


def test_a_signal_in_the_last_test_leaves_it_to_the_resumed_run(run, tmp_path, monkeypatch):
    testing, told = training.Run.testing, []

    def ask(self, done, total):
        told.append((self.step, done, total))
        if self.step == 600 and done:
            os.kill(os.getpid(), signal.SIGTERM)
        testing(self, done, total)

    monkeypatch.setattr(training.Run, "testing", ask)
    argv = ["--out", tmp_path / "a", "--test-steps", 400, "--game", "Breakout"]
    status, out, _ = run("--preset", "smoke", *argv)
    assert status == 128 + signal.SIGTERM
    assert f"stopped at step 600, saved; go on with --resume --out {tmp_path / 'a'}" in out
    assert told == [(step, done, 400) for step in (200, 400, 600) for done in (0, 256)]
    assert metrics.read(tmp_path / "a")["epoch"][-1] != 3
    monkeypatch.setattr(training.Run, "testing", testing)
    status, out, _ = run("--resume", "--out", tmp_path / "a")
    assert (status, out.count("test score")) == (0, 1)
    assert metrics.read(tmp_path / "a")["epoch"][-1] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--game", "Brakout"], "--game Brakout: not one of ale-py's 108 games; did you mean Br"),
        (["--strategy", "mirrored"], "--strategy mirrored: DQN trains on one device"),
        (["--steps", "100"], "--steps 100 ends before learning begins"),
        (["--num-envs", "7"], "must be a multiple of --num-envs 7"),
        (["--variant", "deep_q_rl"], "--variant deep_q_rl needs --num-envs 1, got 4"),
        (["--filters", "4", "4"], "--filters takes 3 numbers, got 2"),
        (["--learning-starts", "8"], "--learning-starts must lie between 32 and --replay 400"),
        (["--replay-file", "/proc/no/ring"], "/proc/no/ring: cannot write the replay memory"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(run, tmp_path, argv, message):
    status, out, err = run("--preset", "smoke", "--out", tmp_path / "a", *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a" / "config.json").exists()


def test_a_replay_file_is_of_one_run_and_of_one_process(run, tmp_path):
    memory = Replay(400, 4, file=tmp_path / "ring", in_memory=False, spare=40)
    memory.add(np.zeros((4, 84, 84), np.uint8), *np.zeros((3, 4), int))
    argv = ["--preset", "smoke", "--replay-file", tmp_path / "ring", "--out", tmp_path / "a"]
    in_use = run(*argv)
    memory.close()
    for told, (status, out, err) in (
        ("is in use by another process", in_use),
        ("holds another run's replay memory", run(*argv)),
    ):
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{tmp_path / 'ring'}: {told}" in err
    assert not (tmp_path / "a" / "config.json").exists()


def test_too_little_memory_is_told_with_the_remedy(run, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "available_memory", lambda: 2**20)
    status, _, err = run("--preset", "smoke", "--out", tmp_path / "a")
    assert status == 2
    assert "GiB are free: keep it on disk by --replay-file FILE, or lower --replay" in err


def test_environments_do_not_import_tensorflow():
    code = "import sys, models.dqn.replay; print('tensorflow' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert out.stdout == "False\n", out.stderr


def test_wrong_checkpoints_are_told(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        play.restore(str(tmp_path))
