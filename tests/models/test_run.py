"""Tests a run from start to end: signals, crashes, metrics, loops."""

import json
import os
import re
import signal

import numpy as np
import pytest
import tensorflow as tf
from support import weights

from models.common import metrics, runtime, tensorboard
from models.common.run import Run

SLOPE = "model/w/.ATTRIBUTES/VARIABLE_VALUE"


def stop_at(monkeypatch, step, action):
    """Calls action() inside the body of a step."""
    show = Run.show

    def stopping(self, **values):
        show(self, **values)
        if self.step == step:
            action()

    monkeypatch.setattr(Run, "show", stopping)


def test_trains_logs_and_evaluates(run, tmp_path):
    status, _, err = run("--out", tmp_path / "a", "--steps", 60, "--batch-size", 8)
    assert (status, err) == (0, "")
    logged = metrics.read(tmp_path / "a")
    assert logged["step"] == [0, 10, 20, 30, 40, 50]
    assert logged["loss"][-1] < 1e-3 < logged["loss"][0]
    status, out, _ = run("evaluate", tmp_path / "a")
    assert (status, out) == (0, "slope 3.000 after 60 steps\n")
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    assert content["program"] == "line"
    assert content["differs_from_paper"] == {
        "steps": {"paper": 200, "here": 60},
        "batch_size": {"paper": 32, "here": 8},
    }
    (session,) = content["sessions"]
    assert session["versions"]["tensorflow"] == tf.__version__
    assert session["hardware"]["cores"] == os.cpu_count()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_ends_as_if_never_stopped(
    run, tmp_path, monkeypatch, number
):
    run("--out", tmp_path / "whole", "--steps", 40)
    with monkeypatch.context() as patch:
        stop_at(patch, 20, lambda: os.kill(os.getpid(), number))
        status, out, _ = run("--out", tmp_path / "cut", "--steps", 40)
    assert (status, "stopped at step 21" in out) == (128 + number, True)
    status, out, _ = run("--out", tmp_path / "cut", "--resume")
    assert (status, "resumed at step 21" in out) == (0, True)
    assert weights(tmp_path / "cut")[SLOPE] == weights(tmp_path / "whole")[SLOPE]
    cut, whole = metrics.read(tmp_path / "cut"), metrics.read(tmp_path / "whole")
    assert (cut["step"], cut["loss"]) == (whole["step"], whole["loss"])


def test_a_second_signal_leaves_at_once(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 20, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        assert run("--out", tmp_path / "a", "--steps", 40)[0] == 130
    assert not list((tmp_path / "a").glob("checkpoints/*"))
    status, out, _ = run("--out", tmp_path / "a", "--resume")
    assert (status, "no checkpoint yet" in out) == (0, True)


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(line, tmp_path):
    """Signals arrive in an evaluation between steps and in the one after the last step."""
    before, done = signal.getsignal(signal.SIGTERM), []

    def train(resume, leave_at):
        with Run(line.Config(out=str(tmp_path / "a"), resume=resume)) as run:
            run.begin({"w": tf.Variable(0.0)})

            def evaluate(name):
                if leave_at == name:
                    os.kill(os.getpid(), signal.SIGTERM)
                run.evaluating(1, 2)
                done.append(name)

            for step in run.steps(3):
                if step == 1:
                    evaluate("inside")
                done.append(step)
            evaluate("after")

    for resume, leave_at in ((False, "inside"), (True, "after"), (True, None)):
        if leave_at:
            with pytest.raises(SystemExit) as error:
                train(resume, leave_at)
            assert error.value.code == 128 + signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) == before
        else:
            train(resume, leave_at)
    assert done == [0, "inside", 1, 2, "after"]


def test_a_signal_after_the_last_evaluation_still_ends_the_process(line, tmp_path):
    """Otherwise a sweep would continue with its next run."""

    def train():
        with Run(line.Config(out=str(tmp_path / "a"))) as run:
            run.begin({"w": tf.Variable(0.0)})
            list(run.steps(3))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as error:
        train()
    assert error.value.code == 128 + signal.SIGTERM


def test_epochs_are_resumed_where_they_were_and_reported_again(line, tmp_path):
    """The run saves each step, and fails in the first epoch, in its report, and in the second."""
    seen, timed, means = [], [], {}

    class Stop(Exception):
        pass

    def train(stop):
        config = line.Config(out=str(tmp_path / "a"), resume=bool(seen), checkpoint_every=0.0)
        with Run(config) as run:
            run.begin({"w": tf.Variable(0.0)}, sums=1)
            for epoch in run.epochs(2, per_epoch=3, batch_size=5):
                for step in epoch:
                    if stop == step:
                        raise Stop
                    epoch.add(tf.constant([float(step)]))
                    assert epoch.slice == slice(5 * (step % 3), 5 * (step % 3) + 5)
                    seen.append(step)
                if stop == f"report {epoch.number}":
                    raise Stop
                seen.append(f"report {epoch.number}")
                timed.append(epoch.seconds is not None)
                means[epoch.number] = float(epoch.means[0])

    for stop in (1, "report 0", 4):
        with pytest.raises(Stop):
            train(stop)
    train(None)
    assert seen == [0, 1, 2, "report 0", 3, 4, 5, "report 1"]
    assert timed == [False, True]  # The process that reported epoch 0 ran none of its steps.
    assert means == {0: 3 / 15, 1: 12 / 15}


def test_rows_after_the_checkpoint_are_dropped(run, tmp_path, monkeypatch):
    def crash():
        raise InterruptedError

    steps = Run.steps
    with monkeypatch.context() as patch:
        stop_at(patch, 30, crash)
        patch.setattr(Run, "steps", lambda self, n: steps(self, n, save_every=15))
        with pytest.raises(InterruptedError):
            run("--out", tmp_path / "a", "--steps", 50)
    assert metrics.read(tmp_path / "a")["step"] == [0, 10, 20, 30]
    run("--out", tmp_path / "a", "--resume")
    assert metrics.read(tmp_path / "a")["step"] == [0, 10, 20, 30, 40]


def test_a_changed_option_stays_changed_and_is_recorded(run, tmp_path, monkeypatch):
    """Also if the run is killed before it saves a checkpoint with the new learning rate."""

    def crash():
        raise InterruptedError

    argv = ["--out", tmp_path / "a", "--resume"]
    run("--out", tmp_path / "a", "--steps", 20)
    with monkeypatch.context() as patch:
        stop_at(patch, 30, crash)
        with pytest.raises(InterruptedError):
            run(*argv, "--learning-rate", 0.01, "--steps", 60, "--accept-changes")
    assert run(*argv)[0] == 0
    rates = [v for name, v in weights(tmp_path / "a").items() if "learning_rate" in name]
    assert rates == [np.float32(0.01)]
    change = "from step 20: --learning-rate was 0.1 and is now 0.01, --steps was 20 and is now 60"
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    assert content["changes"] == [change]


def test_a_row_cut_short_does_not_count(tmp_path):
    table = metrics.Metrics(tmp_path)
    table.write(1, {"score": -130.76})
    whole = table.path.read_text()
    for rest in ("2,0.1,-", "2,0.1,-13"):
        table.path.write_text(whole + rest, newline="")
        assert metrics.read(tmp_path)["score"] == [-130.76]


def test_a_run_that_fails_before_it_begins_leaves_nothing(line, tmp_path):
    (tmp_path / "there").mkdir()
    for out in ("there", "new/folder"):
        config = line.Config(out=str(tmp_path / out))
        with pytest.raises(ZeroDivisionError), Run(config, "a title", " (a note)"):
            raise ZeroDivisionError
    assert not list((tmp_path / "there").iterdir())
    assert not (tmp_path / "new").exists()


def test_a_second_process_is_refused(line, run, tmp_path):
    with Run(line.Config(out=str(tmp_path / "a"), steps=1)) as first:
        first.begin({"w": tf.Variable(0.0)})
        status, _, err = run("--out", tmp_path / "a", "--resume")
    assert (status, f"pid {os.getpid()} on" in err) == (2, True)


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    run("--out", tmp_path / "a", "--steps", 20)
    argv = ["--out", tmp_path / "a", "--resume", "--accept-changes", "--steps", 60]
    status, _, err = run(*argv, "--learning-rate", 1e30)
    assert status == 2
    assert re.search(r"loss is (nan|inf) at step \d+; the last good checkpoint is step-20:", err)
    status, out, _ = run(*argv, "--learning-rate", 0.1)
    assert (status, "resumed at step 20" in out) == (0, True)


@pytest.mark.parametrize("library", ["numpy", "tensorflow"])
def test_out_of_memory_names_the_flag_to_lower(line, run, tmp_path, monkeypatch, library):
    if library == "tensorflow":
        monkeypatch.setattr(line, "train", lambda config: tf.zeros([config.batch_size]))
    status, _, err = run("--out", tmp_path / "a", "--batch-size", 1e14)
    assert (status, "--batch-size" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "metrics.csv"),
        tf.errors.ResourceExhaustedError(None, None, "events; No space left on device"),
    ],
)
def test_a_full_disk_beside_the_checkpoints_is_not_a_lack_of_memory(
    run, tmp_path, monkeypatch, error
):
    def full(*_):
        raise error

    monkeypatch.setattr(metrics.Metrics, "write", full)
    status, _, err = run("--out", tmp_path / "a")
    assert (status, "no space left" in err, err.count("\n")) == (2, True, 1)


def test_tensorboard_has_the_same_numbers_and_forgets_what_a_resumed_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, rows, end in ((0, 0, 4), (2, 2, 3)):
        table, board = metrics.Metrics(tmp_path, rows), tensorboard.TensorBoard(tmp_path, begin)
        for step in range(begin, end):
            values = {"loss": step + 10.0 * begin} | ({"new": 1.0} if begin else {})
            table.write(step, values)
            board.write(step, values)
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 22)]
    assert metrics.read(tmp_path)["loss"] == [0, 1, 22]
    np.testing.assert_array_equal(metrics.read(tmp_path)["new"], [np.nan, np.nan, 1])


def test_the_same_seed_makes_the_same_order():
    one, two = (runtime.generator(3, 1).permutation(10) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (one != runtime.generator(3, 2).permutation(10)).any()
