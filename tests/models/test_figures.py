"""models/figures.py: tables beside the paper's, seeds averaged, presets kept apart."""

import json

import numpy as np
import pytest

from models import figures
from models.cifar.config import Config as Cifar
from models.common.figures import Axes
from models.common.run_folder import program_of
from models.dqn.config import Config as Dqn
from models.draw.config import Config as Draw
from models.vae.config import Config as Vae


def write_config(folder, config_class, preset, **values):
    """A config.json with a preset's values and these."""
    folder.mkdir(parents=True)
    config = {**config_class.PRESETS[preset].values, "preset": preset, **values}
    content = {"program": program_of(config_class), "config": config}
    (folder / "config.json").write_text(json.dumps(content))


def make_run(
    folder, preset="paper", kind="weight_norm", rate=None, seed=0, ends=0.05, done=4, **config
):
    write_config(
        folder, Cifar, preset, parameterization=kind, learning_rate=rate, seed=seed, **config
    )
    rows = [f"{500 * e},1,{e},{ends * done / e:.6g},{ends * 2}" for e in range(1, done + 1)]
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
    make_run(tmp_path / "runs" / "0", rate=0.0, kind="normal")
    table = run(tmp_path / "runs")[3]
    assert "| weight norm | 3.00 % | 6.00 % | 8.46 % | 1 | 0.003 | 4 of 200 |" in table
    assert "| normal | 5.00 % | 10.00 % | 8.43 % | 1 | 0 | 4 of 200 |" in table
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
    _, out, _, table = run(folder)
    assert "[cpu" in out  # Printed too, if over two lines.
    assert "| normal [cpu preset] |" in table
    assert "(lossy images)" in table


def test_folders_without_runs(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for folder, told in ((tmp_path, "no run there"), (tmp_path / "no", "there is no such folder")):
        status, _, err, _ = run(folder)
        assert (status, f"{folder}: {told}" in err) == (2, True), err
    (tmp_path / "other" / "metrics.csv").write_text("a,b")
    status, _, err, _ = run(tmp_path)
    assert (status, f"{tmp_path / 'other'}: not a run folder" in err) == (2, True), err


def test_a_run_of_an_unknown_parameterization_is_named(run, tmp_path):
    folder = make_run(tmp_path / "runs" / "a", kind="spectral_norm")
    status, _, err, _ = run(tmp_path / "runs")
    assert (status, err.count("\n")) == (2, 1), err
    assert f"{folder}: its config.json has parameterization 'spectral_norm'" in err


def test_a_run_counts_once(run, tmp_path):
    folder = make_run(tmp_path / "runs" / "a")
    assert "| 8.46 % | 1 |" in run(tmp_path / "runs", folder, f"{folder}/../a")[3]


def test_runs_without_an_epoch_are_left_out(run, tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, done=0)
    assert "| 8.46 % | 1 |" in run(tmp_path / "a", tmp_path / "b")[3]
    status, _, err, _ = run(tmp_path / "b")
    assert status == 2
    assert "none of the CIFAR-10 runs has finished an epoch" in err


def make_vae_run(folder, dataset="mnist", kind="weight_norm", ends=-90.0, epochs=4, **config):
    write_config(folder, Vae, "cpu", dataset=dataset, parameterization=kind, **config)
    rows = ["step,time,epoch,test_bound,test_paper_axis,test_bits_per_dim,test_log_likelihood"]
    for e in range(1, epochs + 1):
        likelihood = ends + 3 if e == epochs else ""
        rows.append(f"{e},1,{e},{ends - epochs + e},{8000 + ends},4.24,{likelihood}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_figure_3_has_both_data_sets_and_averages_seeds(run, tmp_path):
    for seed, ends in enumerate((-91.0, -90.0, -89.0)):
        make_vae_run(tmp_path / "runs" / f"mnist-{seed}", ends=ends, seed=seed)
    make_vae_run(tmp_path / "runs" / "normal", kind="normal", ends=-92.0)
    make_vae_run(tmp_path / "runs" / "cifar", dataset="cifar10", ends=10.0)
    status, _, _, table = run(tmp_path / "runs")
    assert status == 0
    assert "| weight norm [cpu preset] | -90.00 ± 0.58 | -87.00 ± 0.58 | 3 | 4 |" in table
    assert "| normal [cpu preset] | -92.00 | -89.00 | 1 | 4 |" in table
    assert "| 10.00 | 8010 | 4.240 | 13.00 | 1 | 4 |" in table
    assert "the paper's axis: -88 to -84" in table
    for name in ("mnist", "cifar10"):
        assert (tmp_path / "out" / f"figure-3-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_there_is_no_figure_of_synthetic_images(run, tmp_path):
    make_vae_run(tmp_path / "a", dataset="synthetic_mnist")
    status, _, err, _ = run(tmp_path)
    assert (status, "of synthetic images" in err) == (2, True)


def test_seeds_of_different_length_are_compared_where_all_have_been(run, tmp_path):
    make_vae_run(tmp_path / "runs" / "0", epochs=4, ends=-90.0)
    make_vae_run(tmp_path / "runs" / "1", epochs=2, ends=-94.0, seed=1)
    table = run(tmp_path / "runs")[3]
    assert "| -93.00 ± 1.00 |  | 2 | 2 |" in table


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(run, tmp_path):
    a, b = tmp_path / "runs" / "0", tmp_path / "runs" / "1"
    make_run(a, preset="smoke")
    make_run(b, preset="smoke", width=8, seed=1)
    status, _, err, _ = run(tmp_path / "runs")
    assert (status, f"{b} is --preset smoke, changed: width 8. Scaled runs" in err) == (2, True)
    table = run(tmp_path / "runs", "--label-presets")[3]
    assert "| weight norm [smoke preset] | 5.00 % | 10.00 % | 8.46 % | 1 |" in table
    assert "| weight norm [smoke, changed: width 8] | 5.00 % | 10.00 % | 8.46 % | 1 |" in table


def test_what_is_named_beside_a_result_may_not_differ_within_one_either(run, tmp_path):
    a = make_vae_run(tmp_path / "a", dataset="cifar10", binarization="dynamic")
    b = make_vae_run(tmp_path / "b", dataset="cifar10", seed=1)
    status, _, err, _ = run(a, b)
    assert status == 2
    assert f"{a} has --binarization dynamic and {b} static: they are not seeds of one" in err


def test_a_seed_counts_once(run, tmp_path):
    makers = {"cifar": make_run, "vae": make_vae_run}
    makers["draw"] = lambda folder: make_draw_run(folder, "normal", [-100])
    makers["dqn"] = lambda folder: make_dqn_run(folder, [1, 2])
    for name, make in makers.items():
        one, other = make(tmp_path / name / "a"), make(tmp_path / name / "b")
        status, _, err, _ = run(tmp_path / name)
        assert status == 2
        assert f"{one} and {other} both have --seed 0: the same run would count twice" in err


def test_a_learning_rate_is_the_same_whether_given_or_not(run, tmp_path):
    make_run(tmp_path / "runs" / "0", rate=0.003)
    make_run(tmp_path / "runs" / "1", seed=1)
    assert "| 8.46 % | 2 | 0.003 |" in run(tmp_path / "runs")[3]


def axes_of(monkeypatch, tmp_path, *argv):
    """The axes of the figures that a command line draws."""
    seen, leave = [], Axes.__exit__
    with monkeypatch.context() as patch:
        patch.setattr(
            Axes, "__exit__", lambda self, *e: (seen.append(self.axes), leave(self, *e))[1]
        )
        with pytest.raises(SystemExit, match="0"):
            figures.main([*map(str, argv), "--out", str(tmp_path / "out")])
    return seen


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"width": 4, "epochs": 1}, "paper, changed: width 4, epochs 1"),
        ({"dataset": "synthetic_cifar10"}, "paper, changed: dataset synthetic_cifar10"),
        ({"dropout": 0.25, "whiten": False}, "paper, changed: no-whiten, dropout 0.25"),
        (
            {
                "mixed_precision": "bfloat16",
                "dataset": "synthetic_cifar10",
                "epochs": 1,
                "leak": 0.0,
            },
            "paper, changed: mixed-precision bfloat16, dataset synthetic_cifar10 and 2 more",
        ),
    ],
)
def test_a_run_scaled_by_flags_does_not_pass_as_the_papers(
    run, tmp_path, monkeypatch, changes, label
):
    folder = make_run(tmp_path / "changed", **changes)
    assert f"| weight norm [{label}] |" in run(folder)[3]
    (axes,) = axes_of(monkeypatch, tmp_path, folder)
    assert axes.get_title().replace("\n", " ") == f"CIFAR-10 [{label}]"
    assert axes.get_xlim() != (0, 200)
    paper = make_run(tmp_path / "paper", kind="normal", seeds=[0])
    status, _, err, _ = run(folder, paper)
    assert (status, f"{folder} is --preset {label}" in err) == (2, True)
    (axes,) = axes_of(monkeypatch, tmp_path, paper)
    assert (axes.get_title(), axes.get_xlim()) == ("CIFAR-10", (0, 200))
    assert Cifar(**changes).note() == f" ({label.removeprefix('paper, ')})"


def test_static_and_dynamic_binarization_are_not_mixed(run, tmp_path):
    make_vae_run(tmp_path / "runs" / "0", kind="normal")
    make_vae_run(tmp_path / "runs" / "1", binarization="dynamic")
    status, _, err, _ = run(tmp_path / "runs")
    assert status == 2
    assert "some MNIST runs have --binarization static and some dynamic" in err


def test_the_log_likelihoods_number_of_samples_is_told_and_not_mixed(run, tmp_path):
    make_vae_run(tmp_path / "runs" / "0", eval_samples=20)
    make_vae_run(tmp_path / "runs" / "1", kind="normal", eval_samples=20)
    table = run(tmp_path / "runs")[3]
    assert "| bound, nats | log-likelihood, nats (20 samples) | seeds |" in table
    without = make_vae_run(tmp_path / "runs" / "2", kind="normal", eval_samples=1, seed=1, epochs=0)
    assert run(tmp_path / "runs", without)[0] == 0
    make_vae_run(tmp_path / "runs" / "3", kind="normal", eval_samples=100, seed=2)
    status, _, err, _ = run(tmp_path / "runs")
    assert (status, err.count("\n")) == (2, 1)
    assert "some MNIST runs have --eval-samples 20 and some 100" in err


def make_dqn_run(folder, scores, game="Breakout", kind="weight_norm", preset="paper", **config):
    write_config(folder, Dqn, preset, game=game, parameterization=kind, **config)
    rows = ["step,time,loss,epoch,test_score", "1000,1,0.5,,"]  # Most rows are not of tests.
    rows += [f"{e},1,,{e},{score}" for e, score in enumerate(scores, 1)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_figure_5_has_a_plot_for_each_game_and_figure_6_the_highest_scores(run, tmp_path):
    make_dqn_run(tmp_path / "runs" / "0", [10, 300, 200])
    make_dqn_run(tmp_path / "runs" / "1", [10, 100, 310], seed=1)
    make_dqn_run(tmp_path / "runs" / "2", [10, 20], kind="normal")
    make_dqn_run(tmp_path / "runs" / "3", [500], game="Pong", test="nature")
    status, _, _, table = run(tmp_path / "runs")
    assert status == 0
    assert (
        "| Breakout, weight norm | 305.0 ± 5.0 | 403 | 401 | paper: 125,000 steps | 2 | 3 |"
        in table
    )
    assert "| Breakout, normal | 20.0 | 410 | 401 | paper: 125,000 steps | 1 | 2 |" in table
    assert (
        "| Pong, weight norm | 500.0 |  |  | nature: 30 games of at most 5 minutes | 1 | 1 |"
        in table
    )
    for game in ("Breakout", "Pong"):
        path = tmp_path / "out" / f"figure-5-{game}.png"
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("errors", [("nan", "nan"), ("", "3"), ("2", "3")], ids=str)
def test_a_curves_error_may_be_missing(run, tmp_path, errors):
    folder = make_dqn_run(tmp_path / "runs", [10, 20])
    rows = zip(["1,1,1,10", "2,1,2,20"], errors, strict=True)
    lines = ["step,time,epoch,test_score,test_stderr", *map(",".join, rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    status, _, err, _ = run(folder)
    assert (status, err) == (0, "")


def test_scores_of_different_tests_are_not_drawn_together(run, tmp_path):
    make_dqn_run(tmp_path / "runs" / "0", [10])
    make_dqn_run(tmp_path / "runs" / "1", [10], kind="normal", test="nature")
    status, _, err, _ = run(tmp_path / "runs")
    assert (status, err.count("\n")) == (2, 1)
    assert "some runs of Breakout have --protocol paper and some nature" in err


def test_a_scaled_dqn_says_how_long_its_epochs_are(run, tmp_path):
    make_dqn_run(tmp_path / "runs" / "0", [10], preset="cpu", test_every=50_000)
    table = run(tmp_path / "runs")[3]
    assert "| Breakout, weight norm [cpu preset] |" in table
    assert "50,000 steps" in table


def make_draw_run(folder, kind, bounds, preset="paper", **config):
    write_config(folder, Draw, preset, parameterization=kind, **config)
    rows = [f"{500 * e},1,{e},{bound}" for e, bound in enumerate(bounds, 1)]
    (folder / "metrics.csv").write_text("\n".join(["step,time,epoch,test_bound", *rows]) + "\n")
    return folder


def test_figure_4_averages_seeds_and_says_who_reaches_the_same_bound_when(run, tmp_path):
    for seed, shift in enumerate((-1, 0, 1)):
        normal = np.array([-200, -150, -120, -110]) + shift
        make_draw_run(tmp_path / "runs" / f"n{seed}", "normal", normal, seed=seed)
        make_draw_run(tmp_path / "runs" / f"w{seed}", "weight_norm", [-150, -100, -95], seed=seed)
    status, _, _, table = run(tmp_path / "runs")
    assert status == 0
    error = 1 / np.sqrt(3)
    assert f"| normal | -110.00 ± {error:.2f} | 4.0 to -110.00 | 3 | 4 of 100 |" in table
    # From -150 to -100 in one epoch: -110 after 0.8 of it.
    assert "| weight norm | -95.00 ± 0.00 | 1.8 to -110.00 | 3 | 3 of 100 |" in table
    assert (tmp_path / "out" / "figure-4.png").read_bytes().startswith(b"\x89PNG")


def test_figure_4_has_the_papers_axes_and_its_curves_the_runs_points(tmp_path, monkeypatch):
    make_draw_run(tmp_path / "a", "weight_norm", [-110, -100])
    (axes,) = axes_of(monkeypatch, tmp_path, tmp_path / "a")
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 100), (-120, -80))
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, -110], [2, -100]])


def test_figure_4_without_an_epoch(run, tmp_path):
    status, _, err, _ = run(make_draw_run(tmp_path / "a", "normal", []))
    assert status == 2
    assert "none of the DRAW runs has finished an epoch" in err


def test_what_can_be_drawn_is_drawn_and_the_rest_reported(run, tmp_path):
    make_run(tmp_path / "cifar")
    make_draw_run(tmp_path / "draw", "normal", [])
    make_run(tmp_path / "other", kind="spectral_norm")
    names = ("absent", "draw", "other", "cifar")
    status, _, err, table = run(*(tmp_path / name for name in names))
    assert (status, err.count("\n")) == (2, 3)
    assert "absent" in err
    assert "spectral_norm" in err
    assert "DRAW" in err
    assert "| weight norm | 5.00 % | 10.00 % | 8.46 % | 1 |" in table
    assert (tmp_path / "out" / "figure-1.png").exists()
