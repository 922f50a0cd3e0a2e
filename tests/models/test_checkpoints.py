"""Tests checkpoints: damaged, from another version or network, on a full disk, not finite."""

import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from support import ROOT, SOURCE, finish, start_workers, weights

from models.common import checkpoints
from models.common.errors import UserError
from models.common.run import Run

SLOPE = "model/w/.ATTRIBUTES/VARIABLE_VALUE"


@pytest.fixture
def saving(monkeypatch):
    """A function that makes runs save every `count` steps."""

    def every(count):
        steps = Run.steps
        monkeypatch.setattr(Run, "steps", lambda self, n: steps(self, n, save_every=count))

    return every


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["data-00000-of-00001", "index"])
@pytest.mark.parametrize("spoil", [cut, flip, os.remove, lambda p: p.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, saving, file, spoil):
    saving(25)
    run("--out", tmp_path / "a", "--steps", 50)
    spoil(tmp_path / "a" / "checkpoints" / f"step-50.{file}")
    status, out, _ = run("evaluate", tmp_path / "a")
    assert (status, "slope" in out) == (0, True)
    status, out, _ = run("--out", tmp_path / "a", "--resume")
    assert (status, "resumed at step 25" in out) == (0, True)
    assert spoil is os.remove or "step-50 is damaged" in out
    assert checkpoints.damage(tmp_path / "a" / "checkpoints" / "step-50") is None
    for path in (tmp_path / "a" / "checkpoints").glob("*.index"):
        cut(path)
    for argv in (["evaluate", tmp_path / "a"], ["--out", tmp_path / "a", "--resume"]):
        status, _, err = run(*argv)
        assert (status, err.count("\n")) == (2, 1), err


def test_without_the_managers_list_the_newest_checkpoint_is_found(run, tmp_path, saving):
    saving(25)
    run("--out", tmp_path / "a", "--steps", 50)
    (tmp_path / "a" / "checkpoints" / "checkpoint").write_text("{")
    _, out, _ = run("--out", tmp_path / "a", "--resume", "--accept-changes", "--steps", 100)
    assert "resumed at step 50" in out


def test_what_a_process_that_died_was_writing_is_removed(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    folder = tmp_path / "a" / "checkpoints"
    (folder / "step-20_temp").mkdir()
    (folder / "step-20_temp" / "part-00000-of-00001.index").write_text("x")
    status, out, _ = run("--out", tmp_path / "a", "--resume")
    assert (status, "resumed at step 10" in out) == (0, True)
    assert not (folder / "step-20_temp").exists()


def test_a_result_names_its_checkpoint_and_what_happened_to_the_run(line, run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    run("--out", tmp_path / "a", "--resume", "--steps", 20, "--accept-changes")
    found = checkpoints.open_run(tmp_path / "a", line.Config)
    changed = "from step 10: --steps was 10 and is now 20"
    assert found.note("JPEG").endswith(f"; step-20; {changed}; JPEG)")
    run("--out", tmp_path / "a", "--resume", "--steps", 90, "--accept-changes",
        "--learning-rate", 1e30)  # fmt: skip
    assert "; step-20 of a run that diverged; " in found.note()


def test_only_the_last_k_are_kept(run, tmp_path, saving):
    saving(10)
    run("--out", tmp_path / "a", "--steps", 50, "--keep", 3)
    found = {path.name.split(".")[0] for path in (tmp_path / "a" / "checkpoints").iterdir()}
    assert found == {"step-30", "step-40", "step-50", "checkpoint"}


def test_a_run_without_a_checkpoint_has_nothing_to_evaluate(line, run, tmp_path):
    with Run(line.Config(out=str(tmp_path / "a"))) as begun:
        begun.begin({"w": tf.Variable(0.0)})
    status, _, err = run("evaluate", tmp_path / "a")
    assert (status, "no checkpoint" in err, err.count("\n")) == (2, True, 1)


def test_a_checkpoint_may_be_named_itself_and_moved_with_its_config(run, tmp_path, saving):
    """`evaluate` accepts a single checkpoint, and one that was moved together with config.json."""
    saving(5)
    run("--out", tmp_path / "a", "--preset", "smoke")
    source = tmp_path / "a" / "checkpoints"
    assert run("evaluate", source / "step-5")[1] != run("evaluate", source / "step-10")[1]
    moved = tmp_path / "moved" / "checkpoints"
    shutil.copytree(source, moved)
    status, _, err = run("evaluate", moved / "step-10")
    assert (status, err.count("\n")) == (2, 1), err
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "moved")
    assert run("evaluate", moved / "step-10")[0] == 0


@pytest.mark.parametrize(("name", "value"), [("w", [0.0]), ("u", 0.0)])
def test_a_checkpoint_of_another_network_is_refused(line, run, tmp_path, name, value):
    run("--out", tmp_path / "a", "--preset", "smoke")
    model = tf.Module()
    setattr(model, name, tf.Variable(value))
    found = checkpoints.open_run(tmp_path / "a", line.Config)
    with pytest.raises(UserError, match="step-10: does not fit this configuration"):
        found.restore(model=model)


def test_a_run_of_an_earlier_version_is_evaluated_but_not_resumed(run, tmp_path):
    """Earlier versions wrote each checkpoint into its own folder with tf.train.Checkpoint."""
    run("--out", tmp_path / "a", "--preset", "smoke")
    folder = tmp_path / "a" / "checkpoints"
    shutil.rmtree(folder)
    model = tf.Module()
    model.w = tf.Variable(0.0)
    for step, name in ((1, "step-000000000900"), (2, "step-000000001000"), (5, "best")):
        model.w.assign(step)
        tf.train.Checkpoint(model=model).write(str(folder / name / "tf"))
    assert "slope 5.000" in run("evaluate", tmp_path / "a")[1]
    assert "slope 1.000" in run("evaluate", folder / "step-000000000900")[1]
    shutil.rmtree(folder / "best")
    assert "slope 2.000" in run("evaluate", tmp_path / "a")[1]
    status, _, err = run("--resume", "--out", tmp_path / "a")
    assert (status, "earlier version" in err, err.count("\n")) == (2, True, 1)


def test_a_full_disk_keeps_the_checkpoint_before(run, tmp_path, monkeypatch):
    run("--out", tmp_path / "a", "--preset", "smoke")
    argv = ["--out", tmp_path / "a", "--resume", "--steps", 20, "--accept-changes"]

    def full(self, **_):
        (tmp_path / "a" / "checkpoints" / "step-20.data-00000-of-00001").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tf.train.CheckpointManager, "save", full)
        status, _, err = run(*argv)
    assert (status, "step 20" in err, "step-10, which is intact" in err) == (2, True, True)
    assert not list((tmp_path / "a" / "checkpoints").glob("step-20*"))
    status, out, _ = run(*argv)
    assert (status, "resumed at step 10" in out) == (0, True)


SMALL_DISK = """
mkdir disk
mount -t tmpfs -o size=1m none disk
{run} --out disk/a --steps 400 --keep 1000 --checkpoint-every 0 || echo status $?
mount -o remount,size=80m disk
{run} --out disk/a --resume
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """Fills a disk of 1 MiB in a private mount namespace, enlarges it, and resumes."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
        pytest.skip("needs permission to mount a disk in a namespace")
    (tmp_path / "line.py").write_text(SOURCE)
    done = subprocess.run(
        [*namespace, "bash", "-ec", SMALL_DISK.format(run=f"{sys.executable} -m line")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "make room, then" in done.stderr
    full, resumed = done.stdout.split("status 2\n")
    assert "done" not in full
    assert int(re.search(r"resumed at step (\d+)", resumed)[1]) > 5
    assert "400 steps done" in resumed


def test_weights_that_are_not_finite_are_never_saved(line, tmp_path):
    with Run(line.Config(out=str(tmp_path / "a"))) as run:
        w = tf.Variable(1.0, name="w")
        run.begin({"w": w})
        run.save()
        w.assign(np.nan)
        with pytest.raises(UserError, match=r"w.* is not finite at step 0.*step-0:"):
            run.save()
        with pytest.raises(UserError, match="not finite"):
            run.keep_best(1.0)
    assert weights(tmp_path / "a")["w/.ATTRIBUTES/VARIABLE_VALUE"] == 1


def test_best_is_kept_beside_the_last_and_over_resuming(line, tmp_path):
    """A resumed run must not replace the best checkpoint with a worse one."""
    for resume, scores in ((False, [1.0, 3.0, 2.0, np.nan]), (True, [2.5])):
        with Run(line.Config(out=str(tmp_path / "a"), resume=resume)) as run:
            model = tf.Module()
            model.w = tf.Variable(0.0)
            run.begin({"model": model})
            for score in scores:
                model.w.assign(0.0 if np.isnan(score) else score)
                assert run.keep_best(score) is (score in (1, 3))
            run.save()
    assert checkpoints.find(tmp_path / "a").parent.name == "best"
    assert weights(tmp_path / "a")[SLOPE] == 3


class Extra:
    """State outside TensorFlow with every type of value that a state_dict may contain."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.rest = {}

    def state_dict(self):
        return {"generator": self.generator.bit_generator.state, **self.rest}

    def load_state_dict(self, state):
        self.generator.bit_generator.state = state.pop("generator")
        self.rest = state


def test_extra_state_comes_back_as_it_was(line, tmp_path):
    extra = Extra(0)
    extra.rest = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3), "bytes": b"\0\xff", "none": None,
        "list": [1, 2.5, "three", np.float32(4)], "empty": {}, "blank": np.zeros((0, 3), np.uint8),
    }  # fmt: skip
    with Run(line.Config(out=str(tmp_path / "a"))) as run:
        run.begin({"w": tf.Variable(0.0)}, {"extra": extra})
        run.save()
    expected = extra.generator.normal(size=5)
    other = Extra(1)
    with Run(line.Config(out=str(tmp_path / "a"), resume=True)) as run:
        run.begin({"w": tf.Variable(0.0)}, {"extra": other})
    np.testing.assert_array_equal(other.generator.normal(size=5), expected)
    assert other.rest["array"].dtype == np.int16
    np.testing.assert_array_equal(other.rest["array"], extra.rest["array"])
    assert other.rest["blank"].shape == (0, 3)
    for name in ("bytes", "none", "list", "empty"):
        assert other.rest[name] == extra.rest[name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
    ],
)
def test_multi_worker_needs_tf_config(run, tmp_path, monkeypatch, content):
    monkeypatch.setenv("TF_CONFIG", content)
    status, _, err = run("--out", tmp_path / "a", "--strategy", "multi_worker")
    assert (status, "TF_CONFIG" in err, err.count("\n")) == (2, True, 1)


@pytest.fixture
def two(tmp_path):
    """A function that starts two workers of one run in the folder "two"."""
    (tmp_path / "line.py").write_text(SOURCE)

    def start(*argv):
        return start_workers("--out", "two", *argv, program=("-m", "line"), paths=[tmp_path])

    return start


def test_two_workers_train_what_one_does_and_leave_together(run, two, tmp_path):
    """Two workers reach the weights of one, both exit, and no stray files are left."""
    run("--out", tmp_path / "one", "--steps", 20)
    finish(*two("--steps", "20"))
    ours, theirs = (weights(tmp_path / name)[SLOPE] for name in ("one", "two"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    found = {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()}
    assert found == {"step-20.index", "step-20.data-00000-of-00001", "checkpoint"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_worker_ends_the_run_with_a_clear_message_and_it_resumes(tmp_path, two, victim):
    workers = two("--steps", "1e6", "--checkpoint-every", "1")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("two/checkpoints/*.index")) and time.monotonic() < deadline:
        time.sleep(0.2)
    workers[victim].kill()
    output, _ = workers[1 - victim].communicate(timeout=120)
    workers[victim].communicate()
    assert workers[1 - victim].returncode == 2
    assert "a worker of --strategy multi_worker was lost" in output
    assert "Traceback" not in output
    reached = int(checkpoints.Checkpoints(tmp_path / "two", {}).latest().name[5:])
    output = finish(*two("--resume", "--steps", str(reached + 20), "--accept-changes"))[0]
    assert f"resumed at step {reached:,}" in output
