"""Tests models/dqn/vector.py: games in parallel, in this process and in others."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from catch import CATCH
from support import ROOT

from models.common.errors import UserError
from models.dqn.config import Config
from models.dqn.games import make_game
from models.dqn.vector import Games


@pytest.fixture
def games_of():
    made = []

    def make(count, seed=0, game="Breakout", processes=0):
        made.append(Games(Config(game=game), count, seed, processes=processes))
        return made[-1]

    yield make
    for games in made:
        games.close()


def copy(steps):
    return [np.array(column) for column in steps]


def test_an_ended_game_begins_anew_and_tells_its_score(games_of):
    games = games_of(3, game="SpaceInvaders")
    games.reset()
    alone = make_game(Config(game="SpaceInvaders"))
    alone.reset(seed=1)
    score, length, over = 0.0, 0, False
    while not over:
        frame, reward, over, _, _ = alone.step(1)
        score, length = score + reward, length + 1
        after = games.step(np.ones(3, int))
        if not over:
            np.testing.assert_array_equal(after.frames[1], frame)
    assert after.over[1]
    assert score > 0
    index = after.over[:1].sum()
    assert (after.scores[index], after.lengths[index]) == (score, length)
    np.testing.assert_array_equal(after.frames[1], alone.reset()[0])


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_number_of_processes_changes_nothing(rng, games_of, processes):
    here, there = games_of(5), games_of(5, processes=processes)
    assert there.processes == processes
    np.testing.assert_array_equal(here.reset(), there.reset())
    ended = 0
    for _ in range(300):
        actions = rng.integers(0, 4, 5)
        there.send(actions)
        expected = copy(here.step(actions))
        for a, b in zip(expected, there.recv(), strict=True):
            np.testing.assert_array_equal(a, b)
        ended += len(expected[-1])
    assert ended > 2


@pytest.mark.parametrize(("game", "processes"), [("Breakout", 0), ("Breakout", 2), (CATCH, 2)])
def test_all_games_are_saved_with_their_scores_so_far(rng, games_of, game, processes):
    games = games_of(3, game=game, processes=processes)
    games.reset()
    plan = rng.integers(0, 3, (700, 3))
    for actions in plan[:101]:
        games.step(actions)
    state = games.state_dict()
    expected = [copy(games.step(actions)) for actions in plan[101:]]
    assert sum(len(after[-1]) for after in expected) > 2
    other = games_of(3, 50, game, processes)
    other.reset()
    assert not other.load_state_dict(state).any()
    for actions, want in zip(plan[101:], expected, strict=True):
        for a, b in zip(want, other.step(actions), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_game_that_cannot_be_saved_begins_anew(games_of):
    games = games_of(2, game="catch:Unsaved-v0")
    first = games.reset().copy()
    for _ in range(3):
        games.step(np.ones(2, int))
    other = games_of(2, game="catch:Unsaved-v0")
    other.reset()
    assert other.load_state_dict(games.state_dict()).all()
    np.testing.assert_array_equal(other.frames, first)
    assert other.unfinished() == ([0, 0], [0, 0])


def test_an_error_in_a_process_is_told_in_one_line(games_of):
    games = games_of(2, game="catch:Broken-v0", processes=2)
    games.reset()
    for _ in range(3):
        games.step(np.ones(2, int))
    told = r"a game: RuntimeError: the ball is lost \(catch.py, line \d+\)$"
    with pytest.raises(UserError, match=told):
        games.step(np.ones(2, int))
    with pytest.raises(UserError, match=r"cannot be made .*no_such"):
        games_of(2, game="no_such:Game-v0", processes=2)
    dying = games_of(4, game="catch:Dying-v0", processes=2)
    dying.reset()
    with pytest.raises(UserError, match=r"plays games 0 to 1 was killed .*-9.*--num-envs"):
        dying.step(np.ones(4, int))


PLAYER = """
import signal, sys
import numpy as np
from models.dqn.config import Config
from models.dqn.vector import Games
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # It may be inherited as ignored.
    games = Games(Config(game="Pong"), 4, 0, processes=2)
    games.reset()
    for number in range(10**9):
        games.send(np.zeros(4, int))
        if number == 3:
            print(*[group._process.pid for group in games._groups], flush=True)
        if sys.argv[1] == "leave" and number == 4:
            break  # Without close(), between send() and recv().
        try:
            games.recv()
        except KeyboardInterrupt:
            break
"""


@pytest.mark.parametrize("way", ["SIGKILL", "SIGINT", "SIGTERM", "leave"])
def test_no_process_outlives_its_learner(tmp_path, way):
    (tmp_path / "player.py").write_text(PLAYER)
    player = subprocess.Popen(
        [sys.executable, tmp_path / "player.py", way], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )  # fmt: skip
    try:
        pids = list(map(int, player.stdout.readline().split()))
        assert len(pids) == 2
        if way == "SIGINT":  # To the whole group, as a terminal sends it.
            os.killpg(player.pid, signal.SIGINT)
        elif way != "leave":
            player.send_signal(signal.Signals[way])
        _, err = player.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))
        assert "Traceback" not in err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(player.pid, signal.SIGKILL)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
