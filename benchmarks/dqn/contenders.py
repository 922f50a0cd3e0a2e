"""The contenders of benchmarks.dqn, each in its own process."""

import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
import torch

from benchmarks import plain
from benchmarks.dqn import peers
from models.dqn.agent import Actor, Learner
from models.dqn.config import Config
from models.dqn.replay import Replay
from models.dqn.training import advance, keep_freed_memory
from models.dqn.vector import Games

STEPS = 64  # Per call.
WARM_UP = 2_048
CLEANRL, SB3, SB3_8, TUNED = "CleanRL", "SB3, 1 game", "SB3, 8 games", "tuned PyTorch, bfloat16"
OURS = {
    # name: parameterization, compute dtype, games
    "tfwn": ("normal", tf.float32, 8),
    "tfwn, weight norm": ("weight_norm", tf.float32, 8),
    "tfwn, bfloat16": ("normal", tf.bfloat16, 8),
    "tfwn, weight norm, bfloat16": ("weight_norm", tf.bfloat16, 8),
    "tfwn, weight norm, strict": ("weight_norm", tf.float32, 1),
}
PLAIN = "weight norm in plain TensorFlow"


def ours(parameterization: Any, dtype: tf.DType, num_envs: int) -> Callable[[], object]:
    """The program itself, without evaluations, checkpoints and metrics."""
    config = Config(
        parameterization=parameterization,
        num_envs=num_envs,
        replay=peers.MEMORY,
        learning_starts=WARM_UP,
        epsilon_steps=1,
    )
    keep_freed_memory()
    games = Games(config, num_envs, 0)
    memory = Replay(config.replay, num_envs)
    learner = Learner(config, games.num_actions, dtype)
    actor = Actor(config, learner, games, memory)
    actor.begin()
    step = 0
    while step < WARM_UP:
        advance(config, learner, actor, step)
        step += num_envs
    learner.initialize(memory.sample(config.init_batch).states)

    def play() -> None:
        nonlocal step
        for _ in range(STEPS // num_envs):
            advance(config, learner, actor, step)
            step += num_envs

    play()  # Traces the updates.
    return play


def in_plain_tensorflow(*options: Any) -> Callable[[], object]:
    """The program with weight norm in plain TensorFlow."""
    with plain.weight_norm():
        return ours(*options)


def _peer(make: Callable[..., Callable[[int], None]], *options: int) -> Callable[[], object]:
    play = make(*options)
    return lambda: play(STEPS)


CONTENDERS: dict[str, Callable[[], Callable[[], object]]] = {
    **{name: functools.partial(ours, *options) for name, options in OURS.items()},
    PLAIN: functools.partial(in_plain_tensorflow, *OURS["tfwn, weight norm"]),
    CLEANRL: functools.partial(_peer, peers.cleanrl, WARM_UP),
    SB3: functools.partial(_peer, peers.stable_baselines3, 1),
    SB3_8: functools.partial(_peer, peers.stable_baselines3, 8),
    TUNED: functools.partial(_peer, peers.tuned, WARM_UP),
}


class Contender:
    """Runs a contender in its own process, unaffected by what the others load or set."""

    def __init__(self, name: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, name, threads))
        self._process.start()
        there.close()
        self()

    def __call__(self) -> None:
        self._pipe.send_bytes(b"play")
        self._pipe.recv_bytes()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, name: str, threads: int) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    torch.set_num_threads(threads)
    play = CONTENDERS[name]()
    try:
        while pipe.recv_bytes():
            play()
            pipe.send_bytes(b"played")
    except EOFError:
        pass
