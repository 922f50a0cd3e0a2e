"""Atari games as DQN sees them, several side by side, playing while the learner learns.

The emulator is driven directly (ale_py.ALEInterface): its state can then be saved, which ale_py's
vector environment does not offer, and frames are scaled as the paper's code scales them.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from models.common.errors import UserError
from models.dqn.config import Config, rom_name

FRAME_SHAPE = (84, 84)


def make_games(config: Config, count: int, seed: int, *, testing: bool = False) -> "Environments":
    """Returns `count` games that begin and end as the Config's variant and protocol ask."""
    max_frames = 18_000 if testing and config.protocol == "nature" else 0
    noops = 2 if config.variant == "deep_q_rl" else 0
    return Environments(
        lambda index: Atari(
            config.game,
            (seed * 1009 + index) % 2**31,
            max_frames=max_frames,
            start_noops=noops,
            life_noops=0 if testing else noops,
        ),
        count,
    )


class Step(NamedTuple):
    """The outcome of an action."""

    frame: np.ndarray  # uint8 [84, 84]: the next observation.
    reward: float  # Not clipped.
    life_lost: bool
    over: bool  # The game is over.
    cut: bool  # The game was stopped at its maximum length, which is not an end of the task.


class Atari:
    """An Atari game: minimal action set, no sticky actions, a reset only when the game is over.

    A frame is the luminance of the maximum of the last two screens, scaled to 84 x 84.

    Args:
      game: name, such as SpaceInvaders or space_invaders.
      seed: of the emulator and of the number of no-ops.
      frame_skip: frames for which an action is repeated.
      noop_max: a game starts with 1 to `noop_max` frames of no-op; 0 for none.
      max_frames: maximum length of a game in frames of 1/60 s; 0 for no limit.
      start_noops, life_noops: extra frames of no-op when a game starts, and after a lost life.
    """

    def __init__(
        self,
        game: str,
        seed: int,
        *,
        frame_skip: int = 4,
        noop_max: int = 30,
        max_frames: int = 0,
        start_noops: int = 0,
        life_noops: int = 0,
    ):
        import ale_py

        path = rom_path(game)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setInt("random_seed", seed % 2**31)
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.setInt("max_num_frames_per_episode", 0)
        self._ale.loadROM(path)
        self._restore = ale_py.ALEState
        self._actions = [action.value for action in self._ale.getMinimalActionSet()]
        self.num_actions = len(self._actions)
        self._generator = np.random.default_rng([seed, 1])
        self._frame_skip, self._noop_max = frame_skip, noop_max
        self._max_frames = max_frames
        self._start_noops, self._life_noops = start_noops, life_noops
        # The last two screens, the older one first.
        self.screens = np.zeros((2, *self._ale.getScreenDims(), 3), np.uint8)

    def reset(self) -> np.ndarray:
        """Starts a game and returns its first frame."""
        noops = self._generator.integers(1, self._noop_max + 1) if self._noop_max else 0
        self._ale.reset_game()
        self._ale.getScreenRGB(self.screens[1])
        for _ in range(noops + self._start_noops):
            self._act(0)
            if self._ale.game_over():
                self._ale.reset_game()
        return self._observe()

    def step(self, action: int) -> Step:
        """Plays one action (an index of the minimal action set)."""
        lives, reward, code = self._ale.lives(), 0, self._actions[action]
        for passed in range(self._frame_skip):
            # Only the last two screens are used.
            reward += self._act(code, look=passed >= self._frame_skip - 2)
            if self._ale.game_over():
                break
        over = self._ale.game_over()
        cut = bool(self._max_frames) and self._ale.getEpisodeFrameNumber() >= self._max_frames
        lost = self._ale.lives() < lives
        for _ in range(self._life_noops if lost and not over else 0):
            self._act(0)
        return Step(self._observe(), float(reward), lost, over, cut and not over)

    def state_dict(self) -> dict[str, Any]:
        """Returns the emulator's state, the random states and the last screens."""
        return {
            "emulator": self._ale.cloneState(include_rng=True).serialize(),
            "generator": self._generator.bit_generator.state,
            "screens": self.screens.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state."""
        self._ale.restoreState(self._restore(state["emulator"]))
        self._generator.bit_generator.state = state["generator"]
        self.screens[:] = state["screens"]

    def _act(self, code: int, look: bool = True) -> int:
        reward = self._ale.act(code)
        if look:
            self.screens[0] = self.screens[1]
            self._ale.getScreenRGB(self.screens[1])
        return reward

    def _observe(self) -> np.ndarray:
        return preprocess(np.maximum(self.screens[0], self.screens[1]))


def preprocess(screen: np.ndarray) -> np.ndarray:
    """Returns the luminance of a screen, uint8 [height, width, 3], scaled to uint8 [84, 84].

    Luminance is 0.299 R + 0.587 G + 0.114 B, rounded. Scaling interpolates bilinearly between
    pixel centers, without smoothing (OpenCV's INTER_LINEAR), and rounds. All of it is integer
    arithmetic without matrix products, whose threads would wait for those of the learner.
    """
    (top, bottom, from_top, from_bottom), (left, right, from_left, from_right) = (
        _taps(source, target) for source, target in zip(screen.shape, FRAME_SHAPE, strict=False)
    )
    rgb = screen.astype(np.uint32)
    luminance = (rgb[..., 0] * 299 + rgb[..., 1] * 587 + rgb[..., 2] * 114 + 500) // 1000
    rows = luminance[top] * from_top[:, None] + luminance[bottom] * from_bottom[:, None]
    scaled = rows.take(left, 1) * from_left + rows.take(right, 1) * from_right
    divisor = (from_top[0] + from_bottom[0]) * (from_left[0] + from_right[0])
    return ((scaled + divisor // 2) // divisor).astype(np.uint8)


def rom_path(game: str) -> str:
    """Returns the path of a game's ROM."""
    from ale_py import roms

    path = roms.get_rom_path(rom_name(game))
    if path is None or not path.exists():
        raise UserError(
            f"--game {game}: ale-py lacks its ROM; reinstall it: "
            "pip install --force-reinstall --no-deps ale-py"
        )
    return str(path)


@functools.cache
def _taps(source: int, target: int) -> tuple[np.ndarray, ...]:
    """Returns the two source pixels of each target pixel, and their integer weights."""
    # The center of target pixel i lies at source pixel ((2 i + 1) source - target) / (2 target).
    at, rest = np.divmod((2 * np.arange(target) + 1) * source - target, 2 * target)
    common = math.gcd(2 * target, *map(int, rest))
    weights = np.array([2 * target - rest, rest]) // common
    pixels = np.clip([at, at + 1], 0, source - 1)
    return (*pixels, *weights.astype(np.uint32))


class Steps(NamedTuple):
    """The outcomes of all environments' actions; see Step."""

    frames: np.ndarray  # uint8 [environments, 84, 84]; after an end the new game's first frame.
    rewards: np.ndarray  # float32 [environments]
    life_lost: np.ndarray  # bool [environments]
    over: np.ndarray  # bool [environments]
    cut: np.ndarray  # bool [environments]
    scores: list[float]  # Of the games that ended.
    lengths: list[int]  # Their numbers of actions.


class Environments:
    """Several games side by side: send(actions), do other work, recv() the outcomes.

    A game that ends is restarted at once. One thread plays the games in order, so a seed always
    gives the same games.

    Args:
      make: returns the game of an index: num_actions, reset(), step(action), state_dict() and
        load_state_dict(state), as Atari has them.
      count: the number of games.
    """

    def __init__(self, make: Callable[[int], Any], count: int):
        self.games = [make(index) for index in range(count)]
        self.num_actions = self.games[0].num_actions
        self._scores = np.zeros(count)
        self._lengths = np.zeros(count, np.int64)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "environments")
        self._pending: concurrent.futures.Future | None = None

    def __len__(self) -> int:
        return len(self.games)

    def reset(self) -> np.ndarray:
        """Starts all games and returns their first frames, uint8 [environments, 84, 84]."""
        self._scores[:], self._lengths[:] = 0, 0
        return np.stack([game.reset() for game in self.games])

    def send(self, actions: np.ndarray) -> None:
        """Starts playing one action in each game."""
        self._pending = self._thread.submit(self.step, actions)

    def recv(self) -> Steps:
        """Waits for the outcomes of the actions sent."""
        assert self._pending is not None, "recv() without send()"
        pending, self._pending = self._pending, None
        return pending.result()

    def unfinished(self) -> tuple[list[float], list[int]]:
        """Returns the scores and lengths of the games in progress."""
        return self._scores.tolist(), self._lengths.tolist()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything the games' future depends on; not between send() and recv()."""
        assert self._pending is None, "state_dict() between send() and recv()"
        return {
            "games": [game.state_dict() for game in self.games],
            "scores": self._scores.copy(),
            "lengths": self._lengths.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state."""
        for game, saved in zip(self.games, state["games"], strict=True):
            game.load_state_dict(saved)
        self._scores[:], self._lengths[:] = state["scores"], state["lengths"]

    def step(self, actions: np.ndarray) -> Steps:
        """Plays one action in each game."""
        frames, scores, lengths, rest = [], [], [], []
        for index, (game, action) in enumerate(zip(self.games, actions, strict=True)):
            frame, *outcome = game.step(int(action))
            reward, _, over, cut = outcome
            self._scores[index] += reward
            self._lengths[index] += 1
            if over or cut:
                scores.append(float(self._scores[index]))
                lengths.append(int(self._lengths[index]))
                self._scores[index], self._lengths[index] = 0, 0
                frame = game.reset()
            frames.append(frame)
            rest.append(outcome)
        rewards, *endings = zip(*rest, strict=True)
        life_lost, dead, stopped = (np.array(column, bool) for column in endings)
        return Steps(
            np.stack(frames), np.array(rewards, np.float32), life_lost, dead, stopped,
            scores, lengths,
        )  # fmt: skip


class FrameStack:
    """The last 4 frames of each game; zeros before its first frame.

    Attributes:
      frames: uint8 [environments, 84, 84, 4], the newest last.
    """

    def __init__(self, count: int, size: int = 4):
        self.frames = np.zeros((count, *FRAME_SHAPE, size), np.uint8)

    def push(self, frames: np.ndarray, begins: np.ndarray | None = None) -> np.ndarray:
        """Adds one frame per game; `begins`, bool [environments], marks first frames of a game."""
        self.frames[..., :-1] = self.frames[..., 1:]
        if begins is not None:
            self.frames[begins] = 0
        self.frames[..., -1] = frames
        return self.frames
