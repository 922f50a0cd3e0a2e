"""models/dqn.py: it learns, resumes, repeats itself, and tells what is wrong."""

import dataclasses
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

import tfwn
from models import dqn
from models.common import checkpoints, command_line, environments, metrics, replay, run_folder
from models.common.environments import Environments, Step, Steps
from models.common.errors import UserError
from models.common.replay import Batch, Replay

ROOT = Path(__file__).parents[2]


class Catch:
    """A ball falls 5 rows; the paddle below moves left, not at all, or right. Optimal return: 1."""

    num_actions = 3

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def reset(self):
        self.row, self.paddle, self.ball = 0, 2, int(self.generator.integers(5))
        return self.frame()

    def frame(self):
        frame = np.zeros((84, 84), np.uint8)
        for row, column in ((self.row, self.ball), (5, self.paddle)):
            frame[14 * row : 14 * row + 14, 17 * column : 17 * column + 16] = 255
        return frame

    def step(self, action):
        self.paddle = min(max(self.paddle + action - 1, 0), 4)
        self.row += 1
        over = self.row == 5
        reward = 0.0 if not over else 1.0 if self.paddle == self.ball else -1.0
        return Step(self.frame(), reward, False, over, False)

    def state_dict(self):
        return {"generator": self.generator.bit_generator.state,
                "at": [self.row, self.paddle, self.ball]}  # fmt: skip

    def load_state_dict(self, state):
        self.generator.bit_generator.state = state["generator"]
        self.row, self.paddle, self.ball = state["at"]


@pytest.fixture
def catch(monkeypatch):
    def make_games(config, count, seed, testing=False):
        return Environments(lambda index: Catch(seed * 100 + index), count)

    monkeypatch.setattr(dqn, "make_games", make_games)


def config_of(preset="smoke", **values):
    return dqn.Config(**{**dqn.PRESETS[preset].values, "preset": preset, **values})


@pytest.fixture
def run(capsys):
    """Runs the command line; returns (exit status, stdout, stderr)."""

    def call(*argv):
        status = 0
        commands = {dqn.Evaluate: dqn.evaluate, dqn.Watch: dqn.watch}
        try:
            command_line.main(dqn.Config, dqn.train, dqn.PRESETS, commands, list(map(str, argv)))
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.usefixtures("catch")
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
    dqn.train(config)
    table = metrics.read(tmp_path / "a")
    assert table["test_score"][-1] == 1.0


def random_batch(rng, size=16):
    return Batch(
        rng.integers(0, 256, (size, 5, 84, 84)).astype(np.uint8),
        rng.integers(0, 6, size).astype(np.int32),
        rng.choice([-1.0, 0.0, 1.0], size).astype(np.float32),
        rng.random(size) < 0.3,
    )


@pytest.fixture
def learner(rng):
    config = config_of(filters=(8, 8, 8), hidden=32, parameterization="weight_norm")
    made = dqn.Learner(config, 6, tf.float32)
    made.initialize(rng.integers(0, 256, (64, 84, 84, 4)).astype(np.uint8))
    return made


def test_the_loss_is_the_huber_loss_of_the_td_error_summed(rng, learner):
    batch = random_batch(rng)
    s_t = np.moveaxis(batch.frames[:, :4], 1, -1)
    s_tp1 = np.moveaxis(batch.frames[:, 1:], 1, -1)
    q_t = learner.online(s_t).numpy().astype(np.float64)[np.arange(16), batch.actions]
    # A target network with other weights, else a mix-up of the two would not show.
    for variable in learner.target.trainable_variables:
        variable.assign(variable * 1.1)
    q_tp1 = learner.target(s_tp1).numpy().astype(np.float64).max(1)
    error = batch.rewards + 0.99 * np.where(batch.terminals, 0, q_tp1) - q_t
    assert (abs(error) > 1).any()
    assert (abs(error) < 1).any()
    expected = np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5).sum()
    loss, q = learner.loss(batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(q, q_t.sum(), rtol=1e-4, atol=1e-4)


def test_the_error_s_derivative_is_clipped_and_does_not_flow_into_the_target(rng, learner):
    batch = random_batch(rng)
    with tf.GradientTape() as tape:
        loss, _ = learner.loss(batch)
    by_bias = tape.gradient(loss, learner.online.layers[-1].b)
    q_t = learner.online(np.moveaxis(batch.frames[:, :4], 1, -1)).numpy()
    q_tp1 = learner.target(np.moveaxis(batch.frames[:, 1:], 1, -1)).numpy().max(1)
    error = batch.rewards + 0.99 * ~batch.terminals * q_tp1 - q_t[np.arange(16), batch.actions]
    expected = np.zeros(6)
    np.add.at(expected, batch.actions, -np.clip(error, -1, 1))
    np.testing.assert_allclose(by_bias, expected, rtol=1e-4, atol=1e-5)


def test_the_learner_uses_the_papers_adamax(rng, learner):
    variables = learner.online.trainable_variables
    expected = [(p.numpy(), np.zeros(p.shape), np.zeros(p.shape)) for p in variables]
    for _ in range(3):
        gradients = [rng.normal(size=p.shape).astype(np.float32) for p in variables]
        learner.optimizer.apply([tf.constant(gradient) for gradient in gradients])
        for i, ((p, m, u), gradient) in enumerate(zip(expected, gradients, strict=True)):
            m = 0.5 * m + 0.5 * gradient
            u = np.maximum(0.999 * u, abs(gradient))
            expected[i] = (p - 3e-4 * m / (u + 1e-6), m, u)
    for variable, (p, _, _) in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable, p, rtol=1e-5, atol=1e-7)


def test_rmsprop_is_natures(rng):
    w = tf.Variable(rng.normal(size=5))
    optimizer = dqn.RMSProp([w], 2.5e-4)
    expected, mean, square = w.numpy(), np.zeros(5), np.zeros(5)
    for _ in range(4):
        gradient = rng.normal(size=5)
        optimizer.apply([tf.constant(gradient)])
        mean = 0.95 * mean + 0.05 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        expected = expected - 2.5e-4 * gradient / np.sqrt(square - mean**2 + 0.01)
    np.testing.assert_allclose(w, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_target_and_acting_networks_hold_the_effective_weights(rng, learner, dtype):
    copy = dqn.Network(config_of(filters=(8, 8, 8), hidden=32), 6, dtype, dtype)
    copy.copy_from(learner.online)
    states = rng.integers(0, 256, (8, 84, 84, 4)).astype(np.uint8)
    # float32: the order of sums differs between a function and eager calls.
    tolerance = 1e-5 if dtype == tf.float32 else 0.05
    np.testing.assert_allclose(copy(states), learner.online(states), atol=tolerance)
    acting = learner.act(states).numpy()
    learner.update((random_batch(rng),))
    np.testing.assert_allclose(learner.act(states), learner.online(states), atol=1e-5)
    assert abs(learner.act(states).numpy() - acting).max() > 1e-3
    np.testing.assert_allclose(learner.target(states), acting, atol=1e-5)


def test_several_updates_in_a_call_are_as_many_calls(rng):
    batches = [random_batch(rng) for _ in range(3)]
    states = rng.integers(0, 256, (64, 84, 84, 4)).astype(np.uint8)
    results = []
    for calls in ([(b,) for b in batches], [tuple(batches)]):
        made = dqn.Learner(config_of(), 6, tf.float32)
        made.initialize(states)
        for call in calls:
            made.update(call)
        results.append([v.numpy() for v in made.online.variables])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_both_parameterizations_begin_as_the_same_initialized_function(rng):
    states = rng.integers(0, 256, (64, 84, 84, 4)).astype(np.uint8)
    q = []
    for parameterization in ("normal", "weight_norm"):
        made = dqn.Learner(config_of(parameterization=parameterization), 6, tf.float32)
        made.initialize(states)
        assert tfwn.is_initialized(made.online)
        q.append(made.online(states).numpy())
    np.testing.assert_allclose(q[0], q[1], atol=1e-5)
    np.testing.assert_allclose(q[0].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(q[0].std(0), 1, atol=1e-3)


@pytest.mark.parametrize("parameterization", ["normal", "weight_norm"])
def test_the_output_layer_may_begin_with_small_values(rng, parameterization):
    config = config_of(init_output=0.01, parameterization=parameterization)
    made = dqn.Learner(config, 6, tf.float32)
    states = rng.integers(0, 256, (64, 84, 84, 4)).astype(np.uint8)
    made.initialize(states)
    np.testing.assert_allclose(made.online(states).numpy().std(0), 0.01, rtol=1e-3)


def test_the_output_layer_may_stay_as_it_is(rng):
    made = dqn.Learner(config_of(init_output=None), 6, tf.float32)
    before = made.online.layers[-1].weight().numpy()
    made.initialize(rng.integers(0, 256, (64, 84, 84, 4)).astype(np.uint8))
    np.testing.assert_array_equal(made.online.layers[-1].weight(), before)


def actor_of(num_envs=2, **values):
    config = config_of(num_envs=num_envs, **values)
    memory = Replay(100, num_envs)
    games = Environments(lambda index: Catch(index), num_envs)
    actor = dqn.Actor(config, dqn.Learner(config, 3, tf.float32), games, memory)
    actor.begin()
    return actor, memory


def outcome(rewards, life_lost, over, cut):
    frames = np.zeros((len(rewards), 84, 84), np.uint8)
    columns = (np.array(column, bool) for column in (life_lost, over, cut))
    return Steps(frames, np.array(rewards, np.float32), *columns, [], [])


@pytest.mark.parametrize(("variant", "life_is_last"), [("nature", False), ("deep_q_rl", True)])
def test_rewards_are_clipped_and_a_lost_life_ends_the_lesson_not_the_game(variant, life_is_last):
    actor, memory = actor_of(4, variant=variant)
    after = outcome([7, -3, 0.5, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1])
    actor.remember(np.zeros(4, int), after)
    np.testing.assert_array_equal(memory._rewards[:, 0], [1, -1, 0.5, 0])
    ends = memory._ends[:, 0]
    np.testing.assert_array_equal(ends & replay.TERMINAL != 0, [True, True, False, False])
    np.testing.assert_array_equal(ends & replay.LAST != 0, [life_is_last, True, False, True])
    np.testing.assert_array_equal(ends & replay.CUT != 0, [False, False, False, True])


def test_epsilon_decays_after_the_warm_up():
    actor, _ = actor_of(learning_starts=50, epsilon_steps=1000, epsilon=0.1)
    for step, expected in [(0, 1), (50, 1), (550, 0.55), (1050, 0.1), (9000, 0.1)]:
        assert actor.epsilon(step) == pytest.approx(expected)


@pytest.mark.parametrize("num_envs", [1, 2, 8])
def test_there_is_an_update_every_four_steps_after_the_warm_up(num_envs):
    actor, _ = actor_of(num_envs, learning_starts=40)
    due = [actor.updates(step) for step in range(0, 80, num_envs)]
    assert sum(due) == 10
    assert sum(due[: 40 // num_envs]) == 0


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
    size = ring.stat().st_blocks * 512 / 1e6 if saved else 0
    told = f"replay memory: {ring}, {size:,.0f} MB, which only --resume needs"
    assert (status, told in out) == (0, saved)
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
    told = f"{folder / 'held_out.npy'} is missing or damaged: other states are held out from here"
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
    about = dqn.PRESETS["smoke"].about
    assert f"3 games ({about})" in out
    assert (tmp_path / "a" / "note.txt").read_text() == f"({about})"
    assert "protocol nature: at most 5 minutes each, epsilon 0.05, raw rewards" in out
    again = run("evaluate", tmp_path / "a", "--games", 3)
    assert again == (status, out, err)
    assert re.search(
        r"^score \d+\.\d, 1 game \(", run("evaluate", tmp_path / "a", "--games", 1)[1], re.M
    )
    seen = []
    whole = dqn.play_test
    monkeypatch.setattr(dqn, "play_test", lambda c, *a, **k: (seen.append(c), whole(c, *a, **k))[1])
    paper = ["evaluate", tmp_path / "a", "--protocol", "paper"]
    assert "without a time limit, 200 steps in all, epsilon" in run(*paper)[1]
    assert "limit, 80 steps in all, epsilon" in run(*paper, "--test-steps", 80)[1]
    assert [(c.test, c.test_steps) for c in seen] == [("paper", 200), ("paper", 80)]
    told = "--test-steps is of --protocol paper without --games"
    assert told in run("evaluate", tmp_path / "a", "--test-steps", 80)[2]
    status, out, err = run("watch", tmp_path / "a", "--seconds", 2)
    assert (status, err) == (0, "")
    import imageio.v3 as imageio

    frames = imageio.imread(tmp_path / "a" / "game.gif", index=None)
    assert 20 <= len(frames) <= 30
    assert frames.shape[1:] == (460, 320, 3)
    assert (frames[0] != frames[-1]).any()


def test_a_signal_in_the_last_test_leaves_it_to_the_resumed_run(run, tmp_path, monkeypatch):
    testing, told = dqn.Run.testing, []

    def ask(self, done, total):
        told.append((self.step, done, total))
        if self.step == 600 and done:
            os.kill(os.getpid(), signal.SIGTERM)
        testing(self, done, total)

    monkeypatch.setattr(dqn.Run, "testing", ask)
    argv = ["--out", tmp_path / "a", "--test-steps", 400, "--game", "Breakout"]
    status, out, _ = run("--preset", "smoke", *argv)
    assert status == 128 + signal.SIGTERM
    assert f"stopped at step 600, saved; go on with --resume --out {tmp_path / 'a'}" in out
    assert told == [(step, done, 400) for step in (200, 400, 600) for done in (0, 256)]
    assert metrics.read(tmp_path / "a")["epoch"][-1] != 3
    monkeypatch.setattr(dqn.Run, "testing", testing)
    status, out, _ = run("--resume", "--out", tmp_path / "a")
    assert (status, out.count("test score")) == (0, 1)
    assert metrics.read(tmp_path / "a")["epoch"][-1] == 3


def test_a_score_has_its_standard_error():
    scores = np.random.default_rng().normal(size=7)
    spread = np.sqrt(((scores - scores.mean()) ** 2).sum() / 6)
    np.testing.assert_allclose(dqn.standard_error(list(scores)), spread / np.sqrt(7), rtol=1e-12)
    assert np.isnan(dqn.standard_error([5.0]))


def test_natures_test_is_30_games_each_counted_once(catch, learner):
    config = dataclasses.replace(config_of(filters=(8, 8, 8), hidden=32), test="nature", num_envs=8)
    made = dqn.Learner(config, 3, tf.float32)
    scores, lengths = dqn.play_test(config, made, [0])
    assert len(scores) == 30
    assert lengths == [5] * 30


@pytest.mark.usefixtures("catch")
def test_the_papers_test_counts_the_games_that_end_within_its_steps():
    config = config_of(filters=(4, 4, 4), test_steps=52, num_envs=4)
    made = dqn.Learner(config, 3, tf.float32)
    scores, _ = dqn.play_test(config, made, [0])
    assert len(scores) == 4 * (13 // 5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--game", "Brakout"], "--game Brakout: no such game among ale-py's"),
        (["--game", "Brakout"], "did you mean Breakout?"),
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


def test_the_papers_preset_is_the_table_of_the_paper():
    config = dqn.Config()
    assert (config.steps, config.replay, config.learning_starts) == (50_000_000, 10**6, 50_000)
    assert (config.batch_size, config.update_every, config.target_every) == (64, 4, 10_000)
    learner = dqn.Learner(config, 6, tf.float32)
    shapes = [layer.weight.v.shape.as_list() for layer in learner.online.layers]
    assert shapes == [[8, 8, 4, 32], [4, 4, 32, 64], [3, 3, 64, 64], [3136, 512], [512, 6]]
    assert learner.optimizer._learning_rate == 3e-4
    normal = dqn.Learner(dataclasses.replace(config, parameterization="normal"), 6, tf.float32)
    assert normal.optimizer._learning_rate == 1e-4
    frozen = dqn.Learner(dataclasses.replace(config, learning_rate=0.0), 6, tf.float32)
    assert frozen.optimizer._learning_rate == 0.0


def test_environments_do_not_import_tensorflow():
    code = "import sys, models.common.replay; print('tensorflow' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert out.stdout == "False\n", out.stderr


def test_wrong_checkpoints_are_told(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        dqn.restore(str(tmp_path))
    assert environments.FRAME_SHAPE == (84, 84)
