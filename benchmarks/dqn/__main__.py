"""Times DQN's training against CleanRL's algorithm, Stable-Baselines3 and a tuned PyTorch.

    python -m benchmarks.dqn [--rounds 15] [--threads 2] [--only NAME ...] [--out build/benchmarks]

Measures agent steps per second in the steady state: Space Invaders, the network of Mnih et al.
2015, minibatches of 64, one update per 4 steps, 10% random actions. Each contender runs in its own
process, and they take turns in windows of a few seconds. A ratio is the median over all rounds of
the quotient of two windows. Ours is the program's own loop body (models.dqn.training.advance).
"""

import argparse
import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from benchmarks.dqn.contenders import CLEANRL, CONTENDERS, SB3, SB3_8, STEPS, TUNED, Contender


def main() -> None:
    """Measures, prints the table and writes dqn.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dqn", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="windows per contender, default %(default)s"
    )
    parser.add_argument("--window", type=float, default=2.0, help="seconds, default %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", default=[], help="names of contenders")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="%(default)s")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(CONTENDERS):
        parser.error(f"--only {', '.join(unknown)}: the contenders are {', '.join(CONTENDERS)}")
    console = Console()
    machine = timing.describe_machine(
        "tensorflow", "torch", "stable-baselines3", "gymnasium", "ale-py"
    )
    console.print(machine)
    made = {name: Contender(name, arguments.threads) for name in arguments.only or CONTENDERS}
    times = timing.interleave(dict(made), rounds=arguments.rounds, window_seconds=arguments.window)
    for contender in made.values():
        contender.close()
    compared = [name for name in (CLEANRL, SB3, SB3_8, TUNED) if name in times]
    table = Table(title="agent steps per second; median ratios ± half the interquartile range")
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
