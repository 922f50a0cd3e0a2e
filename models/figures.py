"""Draws the paper's figures and tables from runs, with the paper's results alongside.

    python -m models.figures                                  RESULTS.md, from the runs in results
    python -m models.figures runs/cifar-cpu-sweep --out DIR   from any runs
    python -m models.figures runs/dqn-* --keep dqn-breakout   adds runs to results/dqn-breakout

A folder stands for all the runs in it. results/EXPERIMENT holds the config.json and metrics.csv of
the runs behind RESULTS.md. Their tables are written to RESULTS.md, between `<!-- table: NAME -->`
and `<!-- end -->`, and their figures to docs/figures.
"""

import argparse
import importlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from models.common import files
from models.common.errors import UserError
from models.common.figures import FinishedRun, Output, check_presets, find_runs, group

TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws whatever can be drawn, then prints why the rest cannot."""
    parser = argparse.ArgumentParser(prog="python -m models.figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder, or a folder of runs")
    parser.add_argument("--out", default="figures", help="output folder (default: figures)")
    parser.add_argument("--keep", metavar="EXPERIMENT", help="add the runs to results/EXPERIMENT")
    parser.add_argument(
        "--label-presets", action="store_true", help="allow several presets, and label each"
    )
    asked = parser.parse_args(argv)
    try:
        if asked.keep is not None:
            if not asked.runs or not re.fullmatch(r"[\w.-]*\w[\w.-]*", asked.keep):
                raise UserError(
                    "--keep needs a folder name (letters, digits, _, . and -), and at least one RUN"
                )
            errors = keep(asked.runs, Path("results", asked.keep))
        elif asked.runs:
            output = Output(Path(asked.out), asked.label_presets)
            draw(find_runs(asked.runs, output), output)
            text = "\n\n".join(f"## {name}\n\n{t}" for name, t in output.tables.items())
            if text:
                print(text)
                (output.folder / "TABLES.md").write_text(text + "\n")
            errors = output.errors
        else:
            errors = report(Path("RESULTS.md"), Path("results"), Path("docs", "figures"))
    except UserError as error:
        errors = [str(error)]
    for text in errors:
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
    sys.exit(2 if errors else 0)


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Draws the figures and tables of each program that has runs."""
    for program, here in group(runs, lambda run: run.program).items():
        with output.attempt():
            check_presets(here, output.label_presets)
            importlib.import_module(f"models.{program}.figures").draw(here, output)


def report(document: Path, results: Path, figures: Path) -> list[str]:
    """Draws all experiments in `results` and updates the tables in the document.

    A table that the document does not mention is appended, with the experiment's figures.
    Returns error messages, for example about a table in the document that has no runs.
    """
    if not document.exists():
        raise UserError(f"no {document} here: run this in the root of a checkout, or name a RUN")
    tables: dict[str, str] = {}
    errors: list[str] = []
    text = document.read_text()
    named = [name for _, name, _ in TABLE.findall(text)]
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        output = Output(figures, name=folder.name)
        draw(find_runs([folder], output), output)
        tables |= output.tables
        errors += output.errors
        if new := [name for name in output.tables if name not in named]:
            text += f"\n## {folder.name}\n\n"
            text += "".join(f"![{path.stem}]({path})\n" for path in output.figures)
            text += "".join(f"\n<!-- table: {name} -->\n<!-- end -->\n" for name in new)
    for name in named:
        if name not in tables:
            errors.append(f"{document}: no runs in {results} for its table {name}; see --keep")
            tables[name] = f"(Missing: `{results}` contains no runs for this table.)"
    document.write_text(TABLE.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[3]}", text))
    return errors


def keep(paths: Sequence[str], folder: Path) -> list[str]:
    """Copies finished and diverged runs to a results folder; returns errors about the others.

    A copy is named ARM-RATE-SEED, or like the run's folder if the run belongs to no arm. Absolute
    paths in its config.json become relative.
    """
    output = Output(Path())
    for run in find_runs(paths, output):
        with output.attempt():
            target = folder / (
                f"{run.arm}-{run.config.rate:g}-{run.config.seed}" if run.known else run.path.name
            )
            content = json.loads((run.path / "config.json").read_text())
            if not run.outcome:
                raise UserError(f"{run.path} has not finished: continue it with --resume")
            if any(session["git"].get("changed") for session in content["sessions"]):
                raise UserError(f"{run.path} ran with uncommitted changes: commit, then rerun it")
            text = json.dumps(relative(content), indent=2) + "\n"
            config = target / "config.json"
            if config.exists() and config.read_text() != text:
                raise UserError(f"{target} holds a different run than {run.path}: remove one")
            target.mkdir(parents=True, exist_ok=True)
            if run.path.resolve() != target.resolve():
                shutil.copy(run.path / "metrics.csv", target)
            files.write_atomically(config, text)
            print(f"{target}: {run.outcome}")
    return output.errors


def relative(value):
    """Returns a config.json value with absolute paths cut to "runs/..." or to the file name."""
    if isinstance(value, dict):
        return {key: relative(item) for key, item in value.items()}
    if isinstance(value, list):
        return [relative(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w.~])/(?:\S*?/(?=runs/)|\S*/)?(\S*)", r"\1", value)
    return value


if __name__ == "__main__":
    main()
