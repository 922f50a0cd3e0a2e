"""A small game that DQN solves within a minute, and helpers for the tests of DQN."""

import os
import signal

import gymnasium
import numpy as np

from models.dqn.config import Config
from models.dqn.replay import Batch

CATCH = "catch:Catch-v0"


class Unsaved(gymnasium.Env):
    """A ball falls 5 rows. The paddle below moves left, stays, or moves right. Best return: 1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 as gymnasium does
    observation_space = gymnasium.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.paddle, self.ball = 0, 2, int(self.np_random.integers(5))
        return self.frame(), {}

    def frame(self):
        frame = np.zeros((84, 84), np.uint8)
        for row, column in ((self.row, self.ball), (5, self.paddle)):
            frame[14 * row : 14 * row + 14, 17 * column : 17 * column + 16] = 255
        return frame

    def render(self):
        return np.repeat(self.frame()[..., None], 3, 2)

    def step(self, action):
        self.paddle = int(min(max(self.paddle + action - 1, 0), 4))
        self.row += 1
        over = self.row == 5
        reward = 0.0 if not over else 1.0 if self.paddle == self.ball else -1.0
        return self.frame(), reward, over, False, {}


class Catch(Unsaved):
    def state_dict(self):
        return {"generator": self.np_random.bit_generator.state,
                "at": [self.row, self.paddle, self.ball]}  # fmt: skip

    def load_state_dict(self, state):
        self.np_random.bit_generator.state = state["generator"]
        self.row, self.paddle, self.ball = state["at"]


class Broken(Catch):
    """Fails in the fourth step of every episode."""

    def step(self, action):
        if self.row == 3:
            raise RuntimeError("the ball is lost")
        return super().step(action)


class Dying(Catch):
    """Kills its process, as a crash in a library does."""

    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


class Colorful(Catch):
    """Has observations in color and actions that are counted from 1."""

    observation_space = gymnasium.spaces.Box(0, 255, (100, 120, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3, start=1)

    def frame(self):
        wide = np.zeros((100, 120, 3), np.uint8)
        wide[:84, :84, 1] = super().frame()
        return wide

    def step(self, action):
        return super().step(action - 1)


for kind in (Catch, Unsaved, Broken, Dying):
    gymnasium.register(f"{kind.__name__}-v0", kind)
gymnasium.register("Colorful-v0", Colorful, max_episode_steps=3)
gymnasium.register(
    "Float-v0", lambda **_: gymnasium.wrappers.TransformObservation(
        Catch(), lambda x: x / 255.0, gymnasium.spaces.Box(0, 1, (84, 84), np.float64)
    )
)  # fmt: skip


def config_of(**values):
    return Config.of_preset("smoke", **values)


def random_batch(rng, size=16):
    return Batch(
        rng.integers(0, 256, (size, 5, 84, 84)).astype(np.uint8),
        rng.integers(0, 6, size).astype(np.int32),
        rng.choice([-1.0, 0.0, 1.0], size).astype(np.float32),
        rng.random(size) < 0.3,
    )


def random_states(rng, size=64):
    return rng.integers(0, 256, (size, 84, 84, 4)).astype(np.uint8)
