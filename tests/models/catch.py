"""A game so small that DQN solves it in a minute, and what the tests of DQN share."""

import numpy as np

from models.dqn.config import Config
from models.dqn.games import Environments, Step
from models.dqn.replay import Batch


class Catch:
    """A ball falls 5 rows; the paddle below moves left, not at all, or right. Optimal return: 1."""

    num_actions = 3

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def reset(self):
        self.row, self.paddle, self.ball = 0, 2, int(self.generator.integers(5))
        return self.frame()

    def frame(self):
        frame = np.zeros((84, 84), np.uint8)
        for row, column in ((self.row, self.ball), (5, self.paddle)):
            frame[14 * row : 14 * row + 14, 17 * column : 17 * column + 16] = 255
        return frame

    def step(self, action):
        self.paddle = min(max(self.paddle + action - 1, 0), 4)
        self.row += 1
        over = self.row == 5
        reward = 0.0 if not over else 1.0 if self.paddle == self.ball else -1.0
        return Step(self.frame(), reward, False, over, False)

    def state_dict(self):
        return {"generator": self.generator.bit_generator.state,
                "at": [self.row, self.paddle, self.ball]}  # fmt: skip

    def load_state_dict(self, state):
        self.generator.bit_generator.state = state["generator"]
        self.row, self.paddle, self.ball = state["at"]


def make_catch(config, count, seed, testing=False):
    """Stands in for models.dqn.games.make_games."""
    return Environments(lambda index: Catch(seed * 100 + index), count)


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
