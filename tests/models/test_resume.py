"""Tests that in every program, a run that is stopped and resumed equals one that was not."""

import importlib
import random
import signal
import time

import numpy as np
import pytest
from support import assert_same_run, finish, start

from models.common import run_folder
from models.common.run import Run

PROGRAMS = [
    ("cifar", ["--parameterization", "weight_norm_mean_only_bn", "--no-whiten"]),
    ("vae", ["--dataset", "synthetic_mnist", "--parameterization", "normal"]),
    ("vae", ["--dataset", "synthetic_cifar10"]),
    ("draw", []),
    ("dqn", ["--num-envs", "1", "--variant", "deep_q_rl", "--steps", "400"]),
    ("dqn", ["--steps", "400"]),
]
each_program = pytest.mark.parametrize(
    ("program", "options"), PROGRAMS, ids=[" ".join([name, *words]) for name, words in PROGRAMS]
)


@each_program
def test_a_run_stopped_anywhere_and_resumed_is_the_whole_run(
    command, tmp_path, monkeypatch, program, options
):
    """Stops within an epoch, between epochs, and in the evaluation after the last step."""
    functions = importlib.import_module(f"models.{program}.__main__").FUNCTIONS
    options = ["--preset", "smoke", *options]
    status, out, _ = command(functions, *options, "--out", tmp_path / "whole")
    assert status == 0
    total = run_folder.load(tmp_path / "whole")
    steps, evaluating = Run.steps, Run.evaluating
    total = int(out.split(" steps done")[0].split()[-1].replace(",", ""))
    words = [*options, "--checkpoint-every", "0", "--out", tmp_path / "cut"]
    for stop in (0.4, 0.5, 0.8):

        def until(self, *arguments, stop=stop, **named):
            for step in steps(self, *arguments, **named):
                if step >= stop * total:
                    raise InterruptedError
                yield step

        monkeypatch.setattr(Run, "steps", until)
        with pytest.raises(InterruptedError):
            command(functions, *words)
        words = ["--resume", "--out", tmp_path / "cut"]

    def interrupt(self, *_):
        if self.step == total:
            raise InterruptedError

    monkeypatch.setattr(Run, "steps", steps)
    monkeypatch.setattr(Run, "evaluating", interrupt)
    with pytest.raises(InterruptedError):
        command(functions, *words)
    monkeypatch.setattr(Run, "evaluating", evaluating)
    assert command(functions, *words)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    for whole in (tmp_path / "whole").glob("*.npy"):
        np.testing.assert_array_equal(np.load(whole), np.load(tmp_path / "cut" / whole.name))


LONGER = {"cifar": ["--epochs", "30"], "vae": ["--epochs", "40"], "draw": ["--epochs", "30"]}


@pytest.mark.slow
@each_program
def test_a_run_killed_at_random_moments_and_resumed_is_the_whole_run(tmp_path, program, options):
    options = ["--preset", "smoke", *options, *LONGER.get(program, ["--steps", "1600"])]
    options += ["--checkpoint-every", "0.3"]
    module = {"program": ("-m", f"models.{program}")}
    finish(start(*options, "--out", tmp_path / "whole", **module))
    cut, moments, words = tmp_path / "cut", random.Random(0), options
    for kill in range(2):
        process = start(*words, "--out", cut, **module)
        deadline = time.monotonic() + 300
        while len(list(cut.glob("checkpoints/step-*.index"))) < 1 + kill and (
            process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        words = ["--resume"]
    finish(start("--resume", "--out", cut, **module))
    assert_same_run(tmp_path / "whole", cut)
