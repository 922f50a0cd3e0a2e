"""The agent: Q-network, update and epsilon-greedy play (Mnih et al. 2015; paper section 5.4)."""

import math
from typing import Any

import numpy as np
import tensorflow as tf

import tfwn
from models.common import layers, optimizers, runtime
from models.dqn.config import Config
from models.dqn.games import FRAME_SHAPE
from models.dqn.replay import CUT, LAST, STACK, TERMINAL, Batch, Replay
from models.dqn.vector import Games, Steps


class Network(tf.Module):
    """Maps states [batch, 84, 84, 4], uint8 or in [0, 1], to Q-values, float32 [batch, actions]."""

    def __init__(
        self,
        config: Config,
        actions: int,
        dtype: tf.DType = tf.float32,
        compute_dtype: tf.DType = tf.float32,
        parameterization: str = "normal",
        frozen_g: bool = False,
    ):
        super().__init__()
        self._compute_dtype = compute_dtype

        def initializer(index: int) -> Any:
            seed = config.seed * 10 + index
            if config.frozen_g:
                return tf.keras.initializers.GlorotUniform(seed)
            if config.data_dependent_init:
                return tf.keras.initializers.RandomNormal(0.0, 0.05, seed)
            # Uniform, as in Nature's code (Torch's default).
            return tf.keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed)

        make = layers.Layers(parameterization, initializer, compute_dtype, dtype, frozen_g)
        one, two, three = config.filters
        relu = {"activation": tf.nn.relu}
        self.layers: list[Any] = [
            make.conv(one, 8, 4, padding="valid", **relu),
            make.conv(two, 4, 2, padding="valid", **relu),
            make.conv(three, 3, 1, padding="valid", **relu),
            make.dense(config.hidden, **relu),
            make.dense(actions, init_scale=config.init_output or 1.0, compute_dtype=tf.float32),
        ]
        self(tf.zeros([1, 84, 84, 4], tf.uint8))
        if not config.data_dependent_init:  # As in Nature's code, biases are like the weights.
            for index, layer in enumerate(self.layers):
                bound = math.prod(layer.weight().shape[:-1]) ** -0.5
                uniform = tf.keras.initializers.RandomUniform(
                    -bound, bound, config.seed * 10 + 5 + index
                )
                layer.b.assign(uniform(layer.b.shape, layer.b.dtype))

    def __call__(self, states: tf.Tensor) -> tf.Tensor:
        """Returns the Q-values."""
        return tf.cast(self.layers[4](self.hidden(states)), tf.float32)

    def hidden(self, states: tf.Tensor) -> tf.Tensor:
        """Returns the hidden layer's activations, [batch, hidden]."""
        x = tf.convert_to_tensor(states)
        if not x.dtype.is_floating:
            x = tf.cast(x, self._compute_dtype) / 255
        for layer in self.layers[:3]:
            x = layer(x)
        return self.layers[3](tf.reshape(x, [-1, math.prod(x.shape[1:])]))

    def copy_from(self, other: "Network") -> None:
        """Copies another network's effective weights: w = g v / ||v||, and b."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.weight.w.assign(tf.cast(its.weight(), mine.weight.w.dtype))
            mine.b.assign(tf.cast(its.b, mine.b.dtype))


class Learner(tf.Module):
    """The online network, the target network, the optimizer and the update.

    The target and the acting network store effective weights in the compute dtype, so w is
    computed once per copy and not at every use.
    """

    def __init__(self, config: Config, actions: int, dtype: tf.DType):
        super().__init__()
        self._config, self._compute_dtype = config, dtype
        self.online = Network(
            config, actions, tf.float32, dtype, config.parameterization, config.frozen_g
        )
        self.target = Network(config, actions, dtype, dtype)
        self.acting = Network(config, actions, dtype, dtype)
        self.optimizer = make_optimizer(config, self.online.trainable_variables)
        self.initialized = tf.Variable(False, trainable=False)
        # Sums since the last row of metrics: the transitions' losses, their Q, and their number.
        self.sums = tf.Variable(tf.zeros(3), trainable=False)
        self.act = tf.function(self.acting.__call__)
        self.update = tf.function(self._update, jit_compile=config.jit_compile)

    def initialize(self, states: np.ndarray) -> None:
        """Applies data-dependent initialization (section 3) with a batch of states, once."""
        if self._config.data_dependent_init:
            tfwn.data_dependent_init(
                self.online.hidden if self._config.init_output is None else self.online,
                tf.constant(states),
                init_scale=lambda layer: layer.init_scale,
            )
        self.copy_to_target()
        self.acting.copy_from(self.online)
        self.initialized.assign(True)

    def copy_to_target(self) -> None:
        """Copies the online network to the target network."""
        self.target.copy_from(self.online)

    def loss(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the Huber loss of the TD error, SUMMED over the batch, and the sum of Q(s, a)."""
        s_t, s_tp1 = both_states(batch.frames, self._compute_dtype)
        q_tp1 = tf.reduce_max(self.target(s_tp1), 1)
        not_terminal = 1.0 - tf.cast(batch.terminals, tf.float32)
        goal = batch.rewards + self._config.discount * not_terminal * q_tp1
        q_t = tf.gather(self.online(s_t), batch.actions, batch_dims=1)
        error = tf.stop_gradient(goal) - q_t
        # The derivative with respect to the error is the error clipped to [-1, 1].
        clipped = tf.clip_by_value(error, -1.0, 1.0)
        huber = clipped * error - 0.5 * tf.square(clipped)
        return tf.reduce_sum(huber), tf.reduce_sum(q_t)

    def _update(self, batches: tuple[Batch, ...]) -> None:
        """Performs one update per batch, then copies the weights to the acting network."""
        variables = self.online.trainable_variables
        for batch in batches:
            with tf.GradientTape() as tape:
                loss, q = self.loss(batch)
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            size = tf.cast(tf.shape(batch.actions)[0], tf.float32)
            self.sums.assign_add(tf.stack([loss, q, size]))
        self.acting.copy_from(self.online)


@tf.function(jit_compile=True)  # Unfused, this takes a tenth of an update's time.
def both_states(frames: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns (s_t, s_tp1), [batch, 84, 84, 4] in [0, 1], from frames, uint8 [batch, 5, 84, 84]."""
    x = tf.cast(tf.transpose(frames, [0, 2, 3, 1]), dtype) / 255
    return x[..., :-1], x[..., 1:]


def make_optimizer(config: Config, variables: Any) -> tf.keras.optimizers.Optimizer:
    """Returns the optimizer, with its variables created."""
    if config.optimizer == "adamax":
        optimizer = optimizers.Adamax(config.rate, beta_1=0.5, epsilon=1e-6)  # The paper's code.
    else:  # Nature's.
        optimizer = tf.keras.optimizers.RMSprop(config.rate, 0.95, epsilon=0.01, centered=True)
    optimizer.build(variables)
    return optimizer


class FrameStack:
    """The last 4 frames of each game; zeros before its first frame.

    Attributes:
      frames: uint8 [games, 84, 84, 4], the newest last.
      newest: uint8 [games, 84, 84], the newest frame of each game.
    """

    def __init__(self, count: int):
        self.frames = np.zeros((count, *FRAME_SHAPE, STACK), np.uint8)
        self._pixels = self.frames.view("<u4")[..., 0]  # Of 4 frames, the newest in the high byte.
        self.newest = np.zeros((count, *FRAME_SHAPE), np.uint8)

    def push(self, frames: np.ndarray, begins: np.ndarray | None = None) -> None:
        """Adds one frame per game; `begins`, bool [games], marks games whose first it is."""
        self._pixels >>= 8  # Moving single bytes takes ten times as long.
        if begins is not None:
            self._pixels[begins] = 0
        self.newest[:] = frames
        self._pixels |= self.newest.astype("<u4") << 24

    def restore(self, frames: np.ndarray) -> None:
        """Replaces all frames with those of another stack."""
        self.frames[:] = frames
        self.newest[:] = frames[..., -1]


class Actor:
    """Plays epsilon-greedily in several games and stores the transitions in the replay memory."""

    def __init__(self, config: Config, learner: Learner, games: Games, replay: Replay):
        self._config, self._learner = config, learner
        self.games, self.replay = games, replay
        self.generator = runtime.generator(config.seed, 3)
        self._stack = FrameStack(len(games))
        self._ages = np.zeros(len(games), np.int64)  # Actions since the current life began.
        self.anew = np.zeros(len(games), bool)  # Games that could not be restored.
        self.scores: list[float] = []
        self.lengths: list[int] = []

    def begin(self) -> None:
        """Starts all games."""
        self._stack.push(self.games.reset(), np.ones(len(self.games), bool))

    def epsilon(self, step: int) -> float:
        """Returns the probability of a random action."""
        done = (step - self._config.learning_starts) / self._config.epsilon_steps
        return 1.0 + (self._config.epsilon - 1.0) * min(max(done, 0.0), 1.0)

    def choose(self, step: int) -> np.ndarray:
        """Returns an action for each game."""
        count = len(self.games)
        actions = self.generator.integers(0, self.games.num_actions, count)
        greedy = self.generator.random(count) >= self.epsilon(step)
        if self._config.variant == "deep_q_rl":
            greedy &= self._ages >= 4
        if greedy.any():
            q = self._learner.act(tf.constant(self._stack.frames)).numpy()
            actions[greedy] = q.argmax(1)[greedy]
        return actions

    def remember(self, actions: np.ndarray, after: Steps) -> None:
        """Stores the outcomes of actions; a lost life is terminal, although the game continues."""
        dead = after.over | after.life_lost
        fresh = after.over | after.cut
        last = dead | after.cut if self._config.variant == "deep_q_rl" else fresh
        ends = TERMINAL * dead + LAST * last + CUT * after.cut
        rewards = np.clip(after.rewards, -1, 1)
        self.replay.add(self._stack.newest, actions, rewards, ends)
        self._stack.push(after.frames, fresh)
        self._ages = np.where(dead | fresh, 0, self._ages + 1)
        self.scores += after.scores
        self.lengths += after.lengths

    def updates(self, step: int) -> int:
        """Returns how many updates are due after the actions of a step."""
        if step < self._config.learning_starts:
            return 0
        every, after = self._config.update_every, step + len(self.games)
        if self._config.variant == "deep_q_rl":
            return int(self._ages[0] > 0 and self._ages[0] % every == 0)
        return after // every - step // every

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that future actions depend on, including the games' states."""
        return {
            "generator": self.generator.bit_generator.state,
            "games": self.games.state_dict(),
            "frames": self._stack.frames,
            "ages": self._ages,
            "scores": self.scores,
            "lengths": self.lengths,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state; the replay memory must be restored first."""
        self.generator.bit_generator.state = state["generator"]
        self.anew = self.games.load_state_dict(state["games"])
        frames = state["frames"]
        frames[self.anew] = 0
        frames[self.anew, ..., -1] = self.games.frames[self.anew]
        self._stack.restore(frames)
        self._ages = np.where(self.anew, 0, state["ages"])
        self.replay.cut(self.anew)
        self.scores, self.lengths = state["scores"], state["lengths"]
