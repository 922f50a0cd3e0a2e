"""Times games without a learner, and with a simulated one that is as fast as on a GPU.

    taskset -c 0,1 python -m benchmarks.dqn.games [--games 8] [--learner-ms 0.5] [--rounds 9]

First, agent steps per second of 8 games of Space Invaders with random actions: ours in this process
and in other ones, ale-py's own vector environment (a thread per core), and gymnasium's
AtariPreprocessing in its two vector environments. `taskset` sets the number of cores.

Then the program's own loop (models.dqn.training.advance) with a learner that takes `--learner-ms`
per update of 64 transitions on a separate device, and no CPU time. This shows what limits training
when updates are fast.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import timing

# Functions import what loads TensorFlow, because the games' processes import this module too.
STEPS = 20  # Per game and call.


def preprocessed() -> Any:
    """A game as gymnasium users make it: 84 x 84, gray, maximum of two frames, area averages."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    env = gymnasium.make("ALE/SpaceInvaders-v5", frameskip=1, repeat_action_probability=0.0)
    return gymnasium.wrappers.AtariPreprocessing(env)


def contenders(count: int) -> dict[str, Callable[[], object]]:
    import ale_py.vector_env
    import gymnasium

    from models.dqn.config import Config
    from models.dqn.vector import Games

    random = np.random.default_rng(0)

    def playing(games: Any) -> Callable[[], None]:
        games.reset()

        def play() -> None:
            for _ in range(STEPS):
                games.step(random.integers(0, 6, count))

        return play

    cores = len(os.sched_getaffinity(0))
    same = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    make = [preprocessed] * count
    made: dict[str, Any] = {
        f"{name}, {scaling}": Games(Config(scaling=scaling), count, 0, processes=processes)
        for scaling in ("bilinear", "area")
        for name, processes in (("ours, this process", 0), ("ours, a process for each core", None))
    }
    made[f"ale-py's AtariVectorEnv, {cores} threads"] = ale_py.vector_env.AtariVectorEnv(
        "space_invaders", count, num_threads=cores, stack_num=1, use_fire_reset=False, **same
    )
    made["gymnasium, SyncVectorEnv"] = gymnasium.vector.SyncVectorEnv(make, copy=False, **same)
    made["gymnasium, AsyncVectorEnv"] = gymnasium.vector.AsyncVectorEnv(
        make, copy=False, context="forkserver", **same
    )
    return {name: playing(games) for name, games in made.items()}


class StandIn:
    """A simulated learner, whose updates take time on a separate device but none here."""

    def __init__(self, games: int, actions: int, milliseconds: float):
        import tensorflow as tf

        self._seconds, self._idle = milliseconds / 1000, 0.0
        self._q = tf.random.uniform([games, actions], seed=0)

    def act(self, states: Any) -> Any:
        """Returns Q-values after the device has finished all earlier updates."""
        while (left := self._idle - time.perf_counter()) > 0:
            time.sleep(left)
        return self._q

    def update(self, batches: tuple[Any, ...]) -> None:
        self._idle = max(time.perf_counter(), self._idle) + self._seconds * len(batches)

    def copy_to_target(self) -> None:
        pass


def training(count: int, milliseconds: float) -> Callable[[], object]:
    """The program with a simulated learner."""
    from models.dqn.agent import Actor
    from models.dqn.config import Config
    from models.dqn.replay import Replay
    from models.dqn.training import advance
    from models.dqn.vector import Games

    config = Config(
        num_envs=count, replay=20_000, learning_starts=2_048, epsilon_steps=1, target_every=10**9
    )
    games, memory = Games(config, count, 0), Replay(config.replay, count)
    learner: Any = StandIn(count, games.num_actions, milliseconds)
    actor = Actor(config, learner, games, memory)
    actor.begin()
    step = 0

    def play(steps: int) -> None:
        nonlocal step
        for _ in range(steps):
            advance(config, learner, actor, step)
            step += count

    play(2_048 // count)
    return functools.partial(play, STEPS)


def show(title: str, made: dict[str, Callable[[], object]], counts: list[int], options: Any) -> Any:
    times = timing.interleave(made, rounds=options.rounds, window_seconds=options.window)
    first = next(iter(made))
    table = Table("", "agent steps/s", f"times {first}", title=title)
    for (name, seconds), count in zip(times.seconds.items(), counts, strict=True):
        speed = count * STEPS / seconds
        reference = counts[0] * STEPS / times.seconds[first]
        ratio = timing.Quartiles.of(speed / reference)
        table.add_row(name, f"{timing.Quartiles.of(speed):.0f}", f"{ratio:.2f}")
    Console().print(table)
    return [{"name": name, "seconds": list(map(float, s))} for name, s in times.seconds.items()]


def main() -> None:
    """Measures, prints two tables and writes dqn-games.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dqn.games", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--games", type=int, default=8, help="games without a learner, default %(default)s"
    )
    parser.add_argument(
        "--learner-ms", type=float, default=0.5, help="time per update, default %(default)s"
    )
    parser.add_argument(
        "--num-envs", type=int, nargs="*", default=[1, 8, 32], help="games with a learner"
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="windows per contender, default %(default)s"
    )
    parser.add_argument("--window", type=float, default=0.5, help="seconds, default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="%(default)s")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    machine = timing.describe_machine("tensorflow", "gymnasium", "ale-py")
    results = []
    if options.games:
        made = contenders(options.games)
        title = f"{options.games} games, {cores} cores, no learner"
        results += show(title, made, [options.games] * len(made), options)
    if options.num_envs:
        learning = {f"{n} games": training(n, options.learner_ms) for n in options.num_envs}
        title = f"{cores} cores, a learner of {options.learner_ms} ms per update"
        results += show(title, learning, options.num_envs, options)
    timing.write_json(options.out / f"dqn-games-{cores}.json", machine, results)


if __name__ == "__main__":
    main()
