"""Times DQN's training against CleanRL's algorithm, Stable-Baselines3 and a tuned PyTorch.

    python -m benchmarks.dqn [--rounds 15] [--threads 2] [--only NAME ...] [--out build/benchmarks]

Agent steps per second in the steady state: Space Invaders, the network of Mnih et al. 2015,
minibatches of 64, one update per 4 steps, 10% random actions. All contenders live in one process
and take turns in windows of a few seconds; a ratio is the median over the rounds of two windows'
quotient. Ours is the program's own loop body (models.dqn.training.advance).
"""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
import tensorflow as tf
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import plain, timing
from benchmarks.dqn import peers
from models.dqn.agent import Actor, Learner
from models.dqn.config import Config
from models.dqn.replay import Replay
from models.dqn.training import advance
from models.dqn.vector import Games

STEPS = 64  # Of one call.
WARM_UP = 2_048
CLEANRL, SB3, SB3_8, TUNED = "CleanRL", "SB3, 1 game", "SB3, 8 games", "tuned PyTorch, bfloat16"
OURS = {
    # name: parameterization, compute type, games
    "tfwn": ("normal", tf.float32, 8),
    "tfwn, weight norm": ("weight_norm", tf.float32, 8),
    "tfwn, bfloat16": ("normal", tf.bfloat16, 8),
    "tfwn, weight norm, bfloat16": ("weight_norm", tf.bfloat16, 8),
    "tfwn, weight norm, strict": ("weight_norm", tf.float32, 1),
}
PLAIN = "weight norm in plain TensorFlow"


def ours(parameterization: Any, dtype: tf.DType, num_envs: int) -> Callable[[], object]:
    """The program itself, without tests, checkpoints and metrics."""
    config = Config(
        parameterization=parameterization,
        num_envs=num_envs,
        replay=peers.MEMORY,
        learning_starts=WARM_UP,
        epsilon_steps=1,
    )
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


def contenders(only: list[str]) -> dict[str, Callable[[], object]]:
    """All contenders, or those named."""

    def peer(make: Callable[..., Callable[[int], None]], *options: int) -> Callable[[], object]:
        play = make(*options)
        return lambda: play(STEPS)

    made: dict[str, Callable[[], Callable[[], object]]] = {
        **{name: functools.partial(ours, *options) for name, options in OURS.items()},
        PLAIN: functools.partial(in_plain_tensorflow, *OURS["tfwn, weight norm"]),
        CLEANRL: functools.partial(peer, peers.cleanrl, WARM_UP),
        SB3: functools.partial(peer, peers.stable_baselines3, 1),
        SB3_8: functools.partial(peer, peers.stable_baselines3, 8),
        TUNED: functools.partial(peer, peers.tuned, WARM_UP),
    }
    unknown = set(only) - set(made)
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: the contenders are {', '.join(made)}")
    return {name: make() for name, make in made.items() if not only or name in only}


def main() -> None:
    """Measures, prints the table and writes dqn.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dqn", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="windows each, default %(default)s")
    parser.add_argument("--window", type=float, default=2.0, help="seconds, default %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", default=[], help="contenders by name")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="%(default)s")
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    console = Console()
    machine = timing.describe_machine(
        "tensorflow", "torch", "stable-baselines3", "gymnasium", "ale-py"
    )
    console.print(machine)
    times = timing.interleave(
        contenders(arguments.only), rounds=arguments.rounds, window_seconds=arguments.window
    )
    compared = [name for name in (CLEANRL, SB3, SB3_8, TUNED) if name in times]
    table = Table(title="agent steps per second; ratios: median of windows, ± half the quartiles")
    table.add_column("")
    table.add_column("steps/s", justify="right")
    for peer in compared:
        table.add_column(f"x {peer}", justify="right")
    for name, seconds in times.seconds.items():
        speed = timing.Quartiles.of(STEPS / np.asarray(seconds))
        ratios = [f"{times.ratio(peer, name):.2f}" for peer in compared]
        table.add_row(name, f"{speed:.0f}", *ratios)
    console.print(table)
    rows = [
        {"name": name, "steps": STEPS, "seconds": list(map(float, seconds))}
        for name, seconds in times.seconds.items()
    ]
    timing.write_json(arguments.out / "dqn.json", machine, rows)


if __name__ == "__main__":
    main()
