"""models/common: the README's program on good days and bad."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rich.console
import tensorflow as tf

from models.common import (
    checkpoints,
    command_line,
    metrics,
    options,
    progress,
    run_folder,
    runtime,
)
from models.common.errors import UserError
from models.common.run import Run

README = Path(__file__).parents[2] / "models" / "common" / "README.md"
SOURCE = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "line.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("line", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["line"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["line"]


@pytest.fixture
def run(program, capsys):
    """Runs the program's command line; returns (exit status, stdout, stderr)."""

    def call(*argv):
        status = 0
        try:
            command_line.main(
                program.Config, program.train, program.PRESETS,
                {program.Evaluate: program.evaluate}, [str(a) for a in argv],
            )  # fmt: skip
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def final_weights(folder):
    path = checkpoints.find(folder)
    return tf.train.load_checkpoint(str(path / "tf")).get_tensor(
        "model/w/.ATTRIBUTES/VARIABLE_VALUE"
    )


def test_trains_logs_and_evaluates(run, tmp_path):
    status, _, err = run("--out", tmp_path / "a", "--steps", 60)
    assert (status, err) == (0, "")
    logged = metrics.read(tmp_path / "a")
    assert logged["step"] == [0, 10, 20, 30, 40, 50]
    assert logged["loss"][-1] < 1e-3 < logged["loss"][0]
    status, out, _ = run("evaluate", tmp_path / "a")
    assert (status, out) == (0, "slope 3.000 after 60 steps\n")


def test_config_json_says_what_was_run(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke", "--batch-size", 8)
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    assert content["program"] == "line"
    assert content["config"]["batch_size"] == 8
    assert content["differs_from_paper"] == {
        "steps": {"paper": 200, "here": 10},
        "batch_size": {"paper": 32, "here": 8},
    }
    (session,) = content["sessions"]
    assert session["versions"]["tensorflow"] == tf.__version__
    assert session["hardware"]["cores"] == os.cpu_count()


def test_help_shows_each_option_with_the_papers_value(run):
    status, out, _ = run("--preset", "smoke", "--help")
    assert status == 0
    assert "The step size of SGD. [0.1]" in out
    assert "How many updates. [200] (smoke: 10)" in out
    assert "The run folder (default: runs/PROGRAM-PRESET-PARAMETERIZATION-SEED).\n" in out
    assert re.search(r"environments\.\s+\(default: 0\)", out)
    for option in options.options_of(options.RunConfig):
        assert option.flag in out
        assert option.help, option.name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?\n"),
        (["--presett", "smoke"], "unknown option --presett; did you mean --preset?\n"),
        (["--resumed"], "unknown option --resumed; did you mean --resume?\n"),
        (["--color"], "unknown option --color; see python -m line --help\n"),
        (["--batch-size", "many"], "--batch-size: 'many' is not a whole number"),
        (["--batch-size", "2.5"], "--batch-size: '2.5' is not a whole number"),
        (["--learning-rate", "x"], "--learning-rate: 'x' is not a number"),
        (["--strategy", "all"], "--strategy: invalid choice: 'all' (it is one of"),
        (["--preset", "smok"], "--preset smok: unknown; the presets are paper, smoke; did you"),
        (["evaluat", "x"], "unknown command 'evaluat': the commands are evaluate; did you mean"),
        (["evaluate", "nowhere"], "nowhere: there is no such folder"),
        (["evaluate", "."], ".: not a run folder (it has no config.json)"),
        (["evaluate", __file__], "test_common.py: there is no such folder"),
        (["evaluate"], "the following arguments are required: checkpoint"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "nowhere"], "nowhere: there is no such folder"),
        (["--resume", "--out", "."], ".: not a run folder (it has no config.json)"),
        (["--out", "/proc/run"], "--out /proc/run: cannot write there"),
        (["--out", "/dev/null"], "--out /dev/null: cannot write there"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--keep", "0"], "--keep must be at least 1, got 0"),
        (["--seed", "1e12"], "--seed must be from 0 to 4,294,967,295, got 1,000,000,000,000\n"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number, got nan"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("python -m line: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_ranges():
    @dataclasses.dataclass(frozen=True)
    class Config(options.RunConfig):
        units: tuple[int, ...] = (1, 2)
        rate: float | None = None
        RANGES = options.ranges("units", "rate")

    options.check_ranges(Config())
    options.check_ranges(Config(rate=0.0, units=()))
    with pytest.raises(UserError, match="--units must be at least 1, got 0"):
        options.check_ranges(Config(units=(3, 0)))
    with pytest.raises(UserError, match=r"--rate must be from 0 to 1, got 1.5"):
        options.check_ranges(Config(rate=1.5))


def test_whole_numbers_may_be_written_short(program):
    config = command_line.parse(program.Config, program.PRESETS, ["--steps", "1e3"])
    assert config.steps == 1000
    config = command_line.parse(program.Config, program.PRESETS, ["--steps", "50_000"])
    assert config.steps == 50_000


def stop_at(monkeypatch, step, action):
    """Calls action() inside the body of a step."""
    show = Run.show

    def stopping(self, **values):
        show(self, **values)
        if self.step == step:
            action(self)

    monkeypatch.setattr(Run, "show", stopping)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_ends_as_if_never_stopped(
    run, tmp_path, monkeypatch, number
):
    run("--out", tmp_path / "whole", "--steps", 40)
    with monkeypatch.context() as patch:
        stop_at(patch, 20, lambda _: os.kill(os.getpid(), number))
        status, out, _ = run("--out", tmp_path / "cut", "--steps", 40)
    assert status == 128 + number
    assert "stopped at step 21, saved; go on with --resume" in out
    status, out, _ = run("--out", tmp_path / "cut", "--resume")
    assert (status, "resumed at step 21" in out) == (0, True)
    np.testing.assert_array_equal(
        final_weights(tmp_path / "cut"), final_weights(tmp_path / "whole")
    )
    cut, whole = metrics.read(tmp_path / "cut"), metrics.read(tmp_path / "whole")
    assert (cut["step"], cut["loss"]) == (whole["step"], whole["loss"])


def test_a_signal_in_a_test_after_the_steps_leaves_it_to_the_resumed_run(
    program, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0)  # A line each time.
    before, bodies, tested = signal.getsignal(signal.SIGTERM), [], []

    def train(resume, leave):
        with Run(program.Config(out=str(tmp_path / "a"), resume=resume)) as run:
            run.begin({"w": tf.Variable(0.0)})
            for step in run.steps(3):
                if step == 1:
                    run.testing(1, 8)
                bodies.append(step)
            for part in range(4):
                if leave and part == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                run.testing(part, 4)
                tested.append(part)

    with pytest.raises(SystemExit) as error:
        train(False, True)
    assert error.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    told = capsys.readouterr().out.splitlines()
    assert [re.sub("  .*/s  (0s left)?", "", line) for line in told] == [
        "step 1/3", "step 1/3  tested 12%", "step 2/3", "step 3/3", "step 3/3  tested 0%",
        "step 3/3  tested 25%", "SIGTERM: saving, then leaving (once more to leave at once)",
        "step 3/3  tested 50%",
        f"stopped at step 3, saved; go on with --resume --out {tmp_path / 'a'}",
    ]  # fmt: skip
    train(True, False)
    assert (bodies, tested) == ([0, 1, 2], [0, 1, 0, 1, 2, 3])
    assert capsys.readouterr().out.endswith(f"3 steps done; the run is in {tmp_path / 'a'}\n")


def test_a_signal_after_the_last_test_still_ends_the_process(program, tmp_path, capsys):
    """A sweep would go on with its next run."""

    def train():
        with Run(program.Config(out=str(tmp_path / "a"))) as run:
            run.begin({"w": tf.Variable(0.0)})
            list(run.steps(3))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as error:
        train()
    assert error.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().out.endswith(f"3 steps done; the run is in {tmp_path / 'a'}\n")


def test_rows_after_the_checkpoint_are_dropped(run, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def save_then_crash(at):
        def action(self):
            if at == 30:
                raise Crash

        return action

    with monkeypatch.context() as patch:
        stop_at(patch, 30, save_then_crash(30))
        steps = Run.steps
        patch.setattr(Run, "steps", lambda self, n: steps(self, n, save_every=15))
        with pytest.raises(Crash):
            run("--out", tmp_path / "a", "--steps", 50)
    assert metrics.read(tmp_path / "a")["step"] == [0, 10, 20, 30]
    run("--out", tmp_path / "a", "--resume")
    assert metrics.read(tmp_path / "a")["step"] == [0, 10, 20, 30, 40]


def test_a_second_signal_leaves_at_once(run, tmp_path, monkeypatch):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(monkeypatch, 20, twice)
    status, out, _ = run("--out", tmp_path / "a", "--steps", 40)
    assert (status, "once more to leave at once" in out, "saved" in out) == (130, True, False)
    assert not list((tmp_path / "a").glob("checkpoints/*"))
    monkeypatch.undo()
    status, out, _ = run("--out", tmp_path / "a", "--resume")
    assert (status, "no checkpoint yet: starting from the beginning" in out) == (0, True)


def test_changed_hyper_parameters_are_named_and_refused_unless_accepted(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    argv = ["--resume", "--out", tmp_path / "a", "--steps", 20]
    status, _, err = run(*argv)
    assert status == 2
    assert "--steps was 10 and is now 20" in err
    status, _, err = run("--resume", "--out", tmp_path / "a", "--preset", "paper")
    assert (status, "--preset was smoke and is now paper" in err) == (2, True)
    status, out, _ = run(*argv, "--accept-changes")
    assert (status, "resumed at step 10" in out) == (0, True)
    assert run_folder.load(tmp_path / "a")["config"]["steps"] == 20


def test_a_folder_holds_one_run(program, run, tmp_path, monkeypatch):
    run("--out", tmp_path / "a", "--preset", "smoke")
    with pytest.raises(UserError, match="holds a run already"):
        program.train(program.Config(out=str(tmp_path / "a")))
    # Told before the program begins, which may have data to read.
    monkeypatch.setattr(program, "train", None)
    status, _, err = run("--out", tmp_path / "a")
    assert (status, "holds a run already: go on with it by --resume" in err) == (2, True)


def test_a_run_of_another_program_is_refused(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"program": "models.circle"}))
    for argv in (["evaluate", tmp_path / "a"], ["--resume", "--out", tmp_path / "a"]):
        status, _, err = run(*argv)
        assert (status, "is a run of models.circle, not of line\n" in err) == (2, True), err


@pytest.mark.parametrize("content", ['{"architectures": []}', "[]"])
def test_another_programs_config_is_no_run(run, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for argv in (["evaluate", tmp_path], ["--resume", "--out", tmp_path]):
        status, _, err = run(*argv)
        assert (status, "not a run folder (its config.json is of something" in err) == (2, True)


def test_of_two_presets_the_last_counts(program):
    argv = ["--preset", "smoke", "--preset=paper"]
    config = command_line.parse(program.Config, program.PRESETS, argv)
    assert (config.preset, config.steps) == ("paper", 200)


def test_a_run_without_a_checkpoint_has_nothing_to_evaluate(program, run, tmp_path):
    with Run(program.Config(out=str(tmp_path / "a"))) as begun:
        begun.begin({"w": tf.Variable(0.0)})
    status, _, err = run("evaluate", tmp_path / "a")
    assert (status, "the run has no checkpoint yet\n" in err) == (2, True)


def test_a_checkpoint_moved_out_of_its_run_is_told(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    moved = tmp_path / "moved" / "best"
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-000000000010", moved)
    status, _, err = run("evaluate", moved)
    assert (status, err.count("\n")) == (2, 1), err
    assert f"{moved}: a checkpoint outside of its run" in err
    shutil.copy(tmp_path / "a" / "config.json", tmp_path)  # As the message proposes.
    assert run("evaluate", moved)[0] == 0


@pytest.mark.parametrize(("name", "value"), [("w", [0.0]), ("u", 0.0)])
def test_a_checkpoint_of_another_network_is_refused(program, run, tmp_path, name, value):
    run("--out", tmp_path / "a", "--preset", "smoke")
    model = tf.Module()
    setattr(model, name, tf.Variable(value))
    found = checkpoints.open_run(tmp_path / "a", program.Config)
    with pytest.raises(UserError, match="step-000000000010: does not fit this configuration"):
        found.restore(model=model)


def test_the_last_line_says_where_the_run_is(run, tmp_path, monkeypatch):
    """Also after what a program does when the steps are over."""
    steps = Run.steps

    def with_a_test(self, total):
        yield from steps(self, total)
        self.say("tested")

    monkeypatch.setattr(Run, "steps", with_a_test)
    _, out, _ = run("--out", tmp_path / "a", "--preset", "smoke")
    assert out.splitlines()[-2:] == ["tested", f"10 steps done; the run is in {tmp_path / 'a'}"]


def test_a_second_process_is_refused(program, run, tmp_path):
    config = program.Config(out=str(tmp_path / "a"), steps=1)
    with Run(config) as first:
        first.begin({"w": tf.Variable(0.0)})
        status, _, err = run("--out", tmp_path / "a", "--resume")
    assert (status, f"in use by another process (pid {os.getpid()} on" in err) == (2, True)


@pytest.mark.parametrize("spoil", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, monkeypatch, spoil):
    with monkeypatch.context() as patch:
        steps = Run.steps
        patch.setattr(Run, "steps", lambda self, n: steps(self, n, save_every=25))
        run("--out", tmp_path / "a", "--steps", 50)
    last = tmp_path / "a" / "checkpoints" / "step-000000000050"
    data = last / "tf.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[3] ^= 1
    {"cut": lambda: data.write_bytes(content[:-1]), "flip": lambda: data.write_bytes(content),
     "remove": data.unlink}[spoil]()  # fmt: skip
    status, out, _ = run("--out", tmp_path / "a", "--resume")
    assert status == 0
    assert "step-000000000050 is damaged" in out
    assert "resumed at step 25" in out
    assert checkpoints.damage(last) is None


def test_a_checkpoint_being_written_when_the_process_died_is_ignored(run, tmp_path):
    run("--out", tmp_path / "a", "--preset", "smoke")
    (tmp_path / "a" / "checkpoints" / ".writing-step-000000000020").mkdir()
    status, out, _ = run("--out", tmp_path / "a", "--resume")
    assert (status, "resumed at step 10" in out) == (0, True)


def test_commands_say_which_checkpoint_they_pass_over(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps = Run.steps
        patch.setattr(Run, "steps", lambda self, n: steps(self, n, save_every=25))
        run("--out", tmp_path / "a", "--steps", 50)
    first, last = sorted((tmp_path / "a" / "checkpoints").iterdir())
    (last / "state.json").write_text("{}")
    status, out, _ = run("evaluate", tmp_path / "a")
    assert (status, out.splitlines()[0]) == (
        0, "step-000000000050 is damaged (state.json has 2 bytes, "
        f"{len((first / 'state.json').read_bytes())} were written)",
    )  # fmt: skip
    (first / "state.json").unlink()
    status, _, err = run("evaluate", tmp_path / "a")
    assert (status, "no checkpoint is intact" in err) == (2, True)


def test_only_the_last_k_are_kept(run, tmp_path, monkeypatch):
    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda self, n: steps(self, n, save_every=10))
    run("--out", tmp_path / "a", "--steps", 50, "--keep", 3)
    found = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert found == [f"step-{n:012d}" for n in (30, 40, 50)]


def test_a_full_disk_keeps_the_checkpoint_before(program, run, tmp_path, monkeypatch):
    run("--out", tmp_path / "a", "--preset", "smoke")
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoints, "write_state", full)
        argv = ["--out", tmp_path / "a", "--resume", "--steps", 20, "--accept-changes"]
        status, _, err = run(*argv)
    assert status == 2
    assert "could not write the checkpoint of step 20 (No space left on device;" in err
    assert "--resume from step-000000000010, which is intact" in err
    status, out, _ = run(*argv)
    assert (status, "resumed at step 10" in out) == (0, True)


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
    assert status == 2
    assert "no space left on the disk of " in err
    assert "make room, then go on with --resume\n" in err
    assert err.count("\n") == 1


SMALL_DISK = """
mkdir disk
mount -t tmpfs -o size=1m none disk
{run} --out disk/a --steps 100 --keep 1000 --checkpoint-every 0 || echo status $?
mount -o remount,size=40m disk
{run} --out disk/a --resume
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A disk of 1 MiB, in a namespace of its own, which then gets larger."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
        pytest.skip("needs the right to mount a disk in a namespace")
    (tmp_path / "line.py").write_text(SOURCE)
    done = subprocess.run(
        [*namespace, "bash", "-ec", SMALL_DISK.format(run=f"{sys.executable} -m line")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(README.parents[2]), str(tmp_path)])},
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
    assert "100 steps done" in resumed


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    run("--out", tmp_path / "a", "--steps", 20)
    argv = ["--out", tmp_path / "a", "--resume", "--accept-changes", "--steps", 60]
    status, _, err = run(*argv, "--learning-rate", 1e30)
    assert status == 2
    assert re.search(r"loss is (nan|inf) at step \d+; the last good checkpoint is", err)
    assert "step-000000000020: lower --learning-rate" in err
    status, out, _ = run(*argv, "--learning-rate", 0.1)
    assert (status, "resumed at step 20" in out) == (0, True)


def test_weights_that_are_not_finite_are_never_saved(program, tmp_path):
    with Run(program.Config(out=str(tmp_path / "a"))) as run:
        w = tf.Variable(1.0, name="w")
        run.begin({"w": w})
        run.save()
        w.assign(np.nan)
        with pytest.raises(UserError, match=r"w.* is not finite at step 0.*step-000000000000"):
            run.save()
    assert checkpoints.damage(tmp_path / "a" / "checkpoints" / "step-000000000000") is None


@pytest.mark.parametrize("library", ["numpy", "tensorflow"])
def test_out_of_memory_says_which_flag_to_lower(program, run, tmp_path, monkeypatch, library):
    if library == "tensorflow":
        monkeypatch.setattr(program, "train", lambda config: tf.zeros([config.batch_size]))
    status, _, err = run("--out", tmp_path / "a", "--batch-size", 1e14)
    assert (status, err) == (2, "python -m line: error: out of memory: lower --batch-size\n")


def test_best_is_kept_beside_the_last(program, tmp_path):
    with Run(program.Config(out=str(tmp_path / "a"))) as run:
        model = tf.Module()
        model.w = tf.Variable(0.0)
        run.begin({"model": model})
        for score, kept in [(1.0, True), (3.0, True), (2.0, False)]:
            model.w.assign(score)
            assert run.keep_best(score) is kept
        assert not run.keep_best(float("nan"))
        run.save()
    assert checkpoints.find(tmp_path / "a").name == "best"
    assert final_weights(tmp_path / "a") == 3.0


class Extra:
    """State outside TensorFlow, of every kind a state_dict may hold."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.rest = {}

    def state_dict(self):
        return {"generator": self.generator.bit_generator.state, **self.rest}

    def load_state_dict(self, state):
        self.generator.bit_generator.state = state.pop("generator")
        self.rest = state


def test_extra_state_comes_back_as_it_was(program, tmp_path):
    extra = Extra(0)
    extra.rest = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3), "bytes": b"\0\xff", "none": None,
        "list": [1, 2.5, "three", np.float32(4)], "empty": {}, "blank": np.zeros((0, 3), np.uint8),
    }  # fmt: skip
    with Run(program.Config(out=str(tmp_path / "a"))) as run:
        run.begin({"w": tf.Variable(0.0)}, {"extra": extra})
        run.save()
    expected = extra.generator.normal(size=5)
    other = Extra(1)
    with Run(program.Config(out=str(tmp_path / "a"), resume=True)) as run:
        run.begin({"w": tf.Variable(0.0)}, {"extra": other})
    np.testing.assert_array_equal(other.generator.normal(size=5), expected)
    assert other.rest["array"].dtype == np.int16
    np.testing.assert_array_equal(other.rest["array"], extra.rest["array"])
    assert other.rest["blank"].shape == (0, 3)
    for name in ("bytes", "none", "list", "empty"):
        assert other.rest[name] == extra.rest[name]


def test_tensorboard_has_the_same_numbers_and_forgets_what_a_resumed_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = metrics.Metrics(tmp_path)
    for step in range(4):
        first.write(step, {"loss": step})
    first.close()
    second = metrics.Metrics(tmp_path, rows=2, step=2)
    second.write(2, {"loss": 20.0, "new": 1.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 20)]
    table = metrics.read(tmp_path)
    assert table["loss"] == [0, 1, 20]
    np.testing.assert_array_equal(table["new"], [np.nan, np.nan, 1])


def test_progress_is_a_few_plain_lines_without_a_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(1000, steps_per_epoch=100) as line:
        for step in range(0, 500):
            clock[0] += 0.2
            line.show(loss=0.5)
            line.update(step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "step 375/1,000  5 steps/s  2m05s left  loss 0.5  epoch 3.8"


@pytest.mark.parametrize("pause", [0.1, 1])
def test_a_test_is_shown_if_it_takes_long(capsys, monkeypatch, pause):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Test() as tell:
        for done in range(100):
            tell(done, 100)
            clock[0] += pause
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"step {done}/100  1 steps/s  {progress.duration(100 - done)} left"
        for done in ((15, 45, 75) if pause == 1 else ())
    ]


def test_a_terminal_shows_nothing_of_what_is_short(clock):
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, color_system=None)
    with progress.Progress(100, console=terminal, delay=3) as line:
        clock(line, 1, 1)
        clock(line, 2, 1)
        assert terminal.file.getvalue() == ""
        clock(line, 3, 1)
        assert "step 3/100" in terminal.file.getvalue()


def test_a_terminal_shows_that_tensorflow_is_loaded_and_then_no_more():
    leader, terminal = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "models.figures", "--help"],
        cwd=README.parents[2],
        env={name: v for name, v in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"},
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    assert done.stdout.startswith("usage: ")
    assert os.read(leader, 9999) == b"loading TensorFlow ...\r\x1b[K"
    os.close(terminal)
    os.close(leader)


def test_programs_run_with_stderr_closed():
    done = subprocess.run(
        f"exec {sys.executable} -m models.figures --help 2>&-",
        shell=True,
        cwd=README.parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stdout[:7]) == (0, "usage: ")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance(line, step, seconds):
        now[0] += seconds
        line.update(step)
        return line.line(step)

    return advance


def test_neither_compiling_nor_a_test_is_in_the_rate(clock):
    line = progress.Progress(100)
    assert clock(line, 1, 60) == "step 1/100"  # The first step compiles.
    assert clock(line, 2, 0.5) == "step 2/100  2 steps/s  49s left"
    for step in range(3, 10):
        clock(line, step, 0.5)
    assert clock(line, 10, 300) == "step 10/100  2 steps/s  45s left"  # A test.


def test_no_time_is_told_from_steps_that_are_not_like_those_to_come(clock):
    line = progress.Progress(1000, warm_up=100)
    for step in range(10, 110, 10):
        assert clock(line, step, 1) == f"step {step}/1,000"
    clock(line, 110, 60)
    assert clock(line, 120, 10) == "step 120/1,000  1 steps/s  14m40s left"
    resumed = progress.Progress(1000, start=500, warm_up=100)
    clock(resumed, 510, 60)
    assert clock(resumed, 520, 10) == "step 520/1,000  1 steps/s  8m00s left"


def test_a_narrow_terminal_shows_fewer_values(clock):
    line = progress.Progress(50_000, steps_per_epoch=500)
    line.show(loss=0.5, bound=-100)
    clock(line, 1, 1)
    clock(line, 2, 1)
    pace = "step 2/50,000  1 steps/s  13h53m left"
    assert line.line(2) == f"{pace}  loss 0.5  bound -100  epoch 0.0"
    assert line.line(2, len(pace) + 22) == f"{pace}  loss 0.5  bound -100"
    assert line.line(2, len(pace) + 21) == f"{pace}  loss 0.5"
    assert line.line(2, 10) == pace


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminals_line_fits_in_it(clock, columns):
    terminal = rich.console.Console(
        file=io.StringIO(), force_terminal=True, width=columns, color_system=None
    )
    with progress.Progress(50_000_000, console=terminal, unit="images", per_step=100) as line:
        line.show(**{f"value{number}": 1234 for number in range(9)})
        clock(line, 20_000_000, 1)
        clock(line, 20_000_200, 1)
    told = terminal.file.getvalue()
    last = [text for text in re.split(r"[\r\n]|\x1b\[\S*?[A-Za-z]", told) if "step" in text][-1]
    assert "20,000,200/50,000,000  20,000 images/s  41h39m left" in last
    assert len(last) <= columns
    assert ("value0 1,234" in last, "value4" in last) == (columns == 120, False)


def test_the_same_seed_makes_the_same_order():
    one, two = (runtime.generator(3, 1).permutation(10) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (one != runtime.generator(3, 2).permutation(10)).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "--strategy multi_worker needs TF_CONFIG, in each process with its own index"),
        ("{", "TF_CONFIG is not JSON"),
        ('{"cluster": {"worker": ["a:1"]}}', '"index": 0}}, got {"cluster":'),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            '"index": 0}}, got {"cluster":',
        ),
    ],
)
def test_multi_worker_needs_tf_config(run, tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("TF_CONFIG", content)
    status, _, err = run("--out", tmp_path / "a", "--strategy", "multi_worker")
    assert (status, message in err) == (2, True), err


def start_workers(tmp_path, *argv):
    (tmp_path / "line.py").write_text(SOURCE)
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("localhost", 0))
    hosts = [f"localhost:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    workers = []
    for index in range(2):
        task = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
        paths = os.pathsep.join([str(README.parents[2]), str(tmp_path)])
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "line", "--strategy", "multi_worker", *argv],
                env={**os.environ, "TF_CONFIG": json.dumps(task), "PYTHONPATH": paths},
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return workers


def test_two_workers_train_what_one_does_and_leave_together(run, tmp_path):
    run("--out", tmp_path / "one", "--steps", 20)
    workers = start_workers(tmp_path, "--out", "two", "--steps", "20")
    told = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    np.testing.assert_allclose(
        final_weights(tmp_path / "two"), final_weights(tmp_path / "one"), rtol=1e-5
    )
    assert [p.name for p in (tmp_path / "two" / "checkpoints").iterdir()] == ["step-000000000020"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_worker_ends_the_run_with_a_clear_message_and_it_resumes(tmp_path, victim):
    workers = start_workers(tmp_path, "--out", "two", "--steps", "1e6", "--checkpoint-every", "1")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("two/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    workers[victim].kill()
    told, _ = workers[1 - victim].communicate(timeout=120)
    workers[victim].communicate()
    assert workers[1 - victim].returncode == 2
    assert "a worker of --strategy multi_worker was lost; start all of them again" in told
    assert "Traceback" not in told
    reached = int(checkpoints.Checkpoints(tmp_path / "two", {}).latest().name[5:])
    argv = ["--out", "two", "--resume", "--steps", str(reached + 20), "--accept-changes"]
    workers = start_workers(tmp_path, *argv)
    told = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert f"resumed at step {reached:,}" in told[0]
