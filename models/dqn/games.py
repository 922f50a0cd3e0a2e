"""Games as DQN sees them: gymnasium environments whose observations are 84 x 84 gray pixels."""

import functools
import math
from typing import Any

import gymnasium
import numpy as np

from models.common.errors import UserError, first_line
from models.dqn.config import Config, rom_of

SIZE = 84
FRAME_SHAPE = (SIZE, SIZE)
SKIP = 4  # Frames for which an action is repeated.


def make_game(config: Config, testing: bool = False, show: bool = False) -> gymnasium.Env:
    """Returns a game that starts and ends as the Config's variant and protocol require.

    Args:
      config: the game and how it is played.
      testing: apply the protocol's time limit, and skip the no-ops after a lost life.
      show: allow render().
    """
    limit = 18_000 if testing and config.protocol == "nature" else 0
    noops = 2 if config.variant == "deep_q_rl" else 0
    rom = rom_of(config.game)
    try:
        if rom is None:
            mode = "rgb_array" if show else None
            # Image enforces the episode limit, because TimeLimit's count cannot be saved.
            env = gymnasium.make(config.game, render_mode=mode, max_episode_steps=-1)
            spec = gymnasium.spec(config.game.rpartition(":")[2])
            limits = filter(None, (limit // SKIP, spec.max_episode_steps))
            return Image(env, config.game, config.scaling, min(limits, default=0))
        import ale_py

        gymnasium.register_envs(ale_py)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        env = gymnasium.make(
            f"ALE/{config.game}-v5",
            frameskip=1,
            repeat_action_probability=0.0,
            max_num_frames_per_episode=0,
            disable_env_checker=True,
        )
    except UserError:
        raise
    except Exception as error:  # Gymnasium and environments raise errors of many kinds.
        raise UserError(f"--game {config.game}: cannot be made ({first_line(error)})") from error
    return Atari(
        env,
        config.scaling,
        max_frames=limit,
        start_noops=noops,
        life_noops=0 if testing else noops,
    )


class Atari(gymnasium.Wrapper):
    """An Atari game with the minimal action set, reset only when the game is over.

    An observation is the luminance of the maximum of the last two screens, scaled to 84 x 84. The
    emulator is driven directly, because gymnasium's AtariEnv.step copies an RGB screen in every
    frame, which takes a third as long as emulating the frame.

    Args:
      env: an AtariEnv, without sticky actions.
      scaling: see `scale`.
      noop_max: a game starts with 1 to `noop_max` no-op frames; 0 for none.
      max_frames: maximum length of a game in frames of 1/60 s, after which it is truncated; 0 for
        no limit.
      start_noops, life_noops: extra no-op frames at the start of a game and after a lost life.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        scaling: str = "bilinear",
        *,
        noop_max: int = 30,
        max_frames: int = 0,
        start_noops: int = 0,
        life_noops: int = 0,
    ):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, FRAME_SHAPE, np.uint8)
        self._ale = env.unwrapped.ale
        self._actions = self._ale.getMinimalActionSet()
        self._scaling, self._noop_max, self._max_frames = scaling, noop_max, max_frames
        self._start_noops, self._life_noops = start_noops, life_noops
        self._generator = np.random.default_rng()
        self._screens = Screens(self._ale)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        """Starts a game; a seed determines the no-ops of this and of the following games."""
        if seed is not None:
            self._generator = np.random.default_rng([seed, 1])
        self.env.reset(seed=seed, options=options)
        noops = self._generator.integers(1, self._noop_max + 1) if self._noop_max else 0
        self._screens.grab()
        self._screens.grab()  # Again, to drop the last screen of the previous game.
        for _ in range(noops + self._start_noops):
            self._ale.act(0)
            self._screens.grab()
            if self._ale.game_over():
                self._ale.reset_game()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Plays an action for 4 frames; info contains life_lost=True if a life was lost."""
        lives, reward, code = self._ale.lives(), 0, self._actions[action]
        for passed in range(SKIP):
            reward += self._ale.act(code)
            if passed >= SKIP - 2:  # Only the last two screens are used.
                self._screens.grab()
            if self._ale.game_over():
                break
        over = self._ale.game_over()
        cut = bool(self._max_frames) and self._ale.getEpisodeFrameNumber() >= self._max_frames
        lost = self._ale.lives() < lives
        for _ in range(self._life_noops if lost and not over else 0):
            self._ale.act(0)
            self._screens.grab()
        info = {"life_lost": True} if lost else {}
        return self._observe(), float(reward), over, cut and not over, info

    def render(self) -> np.ndarray:
        """Returns the observed screen in color and full size, uint8 [height, width, 3]."""
        return self._screens.color()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the emulator, including its random state, and of the no-ops."""
        return {
            "emulator": self._ale.cloneState(include_rng=True).serialize(),
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state."""
        import ale_py

        self._ale.restoreState(ale_py.ALEState(state["emulator"]))
        self._generator.bit_generator.state = state["generator"]

    def _observe(self) -> np.ndarray:
        return scale(self._screens.luminance(), self._scaling)


class Screens:
    """An emulator's last two screens as palette indices, and the maximum of the two.

    Copying palette indices takes a twentieth of the time of copying an RGB screen, and few of them
    change from one screen to the next. The color of an index is read from an RGB screen when the
    index first appears.
    """

    def __init__(self, ale: Any):
        self._ale = ale
        self._newer = ale.getScreen()
        self._older = self._newer.copy()
        self._changed = np.zeros(0, np.int64)  # Where the two screens differ.
        self._known = np.zeros(256, bool)
        self._colors = np.zeros((256, 3), np.uint8)
        self._learn()

    def grab(self) -> None:
        """Reads the emulator's screen."""
        self._older, self._newer = self._newer, self._older
        self._ale.getScreen(self._newer)
        self._changed = np.flatnonzero(self._newer != self._older)
        numbers = self._newer.take(self._changed)
        if self._known.take(numbers).all():
            self._gray.put(self._changed, self._single.take(numbers))
        else:
            self._learn()

    def luminance(self) -> np.ndarray:
        """Returns the luminance of the maximum of both screens, uint8 [height, width]."""
        both = self._newer.take(self._changed), self._older.take(self._changed)
        gray = self._gray.copy()
        gray.put(self._changed, self._paired[both])
        return gray

    def color(self) -> np.ndarray:
        """Returns the maximum of both screens, uint8 [height, width, 3]."""
        return np.maximum(self._colors[self._newer], self._colors[self._older])

    def _learn(self) -> None:
        self._colors[self._newer] = self._ale.getScreenRGB()
        self._known[self._newer] = True
        self._paired = luminance(np.maximum(self._colors[:, None], self._colors[None]))
        self._single = self._paired.diagonal().copy()
        self._gray = self._single[self._newer]  # Of the newer screen.


class Image(gymnasium.Wrapper):
    """A non-Atari environment, observed as the luminance of its images scaled to 84 x 84.

    An action is played once; any skipping of frames is left to the environment. A game can be
    saved if the environment has state_dict() and load_state_dict(state).

    Args:
      env: an environment with discrete actions and images of type uint8 as observations.
      name: the name that the user gave.
      scaling: see `scale`.
      max_steps: maximum length of an episode, after which it is truncated; 0 for no limit.
    """

    def __init__(
        self, env: gymnasium.Env, name: str, scaling: str = "bilinear", max_steps: int = 0
    ):
        super().__init__(env)
        seen, actions = env.observation_space, env.action_space
        if not isinstance(actions, gymnasium.spaces.Discrete) or actions.n > 256:
            raise UserError(
                f"--game {name}: its actions are {type(actions).__name__}; DQN needs Discrete "
                "actions, at most 256"
            )
        shape = seen.shape or ()
        if seen.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)):
            raise UserError(
                f"--game {name}: its observations are {type(seen).__name__} {list(shape)} of type "
                f"{seen.dtype}; DQN needs images, Box [height, width] or [height, width, 1 or 3] "
                "of type uint8"
            )
        self.observation_space = gymnasium.spaces.Box(0, 255, FRAME_SHAPE, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(int(actions.n))
        self._first, self._scaling, self._max_steps = actions.start, scaling, max_steps
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        """Starts an episode."""
        image, _ = self.env.reset(seed=seed, options=options)
        self._steps = 0
        return self._observe(image), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Plays an action."""
        image, reward, over, cut, _ = self.env.step(self._first + action)
        self._steps += 1
        cut |= self._steps == self._max_steps
        return self._observe(image), float(reward), bool(over), bool(cut and not over), {}

    def render(self) -> np.ndarray:
        """Returns the rendered environment, or its last observation if it cannot render, in RGB."""
        picture = self.env.render() if self.env.render_mode else self._image
        picture = np.asarray(picture)
        return np.broadcast_to(picture.reshape(*picture.shape[:2], -1), (*picture.shape[:2], 3))

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the environment's state, or None if it cannot be saved."""
        if not all(map(self.env.has_wrapper_attr, ("state_dict", "load_state_dict"))):
            return None
        return {"steps": self._steps, "env": self.env.get_wrapper_attr("state_dict")()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state."""
        self._steps = state["steps"]
        self.env.get_wrapper_attr("load_state_dict")(state["env"])

    def _observe(self, image: np.ndarray) -> np.ndarray:
        self._image = image
        gray = luminance(image) if image.shape[2:] == (3,) else image.reshape(image.shape[:2])
        return scale(gray, self._scaling)


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Returns 0.299 R + 0.587 G + 0.114 B, rounded, for uint8 [..., 3]."""
    wide = rgb.astype(np.uint32)
    total = wide[..., 0] * 299 + wide[..., 1] * 587 + wide[..., 2] * 114
    return ((total + 500) // 1000).astype(np.uint8)


def scale(gray: np.ndarray, scaling: str = "bilinear") -> np.ndarray:
    """Returns an image, uint8 [height, width], scaled to uint8 [84, 84] and rounded.

    "bilinear" interpolates between pixel centers, without smoothing (OpenCV's INTER_LINEAR), as
    deep_q_rl does. "area" averages the area of each target pixel, as Nature's code does. Both use
    integer arithmetic without matrix products, whose threads would wait for the learner's.
    """
    rows, columns, total = _both_taps(gray.shape, scaling)
    scaled = sum(gray.take(pixels, 0) * weights[:, None] for pixels, weights in rows)
    scaled = sum(scaled.take(pixels, 1) * weights for pixels, weights in columns)
    return ((scaled + total // 2) // total).astype(np.uint8)


@functools.cache
def _both_taps(shape: tuple[int, int], scaling: str) -> tuple[list, list, Any]:
    """Returns the (pixels, weights) taps of rows and of columns, and the total weight."""
    axes = [_taps(length, scaling == "area") for length in shape]
    total = math.prod(int(weights.sum(0)[0]) for _, weights in axes)
    dtype = np.min_scalar_type(256 * total)  # The smallest dtype that suffices is the fastest.
    rows, columns = ([*zip(pixels, weights.astype(dtype), strict=True)] for pixels, weights in axes)
    return rows, columns, dtype.type(total)


def _taps(source: int, area: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns each target pixel's source pixels and their integer weights, both [taps, 84]."""
    if area:
        # In units of 1/84 source pixel, target pixel i spans i * source to (i + 1) * source.
        begin = np.arange(SIZE) * source
        pixels = begin // SIZE + np.arange(-(-source // SIZE) + 1)[:, None]
        ends = np.minimum((pixels + 1) * SIZE, begin + source)
        weights = np.maximum(ends - np.maximum(pixels * SIZE, begin), 0)
        used = weights.any(1)
        pixels, weights = pixels[used], weights[used]
    else:
        # The center of target pixel i is at source pixel ((2 i + 1) * source - 84) / (2 * 84).
        at, rest = np.divmod((2 * np.arange(SIZE) + 1) * source - SIZE, 2 * SIZE)
        pixels, weights = np.array([at, at + 1]), np.array([2 * SIZE - rest, rest])
    return np.clip(pixels, 0, source - 1), weights // math.gcd(*map(int, weights.ravel()))
