"""Tests the progress lines."""

import io
import re

import pytest
import rich.console

from models.common import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance(line, step, seconds):
        now[0] += seconds
        line.update(step)
        return line.line(step)

    return advance


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
def test_an_evaluation_is_shown_if_it_takes_long(capsys, monkeypatch, pause):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.evaluation() as report:
        for done in range(100):
            report(done, 100)
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


def test_neither_compiling_nor_an_evaluation_is_in_the_rate(clock):
    line = progress.Progress(100)
    assert clock(line, 1, 60) == "step 1/100"  # The first step compiles.
    assert clock(line, 2, 0.5) == "step 2/100  2 steps/s  49s left"
    for step in range(3, 10):
        clock(line, step, 0.5)
    assert clock(line, 10, 300) == "step 10/100  2 steps/s  45s left"  # An evaluation.


def test_the_rate_is_not_measured_in_the_warm_up(clock):
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
    shown = terminal.file.getvalue()
    last = [text for text in re.split(r"[\r\n]|\x1b\[\S*?[A-Za-z]", shown) if "step" in text][-1]
    assert "20,000,200/50,000,000  20,000 images/s  41h39m left" in last
    assert len(last) <= columns
    assert ("value0 1,234" in last, "value4" in last) == (columns == 120, False)
