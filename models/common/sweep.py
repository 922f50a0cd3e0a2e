"""A grid of runs below one folder; the same command again continues where it stopped."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from models.common import run_folder
from models.common.errors import NotFinite, UserError


def run(config: Any, train: Callable[[Any], None], **axes: tuple[Any, ...]) -> None:
    """Trains every combination of `config.seeds`, `config.learning_rates` and `axes`.

    Each run has its folder below `config.out`. OUT/sweep.json lists those that are finished and
    those that diverged, which is a result and not tried again; any other error ends the sweep. A
    sweep whose other hyper-parameters are not those of its runs is refused, as a run is.

    Args:
      config: the template of every run, with the fields sweep, seeds and learning_rates.
      train: trains one Config.
      axes: other fields, and the values that each takes.
    """
    if config.strategy == "multi_worker":
        raise UserError(
            "--sweep is for one machine: with --strategy multi_worker start single runs"
        )
    root = Path(config.out)
    record = root / "sweep.json"
    ended: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    axes = {"seed": config.seeds, **axes, "learning_rate": config.learning_rates}
    one = dataclasses.replace(config, sweep=False)
    for path in sorted(file.parent for file in root.glob("*/config.json")):
        changed = run_folder.changes(run_folder.load_config(path, type(config)), one)
        others = [text for name, text in changed.items() if name not in axes]
        if others and not config.accept_changes:
            raise UserError(
                f"--sweep: in {path} {', '.join(others)}; repeat the options of before, name "
                "another --out, or give --accept-changes to continue with the new value in the "
                "runs that are not finished"
            )
    grid = [dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values())]
    names = ["-".join(map(str, [*v.values()][1:])) + f"-{v['seed']}" for v in grid]
    for number, (name, values) in enumerate(zip(names, grid, strict=True), 1):
        if name in ended:
            continue
        print(f"run {number} of {len(grid)}: {name}", flush=True)
        out = root / name
        begun = (out / "config.json").exists()
        try:
            train(dataclasses.replace(one, resume=begun, out=str(out), **values))
            ended[name] = "finished"
        except NotFinite as error:
            ended[name] = f"diverged: {error}"
            print(ended[name], flush=True)
        run_folder.write_atomically(record, json.dumps(ended, indent=2) + "\n")
        tf.keras.backend.clear_session()
    diverged = sum(ended[name] != "finished" for name in names)
    print(
        f"all {len(names)} runs are finished"
        + (f", {diverged} of them diverged" if diverged else "")
        + f"; they are in {root}"
    )
