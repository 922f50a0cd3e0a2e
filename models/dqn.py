"""Deep Q-network on Atari games (paper section 5.4, figures 5 and 6).

The network and algorithm are those of Mnih et al. 2015 ("Nature"), with the paper's changes:
Adamax with momentum 0.5, minibatches of 64, every layer weight-normalized and initialized from
data. Maximum test score over 200 epochs, figure 6:

    game             normal   weight norm   Mnih et al.
    Breakout            410           403           401
    Enduro            1,250         1,448           302
    Seaquest          7,188         7,375         5,286
    Space Invaders    1,779         2,179         1,975

What differs from the paper, or where it is silent:
 1. `--num-envs 8` (fast) acts in 8 games on weights up to two updates old, and steps the games
    while the learner runs; `--num-envs 1` (the default) keeps Nature's order. All schedules count
    actions in either.
 2. The paper adapts the code "deep_q_rl", which differs from Nature's in details; `--variant
    deep_q_rl` gives those: see Config.
 3. The initial batch is drawn from the replay memory after the warm-up; the paper does not say
    where it comes from, nor whether the output layer is initialized (`--init-output none` for not).
 4. With several games, testing plays them side by side and leaves out those unfinished at the end,
    of which the paper's code has one.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow as tf

import tfwn
from models.common import checkpoints, command_line, options, plots, progress, runtime, video
from models.common.environments import Atari, Environments, FrameStack, Steps, game_name, rom_path
from models.common.errors import UserError
from models.common.optimizers import Adamax
from models.common.replay import CUT, LAST, TERMINAL, Batch, Replay
from models.common.run import Run

LEARNING_RATES = {"weight_norm": 3e-4, "normal": 1e-4}  # The paper's choice from its grid.


@dataclasses.dataclass(frozen=True)
class Config(options.RunConfig):
    """The hyper-parameters; steps are actions of the agent, each 4 frames of a game."""

    game: str = "SpaceInvaders"  # Any of ale-py's games, in any spelling.
    parameterization: Literal["weight_norm", "normal"] = "weight_norm"  # Of every layer.
    steps: int = 50_000_000  # Training: 200 epochs.
    replay: int = 1_000_000  # Transitions remembered.
    learning_starts: int = 50_000  # Random steps before the first update.
    update_every: int = 4  # Steps per update.
    batch_size: int = 64  # Transitions per update (Nature: 32).
    learning_rate: float | None = None  # None: 3e-4 for weight_norm, 1e-4 for normal.
    optimizer: Literal["adamax", "rmsprop"] = "adamax"  # rmsprop: centred, Nature's numbers.
    discount: float = 0.99  # Of the reward a step later.
    target_every: int = 10_000  # Steps between copies of the network to the target network.
    epsilon: float = 0.1  # Probability of a random action, at the end ...
    epsilon_steps: int = 1_000_000  # ... of its decay from 1, so many steps after the warm-up.
    filters: tuple[int, ...] = (32, 64, 64)  # Of the three convolutions.
    hidden: int = 512  # Units of the hidden dense layer.
    data_dependent_init: bool = True  # Section 3, for both parameterizations: the same function.
    init_output: float | None = 1.0  # Standard deviation of the first Q (none: not initialized).
    init_batch: int = 512  # States in the initial batch.
    test_every: int = 250_000  # Steps per epoch.
    test_steps: int = 125_000  # Steps of testing after an epoch (--test paper).
    test: Literal["paper", "nature"] = "paper"  # nature: 30 games of at most 5 minutes.
    test_epsilon: float = 0.05  # Probability of a random action in tests.
    held_out: int = 3200  # States whose mean maximal Q is logged.
    num_envs: int = 1  # Games side by side: 1 strict, 8 fast (deviation 1).
    # deep_q_rl: two more no-ops at a start and after a life, the first 4 actions of a life random,
    # updates counted from its start, no state across two lives.
    variant: Literal["nature", "deep_q_rl"] = "nature"
    replay_file: str = ""  # Keep the replay memory in this file instead of in memory.
    save_replay: bool = True  # Save the replay memory with the checkpoints: exact resuming.
    log_every: int = 1_000  # Steps between rows of metrics.csv.

    MAY_CHANGE: ClassVar[frozenset[str]] = options.RunConfig.MAY_CHANGE | {"replay_file"}
    FIXED: ClassVar[frozenset[str]] = frozenset({
        "game", "num_envs", "parameterization", "filters", "hidden", "optimizer", "mixed_precision",
    })  # fmt: skip
    NAMED: ClassVar[frozenset[str]] = options.RunConfig.NAMED | {
        "test", "test_steps", "save_replay", "log_every",
    }  # fmt: skip
    FOLDER_FIELDS: ClassVar[tuple[str, ...]] = ("game",)
    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size", "--replay (or --replay-file FILE)")
    RANGES = options.ranges(
        "replay update_every batch_size target_every filters hidden init_batch test_every "
        "test_steps held_out num_envs log_every",
        "discount epsilon test_epsilon",
    ) | {"init_output": (1e-6, math.inf)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "game", game_name(self.game))


# Maximum test scores, figure 6; nature and random play: Mnih et al. 2015, extended data table 2.
PAPER = {
    "Breakout": {"normal": 410, "weight_norm": 403, "nature": 401, "random": 1.7},
    "Enduro": {"normal": 1_250, "weight_norm": 1_448, "nature": 302, "random": 0.0},
    "Seaquest": {"normal": 7_188, "weight_norm": 7_375, "nature": 5_286, "random": 68.4},
    "SpaceInvaders": {"normal": 1_779, "weight_norm": 2_179, "nature": 1_975, "random": 148.0},
}

CPU = {
    "num_envs": 8,
    "steps": 500_000,
    "replay": 100_000,
    "learning_starts": 10_000,
    "batch_size": 32,
    "target_every": 2_000,
    "epsilon": 0.05,
    "epsilon_steps": 100_000,
    "filters": (16, 32, 32),
    "hidden": 256,
    "learning_rate": 3e-4,  # The normal parameterization's 1e-4 takes longer than this.
    "init_output": 0.01,  # Copies of the network to the target forget but 1 % of the first Q each.
    "test": "nature",  # In so few steps as fit here, long games would be left out.
    "test_every": 50_000,
    "held_out": 800,
}
PRESETS = {
    "paper": options.Preset("every number of the paper: 50M steps, 8 GiB, days on a GPU"),
    "nature": options.Preset(
        "Mnih et al. 2015: RMSProp, minibatches of 32, their initialization and test",
        {
            "optimizer": "rmsprop",
            "learning_rate": 2.5e-4,
            "batch_size": 32,
            "data_dependent_init": False,
            "parameterization": "normal",
            "test": "nature",
        },
    ),
    "cpu": options.Preset(
        "scaled: what a laptop learns in an hour: 500,000 steps, a quarter of the network",
        CPU,
    ),
    "demo": options.Preset(
        "scaled: the first half of `cpu` on Breakout: minutes, a beginner's play",
        CPU | {"game": "Breakout", "steps": 250_000},
    ),
    "smoke": options.Preset(
        "only to see that it runs, in less than a minute; its scores mean nothing",
        {
            "steps": 600,
            "replay": 400,
            "learning_starts": 200,
            "batch_size": 8,
            "target_every": 100,
            "epsilon_steps": 200,
            "filters": (4, 4, 4),
            "hidden": 16,
            "init_batch": 64,
            "test_every": 200,
            "test_steps": 200,
            "held_out": 32,
            "log_every": 100,
            "num_envs": 4,
        },
    ),
}


@tf.function(jit_compile=True)  # Fused by XLA: separately, a tenth of an update's time.
def both_states(frames: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns (s_t, s_tp1), [batch, 84, 84, 4] in [0, 1], of frames, uint8 [batch, 5, 84, 84]."""
    x = tf.cast(tf.transpose(frames, [0, 2, 3, 1]), dtype) / 255
    return x[..., :-1], x[..., 1:]


class Network(tf.Module):
    """Q-values, float32 [batch, actions], of states, uint8 [batch, 84, 84, 4] or in [0, 1]."""

    def __init__(
        self,
        config: Config,
        actions: int,
        dtype: tf.DType = tf.float32,
        compute_dtype: tf.DType = tf.float32,
        parameterization: str = "normal",
    ):
        super().__init__()
        self._compute_dtype = compute_dtype
        shared = {"parameterization": parameterization, "dtype": dtype}
        # Without data-dependent initialization: uniform, as in Nature's code (Torch's default).
        seeds = iter(range(config.seed * 10, config.seed * 10 + 5))

        def layer(make: Any, *shape: int, relu: bool = True, compute: tf.DType) -> Any:
            seed = next(seeds)
            v = (
                tf.keras.initializers.RandomNormal(0.0, 0.05, seed)
                if config.data_dependent_init
                else tf.keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed)
            )
            return make(
                *shape,
                activation=tf.nn.relu if relu else None,
                kernel_initializer=v,
                compute_dtype=compute,
                **shared,
            )

        one, two, three = config.filters
        self.layers = [
            layer(tfwn.Conv2D, one, 8, 4, compute=compute_dtype),
            layer(tfwn.Conv2D, two, 4, 2, compute=compute_dtype),
            layer(tfwn.Conv2D, three, 3, 1, compute=compute_dtype),
            layer(tfwn.Dense, config.hidden, compute=compute_dtype),
            layer(tfwn.Dense, actions, relu=False, compute=tf.float32),
        ]
        self(tf.zeros([1, 84, 84, 4], tf.uint8))

    def __call__(self, states: tf.Tensor, hidden_only: bool = False) -> tf.Tensor:
        """Returns the Q-values, or the hidden layer's activations."""
        x = tf.convert_to_tensor(states)
        if not x.dtype.is_floating:
            x = tf.cast(x, self._compute_dtype) / 255
        for layer in self.layers[:3]:
            x = layer(x)
        x = self.layers[3](tf.reshape(x, [-1, math.prod(x.shape[1:])]))
        return x if hidden_only else tf.cast(self.layers[4](x), tf.float32)

    def copy_from(self, other: "Network") -> None:
        """Takes over another network's effective weights: w = g v / ||v||, and b."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            mine.weight.w.assign(tf.cast(its.weight(), mine.weight.w.dtype))
            mine.b.assign(tf.cast(its.b, mine.b.dtype))


class RMSProp(tf.Module):
    """Nature's centred RMSProp: gradient / sqrt(E[gradient^2] - E[gradient]^2 + 0.01)."""

    def __init__(self, variables: Any, learning_rate: float):
        super().__init__()
        self._variables, self._learning_rate = variables, learning_rate
        self.mean, self.square, self.step = (
            [tf.Variable(tf.zeros_like(p), trainable=False) for p in variables] for _ in range(3)
        )

    def apply(self, gradients: Any) -> None:
        """Both averages decay by .95."""
        for p, mean, square, step, gradient in zip(
            self._variables, self.mean, self.square, self.step, gradients, strict=True
        ):
            tf.raw_ops.ResourceApplyCenteredRMSProp(
                var=p.handle, mg=mean.handle, ms=square.handle, mom=step.handle,
                lr=self._learning_rate, rho=0.95, momentum=0.0, epsilon=0.01, grad=gradient,
            )  # fmt: skip


class Learner(tf.Module):
    """The online network, the target network, the optimizer, and the update."""

    def __init__(self, config: Config, actions: int, dtype: tf.DType):
        super().__init__()
        self._config, self._compute_dtype = config, dtype
        self.online = Network(config, actions, tf.float32, dtype, config.parameterization)
        # Effective weights, in the compute type: w is computed when they are copied, not when used.
        self.target = Network(config, actions, dtype, dtype)
        self.acting = Network(config, actions, dtype, dtype)
        rate = config.learning_rate
        if rate is None:
            rate = LEARNING_RATES[config.parameterization]
        variables = self.online.trainable_variables
        self.optimizer: Adamax | RMSProp = (
            Adamax(variables, rate, beta_1=0.5, epsilon=1e-6)  # As the paper's code.
            if config.optimizer == "adamax"
            else RMSProp(variables, rate)
        )
        self.initialized = tf.Variable(False, trainable=False)
        # Since the last row of metrics: sums of the loss and Q of a transition, and their number.
        self.sums = tf.Variable(tf.zeros(3), trainable=False)
        self.act = tf.function(self._act)
        self.update = tf.function(self._update, jit_compile=config.jit_compile)

    def initialize(self, states: np.ndarray) -> None:
        """Data-dependent initialization (section 3) from a batch of states, once."""
        if self._config.data_dependent_init:
            stddev = self._config.init_output
            tfwn.data_dependent_init(
                _Hidden(self.online) if stddev is None else self.online,
                tf.constant(states),
                init_scale=lambda layer: stddev or 1.0 if layer is self.online.layers[-1] else 1.0,
            )
        self.copy_to_target()
        self.acting.copy_from(self.online)
        self.initialized.assign(True)

    def copy_to_target(self) -> None:
        """Makes the target network the online one."""
        self.target.copy_from(self.online)

    def loss(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        """The Huber loss of the TD error, SUMMED over the batch, and the sum of Q(s, a)."""
        s_t, s_tp1 = both_states(batch.frames, self._compute_dtype)
        q_tp1 = tf.reduce_max(self.target(s_tp1), 1)
        not_terminal = 1.0 - tf.cast(batch.terminals, tf.float32)
        goal = batch.rewards + self._config.discount * not_terminal * q_tp1
        q_t = tf.gather(self.online(s_t), batch.actions, batch_dims=1)
        error = tf.stop_gradient(goal) - q_t
        # Its derivative is the error clipped to [-1, 1].
        clipped = tf.clip_by_value(error, -1.0, 1.0)
        huber = clipped * error - 0.5 * tf.square(clipped)
        return tf.reduce_sum(huber), tf.reduce_sum(q_t)

    def _update(self, batches: tuple[Batch, ...]) -> None:
        """One update per batch, then new weights for acting."""
        for batch in batches:
            with tf.GradientTape() as tape:
                loss, q = self.loss(batch)
            variables = self.online.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables))
            size = tf.cast(tf.shape(batch.actions)[0], tf.float32)
            self.sums.assign_add(tf.stack([loss, q, size]))
        self.acting.copy_from(self.online)

    def _act(self, states: tf.Tensor) -> tf.Tensor:
        return self.acting(states)


class _Hidden(tf.Module):
    """The network up to its hidden layer."""

    def __init__(self, network: Network):
        super().__init__()
        self._network = network

    def __call__(self, states: tf.Tensor) -> tf.Tensor:
        return self._network(states, hidden_only=True)


class Actor:
    """Plays epsilon-greedily in several games, and keeps what happens in the replay memory."""

    def __init__(self, config: Config, learner: Learner, games: Environments, replay: Replay):
        self._config, self._learner = config, learner
        self.games, self.replay = games, replay
        self.generator = runtime.generator(config.seed, 3)
        self._stack = FrameStack(len(games))
        self._ages = np.zeros(len(games), np.int64)  # Actions since a life began.
        self.scores: list[float] = []
        self.lengths: list[int] = []

    def begin(self) -> None:
        """Begins all games."""
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
        """Adds what the actions led to; a lost life is an end for learning, not for the game."""
        dead = after.over | after.life_lost
        fresh = after.over | after.cut
        last = dead | after.cut if self._config.variant == "deep_q_rl" else fresh
        ends = TERMINAL * dead + LAST * last + CUT * after.cut
        rewards = np.clip(after.rewards, -1, 1)
        self.replay.add(self._stack.frames[..., -1], actions, rewards, ends)
        self._stack.push(after.frames, fresh)
        self._ages = np.where(dead | fresh, 0, self._ages + 1)
        self.scores += after.scores
        self.lengths += after.lengths

    def updates(self, step: int) -> int:
        """Returns how many updates the actions after `step` call for."""
        if step < self._config.learning_starts:
            return 0
        every, after = self._config.update_every, step + len(self.games)
        if self._config.variant == "deep_q_rl":
            return int(self._ages[0] > 0 and self._ages[0] % every == 0)
        return after // every - step // every

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that decides the future, the games' states included."""
        return {
            "generator": self.generator.bit_generator.state,
            "games": self.games.state_dict(),
            "stack": self._stack.state_dict(),
            "ages": self._ages,
            "scores": self.scores,
            "lengths": self.lengths,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.generator.bit_generator.state = state["generator"]
        self.games.load_state_dict(state["games"])
        self._stack.load_state_dict(state["stack"])
        self._ages = state["ages"]
        self.scores, self.lengths = state["scores"], state["lengths"]


def train(config: Config) -> None:
    """Trains, tests after each epoch, and leaves the run folder with a learning curve."""
    check(config)
    save_every = max(config.replay // 20, config.num_envs)
    file = Path(config.replay_file or Path(config.out) / "replay.ring")
    keeps = config.save_replay or bool(config.replay_file)
    with Run(config) as run, contextlib.ExitStack() as stack:
        games = make_games(config, config.num_envs, config.seed)
        replay = Replay(
            config.replay,
            config.num_envs,
            file=file if keeps else None,
            in_memory=not config.replay_file,
            new=not config.resume,
            spare=2 * save_every,
            whole_stacks=config.variant == "deep_q_rl",
            seed=config.seed,
        )
        stack.callback(replay.close)
        learner = Learner(config, games.num_actions, run.dtype)
        actor = Actor(config, learner, games, replay)
        actor.begin()
        run.introduce(title_of(config), note(config))
        run.begin({"learner": learner}, {"actor": actor, "replay": replay})
        if replay.lost:
            run.say(f"the replay memory lacks its {replay.lost:,} oldest transitions")
        if len(replay) < min(run.step, config.learning_starts) and run.step < config.steps:
            run.say(
                f"the replay memory holds {len(replay):,} transitions; learning goes on when it "
                f"holds {config.learning_starts:,}"
            )
        held_out_file = run.path / "held_out.npy"
        held_out = None
        if learner.initialized:
            try:
                held_out = np.load(held_out_file)
            except (OSError, ValueError, EOFError):
                run.say(
                    f"{held_out_file} is missing or damaged: other states are held out from here on"
                )
        clock = Clock()

        loop = run.steps(
            config.steps,
            stride=config.num_envs,
            save_every=save_every if keeps else None,
            warm_up=config.learning_starts,
            steps_per_epoch=config.test_every,
        )
        for step in loop:
            if held_out is None and len(replay) >= config.learning_starts:
                if not learner.initialized:
                    run.say(f"{step:,} random steps are remembered; learning begins")
                    learner.initialize(states_of(replay.sample(config.init_batch)))
                held_out = states_of(replay.sample(config.held_out))
                np.save(held_out_file, held_out)
            if step % config.test_every == 0 and learner.initialized:
                test_epoch(config, learner, run, held_out)
                clock.skip()

            advance(config, learner, actor, step)
            done = step + config.num_envs
            if crosses(step, done, config.log_every):
                log(run, learner, actor, done, clock)
        test_epoch(config, learner, run, held_out)
        games.close()
        plots.learning_curve(run.path, title_of(config), PAPER.get(config.game, {}).get("random"))
        run.say(f"learning curve: {run.path / 'learning_curve.png'}")
        if keeps:
            size = file.stat().st_blocks * 512 / 1e6
            run.say(f"replay memory: {file}, {size:,.0f} MB, which only --resume needs")


def advance(config: Config, learner: Learner, actor: Actor, step: int) -> None:
    """Plays an action in each game, and makes the updates that these steps call for."""
    # Not after the warm-up alone: a resumed run without its replay memory fills that anew.
    ready = len(actor.replay) >= config.learning_starts
    actions = actor.choose(step)
    if config.num_envs == 1:
        # Nature's order: act, see, remember, learn.
        actor.remember(actions, actor.games.step(actions))
        if ready:
            learn(config, learner, actor, step)
    else:
        actor.games.send(actions)
        if ready:
            learn(config, learner, actor, step)
        actor.remember(actions, actor.games.recv())
    if crosses(step, step + config.num_envs, config.target_every) and learner.initialized:
        learner.copy_to_target()


def learn(config: Config, learner: Learner, actor: Actor, step: int) -> None:
    """Makes the updates due at a step, in one call."""
    updates = actor.updates(step)
    if updates:
        learner.update(tuple(actor.replay.sample(config.batch_size) for _ in range(updates)))


def test_epoch(config: Config, learner: Learner, run: Run, held_out: np.ndarray | None) -> None:
    """Tests, logs the score and, of states held out, the Q, and keeps the best network."""
    seed = [config.seed, run.step, 4]
    scores, lengths = play_test(config, learner, seed, tell=run.testing)
    q = {} if held_out is None else {"held_out_q": mean_max_q(learner, held_out)}
    score = float(np.mean(scores))
    run.log(
        run.step,
        epoch=run.step / config.test_every,
        test_score=score,
        test_stderr=standard_error(scores),
        test_games=len(scores),
        test_length=np.mean(lengths),
        **q,
    )
    told = "".join(f", held-out Q {value:.3f}" for value in q.values())
    run.say(f"step {run.step:,}: test score {score:,.1f} ({len(scores)} games){told}")
    run.show(test=score)
    run.keep_best(score)


def play_test(
    config: Config,
    learner: Learner,
    seed: Any,
    *,
    games: int | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[float], list[int]]:
    """Plays full games without learning; returns their scores (not clipped) and lengths.

    "paper": `test_steps` actions without limit of a game's length, and the games that end within
    them; where none does, those unfinished.
    "nature": 30 games of at most 5 minutes, 18,000 frames.
    Calls tell(done, total) meanwhile: steps, or games.
    """
    count = max(config.num_envs, 1)
    wanted = np.zeros(count, np.int64)
    if games or config.test == "nature":
        np.add.at(wanted, np.arange(games or 30) % count, 1)
    generator = np.random.default_rng(seed)
    made = make_games(config, count, int(generator.integers(2**31)), testing=True)
    stack, played = FrameStack(count), np.zeros(count, np.int64)
    stack.push(made.reset())
    scores: list[float] = []
    lengths: list[int] = []
    for step in range(0, 10**12 if wanted.any() else config.test_steps, count):
        if step // count % 64 == 0:
            if wanted.any():
                tell(int(np.minimum(played, wanted).sum()), int(wanted.sum()))
            else:
                tell(step, config.test_steps)
        actions = generator.integers(0, made.num_actions, count)
        greedy = generator.random(count) >= config.test_epsilon
        actions[greedy] = learner.act(tf.constant(stack.frames)).numpy().argmax(1)[greedy]
        after = made.step(actions)
        ended = after.over | after.cut
        stack.push(after.frames, ended)
        # A fixed number of games each, so that short games are not counted more often.
        counts = (played < wanted)[ended] if wanted.any() else np.ones(ended.sum(), bool)
        scores += [score for score, good in zip(after.scores, counts, strict=True) if good]
        lengths += [length for length, good in zip(after.lengths, counts, strict=True) if good]
        played += ended
        if wanted.any() and (played >= wanted).all():
            break
    made.close()
    return (scores, lengths) if scores else made.unfinished()


def test_of(test: str, test_steps: int) -> str:
    """Returns what a test is, for people."""
    told = {"paper": f"{test_steps:,} steps", "nature": "30 games of at most 5 minutes"}
    return f"{test}: {told[test]}"


def standard_error(scores: list[float]) -> float:
    """Returns the standard error of the mean score, nan for one game."""
    count = len(scores)
    return float(np.std(scores, ddof=1)) / math.sqrt(count) if count > 1 else math.nan


def mean_max_q(learner: Learner, states: np.ndarray) -> float:
    """Returns the mean over states of the largest Q."""
    parts = [states[begin : begin + 100] for begin in range(0, len(states), 100)]
    q = np.concatenate([learner.act(tf.constant(part)).numpy() for part in parts])
    return float(q.max(1).mean())


def log(run: Run, learner: Learner, actor: Actor, step: int, clock: "Clock") -> None:
    """Writes a row of metrics and sets the progress line."""
    loss, q, count = learner.sums.numpy()
    learner.sums.assign(tf.zeros(3))
    values = {"epsilon": actor.epsilon(step), **clock.rate(step)}
    if count:
        values |= {"loss": float(loss / count), "q": float(q / count)}
    if actor.scores:
        values["score"] = float(np.mean(actor.scores))
        values["length"] = float(np.mean(actor.lengths))
        actor.scores, actor.lengths = [], []
    run.log(step, **values)
    run.show(**{name: values[name] for name in ("score", "loss", "q", "epsilon") if name in values})


class Clock:
    """Steps per second between readings, tests left out."""

    def __init__(self) -> None:
        self._at, self._step = time.monotonic(), -1

    def skip(self) -> None:
        """Leaves out the time since the last reading."""
        self._step = -1

    def rate(self, step: int) -> dict[str, float]:
        """Returns the rate since the last reading, nothing where there is none."""
        now = time.monotonic()
        rate = (
            {"steps_per_second": (step - self._step) / (now - self._at)} if self._step >= 0 else {}
        )
        self._at, self._step = now, step
        return rate


def crosses(before: int, after: int, period: int) -> bool:
    """Returns whether a multiple of `period` lies in (before, after]."""
    return after // period > before // period


def states_of(batch: Batch) -> np.ndarray:
    """Returns a batch's states s_t, uint8 [batch, 84, 84, 4]."""
    return np.ascontiguousarray(batch.frames[:, :-1].transpose(0, 2, 3, 1))


def title_of(config: Config) -> str:
    """Returns what is played and by which network."""
    return f"{config.game}, {config.parameterization.replace('_', ' ')}"


def note(config: Config) -> str:
    """Returns what to say beside a result."""
    return options.note(PRESETS, config)


def make_games(config: Config, count: int, seed: int, *, testing: bool = False) -> Environments:
    """Returns games as the variant starts them; in tests a life has no end of its own."""
    cap = 18_000 if testing and config.test == "nature" else 0
    rl = config.variant == "deep_q_rl"
    return Environments(
        lambda index: Atari(
            config.game,
            (seed * 1009 + index) % 2**31,
            max_frames=cap,
            start_noops=2 * rl,
            life_noops=2 * rl * (not testing),
        ),
        count,
    )


def check(config: Config) -> None:
    """Refuses configurations that cannot work."""
    rom_path(config.game)
    if config.strategy != "none":
        raise UserError(f"--strategy {config.strategy}: DQN trains on one device; leave it out")
    if config.steps <= config.learning_starts:
        raise UserError(
            f"--steps {config.steps} ends before learning begins, at --learning-starts "
            f"{config.learning_starts}"
        )
    if config.variant == "deep_q_rl" and config.num_envs != 1:
        raise UserError(f"--variant deep_q_rl needs --num-envs 1, got {config.num_envs}")
    if len(config.filters) != 3:
        raise UserError(f"--filters takes 3 numbers, got {len(config.filters)}")
    for name in ("steps", "learning_starts", "test_every"):
        if getattr(config, name) % config.num_envs:
            raise UserError(
                f"--{name.replace('_', '-')} must be a multiple of --num-envs "
                f"{config.num_envs}, got {getattr(config, name)}"
            )
    if not 8 * config.num_envs <= config.learning_starts <= config.replay:
        raise UserError(
            f"--learning-starts must lie between {8 * config.num_envs} and --replay "
            f"{config.replay}, got {config.learning_starts}"
        )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Plays full games with a trained network and prints their scores."""

    checkpoint: str  # A run folder (its best network is taken), or one of its checkpoints.
    # nature: 30 games of at most 5 minutes; paper: --test-steps actions, games of any length.
    protocol: Literal["nature", "paper"] = "nature"
    test_steps: int | None = None  # Actions of --protocol paper (default: the run's).
    games: int | None = None  # This many games instead of the protocol's.
    epsilon: float = 0.05  # Probability of a random action.
    num_envs: int = 8  # Games side by side.
    seed: int = 1  # Of games and actions.

    RANGES = options.ranges("test_steps games num_envs", "epsilon")


@dataclasses.dataclass(frozen=True)
class Watch:
    """Plays one game with a trained network and writes it as a video."""

    checkpoint: str  # A run folder (its best network is taken), or one of its checkpoints.
    out: str = ""  # The video, .gif or .mp4 (default: game.gif in the run folder).
    seconds: float = 60.0  # The longest it may be.
    epsilon: float = 0.05  # Probability of a random action.
    seed: int = 1  # Of game and actions.

    RANGES = options.ranges("seconds", "epsilon")


def restore(path: str, **changes: Any) -> tuple[Config, Learner, checkpoints.Found]:
    """Returns a run's Config, with changes, its learner, and where it was found."""
    found = checkpoints.open_run(path, Config)
    config = dataclasses.replace(found.config, **changes)
    learner = Learner(config, Atari(config.game, 0).num_actions, runtime.compute_dtype(config))
    found.restore(learner=learner)
    return config, learner, found


def evaluate(asked: Evaluate) -> None:
    """Prints mean, standard error and each score."""
    if asked.test_steps and (asked.protocol != "paper" or asked.games):
        raise UserError(
            "--test-steps is of --protocol paper without --games: leave one of them out"
        )
    config, learner, found = restore(
        asked.checkpoint,
        num_envs=asked.num_envs,
        test=asked.protocol,
        test_epsilon=asked.epsilon,
        **({"test_steps": asked.test_steps} if asked.test_steps else {}),
    )
    with progress.Test() as tell:
        scores, lengths = play_test(config, learner, [asked.seed], games=asked.games, tell=tell)
    error = standard_error(scores)
    told = "" if math.isnan(error) else f" +- {error:,.1f} (standard error)"
    limit = "at most 5 minutes each"
    if asked.protocol == "paper":
        limit = "without a time limit"
        limit += "" if asked.games else f", {config.test_steps:,} steps in all"
    print(f"{title_of(config)}, {found.path}")
    count = "1 game" if len(scores) == 1 else f"{len(scores)} games"
    print(f"score {np.mean(scores):,.1f}{told}, {count}{note(found.config)}")
    print(f"protocol {asked.protocol}: {limit}, epsilon {asked.epsilon:g}, raw rewards")
    print(f"lowest {min(scores):,.0f}, highest {max(scores):,.0f}, length {np.mean(lengths):,.0f}")


def watch(asked: Watch) -> None:
    """Plays until the game ends and writes a video of it, its score and its Q-values."""
    config, learner, found = restore(asked.checkpoint)
    out = Path(asked.out or found.folder / "game.gif")
    game = Atari(config.game, asked.seed)
    generator = np.random.default_rng([asked.seed, 5])
    stack, score = FrameStack(1), 0.0
    stack.push(game.reset()[None])
    with video.Video(out, rate=15) as film:
        for _ in range(int(asked.seconds * 15)):
            q = learner.act(tf.constant(stack.frames)).numpy()[0]
            action = int(q.argmax())
            if generator.random() < asked.epsilon:
                action = int(generator.integers(game.num_actions))
            film.add(game.screens.max(0), f"{config.game}  {score:,.0f}", q, action)
            after = game.step(action)
            stack.push(after.frame[None])
            score += after.reward
            if after.over:
                break
    print(f"{out}: score {score:,.0f} {'' if after.over else '(the game goes on)'}")


if __name__ == "__main__":
    command_line.main(Config, train, PRESETS, {Evaluate: evaluate, Watch: watch})
