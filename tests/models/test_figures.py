"""models/figures.py: tables beside the paper's, seeds averaged, presets kept apart."""

import json

import numpy as np
import pytest

from models import figures


def make_run(folder, preset="paper", kind="weight_norm", rate=None, seed=0, ends=0.05, epochs=4):
    folder.mkdir(parents=True)
    config = {"preset": preset, "parameterization": kind, "learning_rate": rate, "seed": seed}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "program": "models.cifar",
                "config": {**config, "epochs": epochs},
                "differs_from_paper": {},
            }
        )
    )
    rows = [f"{500 * e},1,{e},{ends * epochs / e:.6g},{ends * 2}" for e in range(1, epochs + 1)]
    header = "step,time,epoch,train_error,test_error"
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the command line; returns (exit status, stdout, stderr, the tables written)."""

    def call(*argv):
        status = 0
        try:
            figures.main([*map(str, argv), "--out", str(tmp_path / "out")])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        tables = tmp_path / "out" / "TABLES.md"
        text = tables.read_text() if tables.exists() else ""
        return status, captured.out, captured.err, text

    return call


def test_seeds_are_averaged_with_their_standard_error_beside_the_papers(run, tmp_path):
    for seed, ends in enumerate((0.04, 0.05, 0.06)):
        make_run(tmp_path / "runs" / f"{seed}", seed=seed, ends=ends)
    status, out, _, table = run(tmp_path / "runs")
    assert status == 0
    error = np.std([8, 10, 12], ddof=1) / np.sqrt(3)
    assert f"| weight norm | 5.00 ± 0.58 % | 10.00 ± {error:.2f} % | 8.46 % | 3 |" in table
    assert "10.00" in out
    assert (tmp_path / "out" / "figure-1.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_grid_the_learning_rate_with_the_least_training_error_is_shown(run, tmp_path):
    for rate, ends in ((0.001, 0.05), (0.003, 0.03), (0.01, 0.9)):
        make_run(tmp_path / "runs" / f"{rate}", rate=rate, ends=ends)
    table = run(tmp_path / "runs")[3]
    assert "| weight norm | 3.00 % | 6.00 % | 8.46 % | 1 | 0.003 | 4 of 4 |" in table
    assert table.count("weight norm") == 1


def test_presets_are_not_mixed_without_labels(run, tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", preset="cpu")
    status, _, err, _ = run(tmp_path / "a", tmp_path / "b")
    assert status == 2
    assert f"{tmp_path / 'b'} is --preset cpu" in err
    assert "--label-presets" in err
    status, _, _, table = run(tmp_path / "a", tmp_path / "b", "--label-presets")
    assert status == 0
    assert "weight norm [paper preset]" in table
    assert "weight norm [cpu preset]" in table


def test_a_scaled_preset_is_labelled_and_its_notes_are_shown(run, tmp_path):
    folder = make_run(tmp_path / "a", preset="cpu", kind="normal")
    (folder / "note.txt").write_text("(lossy images)")
    table = run(folder)[3]
    assert "| normal [cpu preset] |" in table
    assert "(lossy images)" in table


def test_a_folder_without_runs(run, tmp_path):
    status, _, err, _ = run(tmp_path)
    assert status == 2
    assert f"{tmp_path}: no run there" in err


def test_runs_without_an_epoch_are_left_out(run, tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, epochs=0)
    assert "| 8.46 % | 1 |" in run(tmp_path / "a", tmp_path / "b")[3]
    status, _, err, _ = run(tmp_path / "b")
    assert status == 2
    assert "none of the CIFAR-10 runs has finished an epoch" in err
