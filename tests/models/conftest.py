"""Fixtures for testing programs: running command lines, and the README's example program."""

import importlib.util
import sys

import numpy as np
import pytest
import tensorflow as tf
from support import SOURCE

from models.common import command_line


@pytest.fixture
def command(capsys):
    """A function that runs a program's command line and returns (exit status, stdout, stderr)."""

    def call(functions, *argv):
        status = 0
        try:
            command_line.main(functions, [str(word) for word in argv])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def normal_seeds(monkeypatch):
    """The set of all seeds with which stateless normal numbers are drawn."""
    seeds, draw = set(), tf.random.stateless_normal

    def record(shape, seed, **options):
        seeds.add(tuple(np.array(seed).tolist()))
        return draw(shape, seed, **options)

    monkeypatch.setattr(tf.random, "stateless_normal", record)
    return seeds


@pytest.fixture
def line(tmp_path, monkeypatch):
    """The README's example program, imported as the module `line`."""
    path = tmp_path / "program" / "line.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("line", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "line", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(line, command):
    """A function that runs `line` from its command line."""
    functions = {line.Config: "line.train", line.Evaluate: "line.evaluate"}
    return lambda *argv: command(functions, *argv)
