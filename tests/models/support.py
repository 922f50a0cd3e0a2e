"""Helpers that compare the runs in two run folders and start programs in subprocesses."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from models.common import checkpoints, metrics

ROOT = Path(__file__).parents[2]
README = ROOT / "models" / "common" / "README.md"
SOURCE = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)  # Its example.
TIMES = {"time", "epoch_seconds", "steps_per_second"}


def weights(folder):
    """Returns all numeric variables by name from a run's best checkpoint, or else its last."""
    reader = tf.train.load_checkpoint(str(checkpoints.find(folder)))
    return {
        name: reader.get_tensor(name)
        for name, dtype in reader.get_variable_to_dtype_map().items()
        if dtype != tf.string
    }


def assert_same_run(one, other):
    """Asserts that all variables, including the optimizer's, and all metrics agree bit for bit."""
    ours, theirs = (weights(folder / "checkpoints") for folder in (one, other))  # not best/
    ignored = "save_counter"
    assert {n for n in ours if ignored not in n} == {n for n in theirs if ignored not in n}
    assert sum(name.startswith("optimizer/") for name in ours) > 10
    for name, value in ours.items():
        if ignored not in name:
            np.testing.assert_array_equal(value, theirs[name], name)
    ours, theirs = metrics.read(one), metrics.read(other)
    assert ours.keys() - TIMES == theirs.keys() - TIMES
    for name in ours.keys() - TIMES:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


def start(*argv, program=("-m", "models.cifar"), paths=(), **variables):
    """Starts a program in a subprocess."""
    search = os.pathsep.join([str(ROOT), *map(str, paths)])
    return subprocess.Popen(
        [sys.executable, *program, *map(str, argv)],
        cwd=paths[0] if paths else ROOT,
        env={**os.environ, "PYTHONPATH": search, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(*argv, **options):
    """Starts a cluster of two workers."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    hosts = [f"localhost:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return [
        start(
            *argv, "--strategy", "multi_worker", **options,
            TF_CONFIG=json.dumps(
                {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
            ),
        )
        for index in range(2)
    ]  # fmt: skip


def finish(*processes):
    """Waits for the processes, asserts that they succeeded, and returns their outputs."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs
