"""Games in parallel: in this process, or in one process per core while the learner learns."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from models.common.errors import UserError, first_line
from models.dqn.config import Config
from models.dqn.games import FRAME_SHAPE, make_game

Make = Callable[[], gymnasium.Env]


class Steps(NamedTuple):
    """The outcomes of all games' actions; valid until the next actions are sent."""

    frames: np.ndarray  # uint8 [games, 84, 84]; the next game's first frame if one ended.
    rewards: np.ndarray  # float32 [games], not clipped.
    life_lost: np.ndarray  # bool [games]
    over: np.ndarray  # bool [games]
    cut: np.ndarray  # bool [games]: stopped at the maximum length, which does not end the task.
    scores: list[float]  # Of the games that ended.
    lengths: list[int]  # Their lengths in actions.


class Games:
    """Several games in parallel: send(actions), do other work, recv() the outcomes.

    A game that ends is restarted at once. A seed always produces the same games, in any number of
    processes. One message serves all games of a process. gymnasium's AsyncVectorEnv has a process
    and a pickled message for each game, and passing messages takes a quarter of the games' time.

    Args:
      config: the game and how it is played.
      count: number of games.
      seed: seeds all games.
      testing: see `make_game`.
      processes: number of processes, 0 to play in this one; by default one per core, or 0 for a
        single game.

    Attributes:
      num_actions: number of actions of the game.
      processes: number of processes.
    """

    def __init__(
        self,
        config: Config,
        count: int,
        seed: int,
        *,
        testing: bool = False,
        processes: int | None = None,
    ):
        make = functools.partial(make_game, config, testing)
        if processes is None:
            processes = 0 if count == 1 else len(os.sched_getaffinity(0))
        self.processes = min(processes, count)
        self._count = count
        self._seeds = [(seed * 1009 + index) % 2**31 for index in range(count)]
        self._scores, self._lengths = np.zeros(count), np.zeros(count, np.int64)
        self._pending = False
        context = multiprocessing.get_context("forkserver")  # A fork inherits TensorFlow's locks.
        context.set_forkserver_preload([__name__])
        memory = context.RawArray("B", count * np.dtype(_SLOT).itemsize)
        self._slots = np.frombuffer(memory, _SLOT)
        self._parts = [
            slice(part[0], part[-1] + 1)
            for part in np.array_split(np.arange(count), max(self.processes, 1))
        ]
        if self.processes:
            self._groups: list[Any] = [
                _Process(context, make, memory, part) for part in self._parts
            ]
        else:
            self._groups = [_Group(make, self._slots)]
        self.num_actions = self._call("num_actions")[0]

    def __len__(self) -> int:
        return self._count

    def reset(self) -> np.ndarray:
        """Starts all games and returns their first frames, uint8 [games, 84, 84]."""
        self._scores[:], self._lengths[:] = 0, 0
        self._call("reset", self._seeds)
        return self._slots["frame"]

    def send(self, actions: np.ndarray) -> None:
        """Starts playing one action in each game."""
        self._slots["action"] = actions
        for group in self._groups:
            group.send("step", None)
        self._pending = True

    def recv(self) -> Steps:
        """Waits for the outcomes of the actions sent."""
        assert self._pending, "recv() without send()"
        for group in self._groups:
            group.recv()
        self._pending = False
        slots = self._slots
        self._scores += slots["reward"]
        self._lengths += 1
        ended = np.flatnonzero(slots["over"] | slots["cut"])
        scores, lengths = self._scores[ended].tolist(), self._lengths[ended].tolist()
        self._scores[ended], self._lengths[ended] = 0, 0
        return Steps(
            slots["frame"], slots["reward"], slots["life_lost"], slots["over"], slots["cut"],
            scores, lengths,
        )  # fmt: skip

    def step(self, actions: np.ndarray) -> Steps:
        """Plays one action in each game."""
        self.send(actions)
        return self.recv()

    def unfinished(self) -> tuple[list[float], list[int]]:
        """Returns the scores and lengths of the games in progress."""
        return self._scores.tolist(), self._lengths.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything the games' future depends on; not between send() and recv()."""
        assert not self._pending, "state_dict() between send() and recv()"
        return {
            "games": [state for states in self._call("states") for state in states],
            "scores": self._scores.copy(),
            "lengths": self._lengths.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> np.ndarray:
        """Restores a saved state; returns which games could not be saved and start over."""
        anew = np.array([game is None for game in state["games"]])
        self._scores[:] = np.where(anew, 0, state["scores"])
        self._lengths[:] = np.where(anew, 0, state["lengths"])
        self._call("restore", state["games"])
        return anew

    @property
    def frames(self) -> np.ndarray:
        """The games' current frames, uint8 [games, 84, 84]."""
        return self._slots["frame"]

    def close(self) -> None:
        """Ends the processes."""
        for group in self._groups:
            group.close()

    def _call(self, name: str, values: list[Any] | None = None) -> list[Any]:
        """Calls a method of every group, each with its share of the values."""
        for group, part in zip(self._groups, self._parts, strict=True):
            group.send(name, values and values[part])
        return [group.recv() for group in self._groups]


# What a game and its player exchange, in memory shared by all processes.
_SLOT = [
    ("frame", np.uint8, FRAME_SHAPE),
    ("action", np.int64),
    ("reward", np.float32),
    ("life_lost", np.bool_),
    ("over", np.bool_),
    ("cut", np.bool_),
]


class _Group:
    """The games of one process: send() calls a method, and recv() returns its result."""

    def __init__(self, make: Make, slots: np.ndarray):
        self._slots = slots
        self._games = gymnasium.vector.SyncVectorEnv(
            [make] * len(slots), copy=False, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
        )
        self._never = np.zeros(len(slots), bool)

    def send(self, name: str, value: Any) -> None:
        self._result = getattr(self, name)(value)

    def recv(self) -> Any:
        return self._result

    def close(self) -> None:
        self._games.close()

    def num_actions(self, _: None) -> int:
        return int(self._games.single_action_space.n)

    def reset(self, seeds: list[int]) -> None:
        self._slots["frame"], _ = self._games.reset(seed=seeds)

    def step(self, _: None) -> None:
        slots = self._slots
        frames, slots["reward"], slots["over"], slots["cut"], infos = self._games.step(
            slots["action"]
        )
        slots["frame"] = frames
        slots["life_lost"] = infos.get("life_lost", self._never)

    def states(self, _: None) -> list[Any]:
        return list(self._games.call("state_dict"))

    def restore(self, states: list[Any]) -> None:
        for game, state in zip(self._games.envs, states, strict=True):
            if state is not None:  # Otherwise it was reset and starts over.
                game.get_wrapper_attr("load_state_dict")(state)


class _Process:
    """A group in its own process."""

    def __init__(self, context: Any, make: Make, memory: Any, part: slice):
        self._part = part
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, make, memory, part))
        self._process.start()
        there.close()
        # Runs even if close() is never called, before Python waits for the process at exit.
        self.close = weakref.finalize(self, _end, self._pipe, self._process)

    def send(self, name: str, value: Any) -> None:
        with self._explained():
            self._pipe.send_bytes(pickle.dumps((name, value)))

    def recv(self) -> Any:
        with self._explained():
            error, result = pickle.loads(self._pipe.recv_bytes())
        if error:
            raise UserError(error)
        return result

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except (EOFError, OSError):
            self._process.join(1)
            raise UserError(
                f"the process that plays games {self._part.start} to {self._part.stop - 1} was "
                f"killed (exit status {self._process.exitcode}); continue with --resume, "
                "or if memory ran out, start again with a lower --num-envs"
            ) from None


def _end(pipe: Any, process: Any) -> None:
    pipe.close()
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()


def _work(pipe: Any, make: Make, memory: Any, part: slice) -> None:
    """Answers calls until the other end is closed or its process has died."""

    def answer(error: str | None, result: Any = None) -> None:
        with contextlib.suppress(ConnectionError):  # The next receive fails too and ends the loop.
            pipe.send_bytes(pickle.dumps((error, result)))  # send() takes several times longer.

    for number in (signal.SIGINT, signal.SIGTERM):  # The learner handles them: it saves and exits.
        signal.signal(number, signal.SIG_IGN)
    try:
        group = None
        while True:
            name, value = pickle.loads(pipe.recv_bytes())
            group = group or _Group(make, np.frombuffer(memory, _SLOT)[part])
            group.send(name, value)
            answer(None, group.recv())
    except (EOFError, ConnectionError):
        pass
    except UserError as error:
        answer(str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        answer(f"a game: {type(error).__name__}: {first_line(error)} ({where})")
