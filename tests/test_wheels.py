"""Tests wheels/, .github and CITATION.cff: what `make wheels` finds and the workflows run."""

import pathlib
import re
import sys

import pytest
import tensorflow as tf

import tfwn
from wheels import build, try_out

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """A function that adds a fake Python, with or without headers, to an otherwise empty PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))

    def make(version, has_headers, status=0):
        path = tmp_path / f"python{version}"
        path.write_text(f"#!/bin/sh\necho {path}\necho {has_headers}\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_finds_the_pythons_with_headers(fake_python, capsys):
    complete = fake_python("3.11", True)
    without_headers = fake_python("3.12", False)
    fake_python("3.13", True, status=127)  # Like pyenv's shim of an inactive version.
    assert build.find_pythons() == {"3.11": complete}
    assert capsys.readouterr().out.splitlines() == [
        "Python 3.10: not found",
        f"Python 3.12: no Python.h for {without_headers}",
        "Python 3.13: not found",
    ]


def test_finds_pyenv_s_python_past_its_shim(fake_python, tmp_path):
    fake_python("3.13", True, status=127)
    real = tmp_path / ".pyenv" / "versions" / "3.13.0" / "bin" / "python3.13"
    real.parent.mkdir(parents=True)
    real.write_text(f"#!/bin/sh\necho {real}\necho True\n")
    real.chmod(0o755)
    assert build.find_pythons() == {"3.13": str(real)}


def test_the_versions_of_this_environment():
    assert try_out.this() == (
        ".".join(tf.__version__.split(".")[:2]),
        ".".join(map(str, sys.version_info[:2])),
    )


def test_a_fresh_environment_keeps_only_what_it_needs(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n/usr/bin/env\n")
    program.chmod(0o755)
    kept = {"LD_LIBRARY_PATH": "/nowhere", "PIP_PROGRESS_BAR": "off"}
    for name, value in (kept | {"PYTHONPATH": "/nowhere", "CXX": "g++"}).items():
        monkeypatch.setenv(name, value)
    output, _ = try_out.call(tmp_path).communicate()
    variables = dict(line.split("=", 1) for line in output.splitlines())
    assert variables.items() >= kept.items()
    assert variables["PATH"] == f"{tmp_path}/bin"
    assert not {"PYTHONPATH", "CXX"} & set(variables)


def test_workflows_run_only_what_can_be_run_here():
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        command
        for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
        for command in re.findall(r"^ *-? *run: (.*)$", path.read_text(), re.MULTILINE)
    ]
    assert commands
    for command in commands:
        target = command.removeprefix("make ")
        assert command == ".ci/run" or re.search(rf"^{target}:", makefile, re.MULTILINE), command


def test_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [tfwn.__version__]
