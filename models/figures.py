"""Draws the paper's figures and prints its tables, ours beside the paper's, from any runs.

    python -m models.figures runs/cifar-paper-sweep runs/dqn-* --out figures

A folder stands for all the runs in it. Of several seeds, the mean and its standard error are shown.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from models.common import figures
from models.common.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Draws what can be drawn, then reports what cannot."""
    parser = argparse.ArgumentParser(prog="python -m models.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or one of runs")
    parser.add_argument("--out", default="figures", help="where to write (default: figures)")
    parser.add_argument(
        "--label-presets", action="store_true", help="draw several presets, each labeled"
    )
    asked = parser.parse_args(argv)
    try:
        output = figures.Output(Path(asked.out), asked.label_presets)
    except UserError as error:
        parser.error(str(error))
    runs = figures.find_runs(asked.runs, output)
    for program in dict.fromkeys(run.program for run in runs):
        here = [run for run in runs if run.program == program]
        with output.attempt():
            figures.check_presets(here, asked.label_presets)
            importlib.import_module(f"models.{program}.figures").draw(here, output)
    for text in output.errors:
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
    sys.exit(2 if output.errors else 0)


if __name__ == "__main__":
    main()
