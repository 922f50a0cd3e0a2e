"""Tests models/figures.py: best rates, averages over seeds, separate presets, RESULTS.md."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from support import ROOT

from models import figures
from models.cifar.config import Config as Cifar
from models.common import metrics
from models.common.run_folder import program_of
from models.common.sweep import Sweep
from models.dqn.config import Config as Dqn
from models.draw.config import Config as Draw
from models.vae.config import Config as Vae

PNG = b"\x89PNG"


def write_run(folder, config_class, rows, preset="paper", diverged=None, caveats="", **values):
    """Writes a run with a preset's values, updated by `values`. `rows`: one dict per epoch."""
    folder.mkdir(parents=True)
    config = {**config_class.PRESETS[preset].values, "preset": preset, **values}
    session = {"command": f"-m x --out {folder}", "git": {"changed": False}}
    content = {"program": program_of(config_class), "config": config, "caveats": caveats}
    content |= {"sessions": [session], **({"diverged": diverged} if diverged else {})}
    (folder / "config.json").write_text(json.dumps(content))
    table = metrics.Metrics(folder)
    for epoch, row in enumerate(rows, 1):
        table.write(500 * epoch, {"epoch": epoch, **row})
    return folder


def make_run(
    folder, preset="paper", kind="weight_norm", rate=None, seed=0, ends=0.05, done=4, **config
):
    """Writes a CIFAR-10 run with final training error `ends` and test error 2 * `ends`."""
    rows = [{"train_error": ends * done / e, "test_error": 2 * ends} for e in range(1, done + 1)]
    config |= {"parameterization": kind, "learning_rate": rate, "seed": seed}
    return write_run(folder, Cifar, rows, preset, **config)


def make_vae_run(folder, dataset="mnist", kind="weight_norm", ends=-90.0, epochs=4, **config):
    rows = [
        {"test_bound": ends - epochs + e, "test_paper_axis": 8000 + ends, "test_bits_per_dim": 4.24}
        for e in range(1, epochs + 1)
    ]
    for row in rows[-1:]:
        row["test_log_likelihood"] = ends + 3
    return write_run(folder, Vae, rows, "cpu", dataset=dataset, parameterization=kind, **config)


def make_draw_run(folder, kind, bounds, preset="paper", **config):
    rows = [{"test_bound": bound} for bound in bounds]
    return write_run(folder, Draw, rows, preset, parameterization=kind, **config)


def make_dqn_run(folder, scores, game="Breakout", kind="weight_norm", preset="paper", **config):
    rows = [{"test_score": s, "test_stderr": 2.0, "test_games": 30.0} for s in scores]
    return write_run(folder, Dqn, rows, preset, game=game, parameterization=kind, **config)


def call(*words):
    """Runs the command line and returns its exit status."""
    with pytest.raises(SystemExit) as error:
        figures.main([*map(str, words)])
    return error.value.code


@pytest.fixture
def run(capsys, tmp_path):
    """A function that runs the command line and returns (exit status, stderr, TABLES.md)."""

    def call_and_read(*words):
        status = call(*words, "--out", tmp_path / "out")
        tables = tmp_path / "out" / "TABLES.md"
        return status, capsys.readouterr().err, tables.read_text() if tables.exists() else ""

    return call_and_read


def cells(text, label, table=0):
    """Returns the cells after this label, from the table-th table that has such a row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [row[1:] for row in rows if row[0].strip() == label][table]


def test_seeds_are_averaged_with_their_standard_error_beside_the_papers(run, tmp_path):
    for seed, ends in enumerate((0.04, 0.05, 0.06)):
        make_run(tmp_path / "runs" / f"{seed}", seed=seed, ends=ends)
    status, _, text = run(tmp_path / "runs")
    assert status == 0
    test, train, reached, *others = cells(text, "weight norm")
    assert test == f"10.00 ± {np.std([8, 10, 12], ddof=1) / np.sqrt(3):.2f}"
    assert train == "5.00 ± 0.58"
    assert reached == "1.0"
    assert others == ["8.46", "0.003", "1", "4 of 200", "3 seeds"]
    assert (tmp_path / "out" / "cifar-curves.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "out" / "cifar-rates.png").exists()  # There is only one rate.


def test_each_arm_is_shown_at_the_rate_that_is_best_with_the_first_seed(run, tmp_path):
    for kind, frozen, best in (("normal", False, 0.001), ("normal", True, 0.003)):
        for rate in (0.001, 0.003, 0.01):
            ends = 0.03 if rate == best else 0.05
            make_run(tmp_path / "runs" / f"{frozen}{rate}", kind=kind, frozen_g=frozen, rate=rate,
                     ends=ends, diverged="loss is nan" if rate == 0.01 else None)  # fmt: skip
        # A bad second seed at the best rate must not change the choice.
        make_run(tmp_path / "runs" / f"{frozen}", kind=kind, frozen_g=frozen, rate=best, seed=1,
                 ends=0.09)  # fmt: skip
    status, _, text = run(tmp_path / "runs")
    assert status == 0
    for label, best in (("normal", "0.001"), ("normal, constant g", "0.003")):
        test, *_, paper, rate, tried, _, unit = cells(text, label)
        assert (test, paper, rate, tried, unit) == ("12.00 ± 6.00", "8.43", best, "3", "2 seeds")
    assert cells(text, "normal, seed 0") == ["**6.00**", "10.00", "diverged"]
    assert cells(text, "normal, constant g, seed 0") == ["10.00", "**6.00**", "diverged"]
    assert (tmp_path / "out" / "cifar-rates.png").read_bytes().startswith(PNG)


def test_an_arm_that_diverged_at_every_rate_is_in_the_table_of_rates(run, tmp_path):
    make_run(tmp_path / "runs" / "a", rate=0.1, diverged="loss is nan")
    make_run(tmp_path / "runs" / "b", rate=0.2, diverged="loss is nan", done=0)
    make_run(tmp_path / "runs" / "c", rate=0.1, kind="normal")
    status, err, text = run(tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    assert (status, "no run can be drawn: 2 diverged, 0 have not" in err) == (2, True)
    _, _, text = run(tmp_path / "runs")
    assert cells(text, "weight norm, seed 0") == ["diverged", "diverged"]
    assert cells(text, "normal, seed 0")[0] == "10.00"
    assert cells(text, "weight norm") == ["diverged", "", "", "8.46", "", "2"]


def test_a_seed_that_diverged_at_the_best_rate_is_counted(run, tmp_path):
    make_run(tmp_path / "runs" / "0", ends=0.04)
    make_run(tmp_path / "runs" / "1", seed=1, diverged="loss is nan", done=2)
    make_run(tmp_path / "runs" / "2", seed=2, ends=0.06)
    *_, unit = cells(run(tmp_path / "runs")[2], "weight norm")
    assert unit == "2 of 3 seeds, 1 diverged"


@pytest.fixture
def drawn(monkeypatch):
    """The first axes of each figure that is saved."""
    axes, savefig = [], matplotlib.figure.Figure.savefig

    def record(self, path):
        axes.append(self.axes[0])
        savefig(self, path)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return axes


def test_a_run_in_progress_is_blank_and_not_diverged(run, tmp_path, drawn):
    make_run(tmp_path / "runs" / "a", rate=0.001)
    make_run(tmp_path / "runs" / "b", rate=0.003, done=0)
    _, _, text = run(tmp_path / "runs")
    assert cells(text, "weight norm, seed 0") == ["**10.00**"]
    labels = [label for axes in drawn for label in axes.get_legend_handles_labels()[1]]
    assert labels
    assert "diverged" not in labels


def test_curves_are_the_runs_points_on_the_papers_axes(run, tmp_path, drawn):
    make_draw_run(tmp_path / "a", "weight_norm", [-110, -100])
    run(tmp_path / "a")
    assert (drawn[0].get_xlim(), drawn[0].get_ylim()) == ((0, 100), (-120, -80))
    np.testing.assert_array_equal(drawn[0].lines[0].get_xydata(), [[1, -110], [2, -100]])


def test_the_first_seed_is_the_one_with_all_rates(run, tmp_path):
    for rate, seed in ((0.001, 3), (0.003, 3), (0.003, 1), (0.003, 2)):
        ends = 0.04 if rate == 0.003 else 0.05
        make_run(tmp_path / "runs" / f"{rate}-{seed}", rate=rate, seed=seed, ends=ends)
    text = run(tmp_path / "runs")[2]
    assert cells(text, "weight norm, seed 3") == ["10.00", "**8.00**"]


def test_a_scaled_preset_the_runs_caveats_and_changes_within_a_run_are_named(run, tmp_path):
    folder = make_run(tmp_path / "a", preset="cpu", kind="normal", caveats="lossy images")
    path = folder / "config.json"
    change = "from step 500: --dropout was 0.5 and is now 0.2"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"changes": [change]}))
    text = run(folder)[2]
    for named in ("[cpu preset]", "; lossy images", Cifar.PRESETS["cpu"].about, f"; a {change}"):
        assert named in text


def test_folders_without_runs(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for folder, told in ((tmp_path, "no run there"), (tmp_path / "no", "there is no such folder")):
        status, err, _ = run(folder)
        assert (status, f"{folder}: {told}" in err) == (2, True), err
    (tmp_path / "other" / "metrics.csv").write_text("a,b")
    status, err, _ = run(tmp_path)
    assert (status, f"{tmp_path / 'other'}: not a run folder" in err) == (2, True), err


def test_a_run_and_a_seed_count_once(run, tmp_path):
    """A run found under two paths counts once; two runs with one seed are an error."""
    folder = make_run(tmp_path / "runs" / "a")
    text = run(tmp_path / "runs", folder, f"{folder}/../a")[2]
    assert cells(text, "weight norm")[-1] == "1 seed"
    makers = {"cifar": make_run, "vae": make_vae_run}
    makers["draw"] = lambda folder: make_draw_run(folder, "normal", [-100])
    makers["dqn"] = lambda folder: make_dqn_run(folder, [1, 2])
    for name, make in makers.items():
        one, other = make(tmp_path / name / "a"), make(tmp_path / name / "b")
        status, err, _ = run(tmp_path / name)
        assert status == 2
        assert f"{one} and {other} both have --seed 0: the same run would count twice" in err


def test_runs_without_an_epoch_are_left_out(run, tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, done=0)
    assert cells(run(tmp_path / "a", tmp_path / "b")[2], "weight norm")[-1] == "1 seed"
    err = run(tmp_path / "b")[1]
    assert "CIFAR-10: no run can be drawn: 0 diverged, 1 have not finished an epoch" in err


def test_figure_3_has_both_data_sets(run, tmp_path):
    for seed, ends in enumerate((-91.0, -90.0, -89.0)):
        make_vae_run(tmp_path / "runs" / f"mnist-{seed}", ends=ends, seed=seed)
    make_vae_run(tmp_path / "runs" / "normal", kind="normal", ends=-92.0)
    make_vae_run(tmp_path / "runs" / "cifar", dataset="cifar10", ends=10.0)
    status, _, text = run(tmp_path / "runs")
    assert status == 0
    assert cells(text, "weight norm", 1)[:2] == ["-90.00 ± 0.58", "-87.00 ± 0.58"]
    assert cells(text, "normal")[:2] == ["-92.00", "-89.00"]
    assert cells(text, "weight norm", 0)[:4] == ["10.00", "8010", "4.240", "13.00"]
    for name in ("mnist", "cifar10"):
        assert (tmp_path / "out" / f"vae-{name}-curves.png").read_bytes().startswith(PNG)
    status, err, _ = run(make_vae_run(tmp_path / "synthetic", dataset="synthetic_mnist"))
    assert (status, "of synthetic images" in err) == (2, True)


def test_seeds_of_different_length_are_compared_where_all_have_been(run, tmp_path):
    """Averages end at the last epoch that all seeds have reached."""
    make_vae_run(tmp_path / "runs" / "0", epochs=4, ends=-90.0)
    make_vae_run(tmp_path / "runs" / "1", epochs=2, ends=-94.0, seed=1)
    bound, likelihood, *_, epochs, seeds = cells(run(tmp_path / "runs")[2], "weight norm")
    assert (bound, likelihood, epochs, seeds) == ("-93.00 ± 1.00", "", "2 of 5", "2 seeds")


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(run, tmp_path):
    a, b = tmp_path / "runs" / "0", tmp_path / "runs" / "1"
    make_run(a, preset="smoke")
    make_run(b, preset="smoke", width=8, seed=1)
    status, err, _ = run(tmp_path / "runs")
    assert (status, f"{b} is --preset smoke, changed: width 8. Runs of" in err) == (2, True)
    text = run(tmp_path / "runs", "--label-presets")[2]
    assert cells(text, "weight norm [smoke preset]")[-1] == "1 seed"
    assert cells(text, "weight norm [smoke, changed: width 8]")[-1] == "1 seed"
    a = make_vae_run(tmp_path / "a", dataset="cifar10", binarization="dynamic")
    b = make_vae_run(tmp_path / "b", dataset="cifar10", seed=1)
    status, err, _ = run(a, b)
    assert status == 2
    assert f"{a} has --binarization dynamic and {b} static: they are not seeds of one" in err


def test_a_learning_rate_is_the_same_whether_given_or_not(run, tmp_path):
    """An explicit learning rate equal to the default does not create another arm."""
    make_run(tmp_path / "runs" / "0", rate=0.003)
    make_run(tmp_path / "runs" / "1", seed=1)
    assert cells(run(tmp_path / "runs")[2], "weight norm")[-1] == "2 seeds"


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"width": 4, "epochs": 1}, "paper, changed: width 4, epochs 1"),
        ({"dataset": "synthetic_cifar10"}, "paper, changed: dataset synthetic_cifar10"),
        ({"dropout": 0.25, "whiten": False}, "paper, changed: no-whiten, dropout 0.25"),
        (
            dict(mixed_precision="bfloat16", dataset="synthetic_cifar10", epochs=1, leak=0.0),
            "paper, changed: mixed-precision bfloat16, dataset synthetic_cifar10 and 2 more",
        ),
        (
            {"parameterization": "mean_only_bn", "frozen_g": True},  # Not an arm.
            "paper, changed: frozen-g",
        ),
    ],
)
def test_a_run_scaled_by_flags_does_not_pass_as_the_papers(run, tmp_path, changes, label):
    kind = changes.pop("parameterization", "weight_norm")
    folder = make_run(tmp_path / "changed", kind=kind, **changes)
    assert f"\nCIFAR-10 [{label}]" in run(folder)[2]
    paper = make_run(tmp_path / "paper", kind="normal", seeds=[0])
    status, err, _ = run(folder, paper)
    assert (status, f"{folder} is --preset {label}" in err) == (2, True)
    assert "\nCIFAR-10: section 5.1 as published" in run(paper)[2]
    assert Cifar(**changes).note() == f" ({label.removeprefix('paper, ')})"


@pytest.mark.parametrize(
    ("make", "option", "values", "told"),
    [
        (make_vae_run, "binarization", ("static", "dynamic"), "MNIST runs have --binarization"),
        (make_vae_run, "eval_samples", (20, 100), "have --eval-samples 20 and some 100"),
        (
            lambda folder, **config: make_dqn_run(folder, [10], **config),
            "test",
            ("nature", "paper"),
            "some runs of Breakout have --protocol nature and some paper",
        ),
    ],
)
def test_what_is_not_comparable_is_not_mixed(run, tmp_path, make, option, values, told):
    for kind, value in zip(("normal", "weight_norm"), values, strict=True):
        make(tmp_path / "runs" / kind, kind=kind, **{option: value})
    status, err, _ = run(tmp_path / "runs")
    assert (status, err.count("\n"), told in err) == (2, 1, True), err


def test_figure_5_has_a_plot_for_each_game_and_figure_6_the_highest_scores(run, tmp_path):
    make_dqn_run(tmp_path / "runs" / "0", [10, 300, 200])
    make_dqn_run(tmp_path / "runs" / "1", [10, 100, 310], seed=1)
    make_dqn_run(tmp_path / "runs" / "2", [10, 20], kind="normal")
    make_dqn_run(tmp_path / "runs" / "3", [500], game="Pong", test="nature")
    status, _, text = run(tmp_path / "runs")
    assert status == 0
    highest, last, paper, *_, over = cells(text, "data-dependent, initial Q 1, weight norm")
    assert (last, highest, paper, over) == ("255.0 ± 55.0", "305.0 ± 5.0", "403", "2 seeds")
    highest, last, paper, *_, over = cells(text, "data-dependent, initial Q 1, normal")
    assert (last, highest, paper, over) == ("20.0 ± 2.0", "20.0", "410", "30 games, 1 seed")
    # The paper has no results for Pong.
    assert cells(text, "data-dependent, initial Q 1, weight norm", 1)[2] == "0.0003"
    assert "score per game, Nature's protocol" in text
    for game in ("Breakout", "Pong"):
        path = tmp_path / "out" / f"dqn-{game}-curves.png"
        assert path.read_bytes().startswith(PNG)


def test_dqn_s_rate_is_that_of_the_highest_score_in_sweep_and_table(run, tmp_path):
    scores, rates = {1e-3: [10, 300, 20], 3e-3: [10, 100, 200]}, (1e-3, 3e-3)
    sweep = Sweep(Dqn(out=str(tmp_path / "runs"), steps=750_000, learning_rates=rates))
    arm = "one-weight_norm"
    for one in sweep.first(arm):
        make_dqn_run(Path(one.out), scores[one.rate], game=one.game, learning_rate=one.rate)
    assert sweep.best(arm).rate == 1e-3
    label = "data-dependent, initial Q 1, weight norm"
    text = run(tmp_path / "runs")[2]
    assert cells(text, label)[:4] == ["300.0", "20.0 ± 2.0", "2179", "0.001"]
    assert cells(text, f"{label}, seed 0") == ["**300.0**", "200.0"]


def test_what_can_be_drawn_is_drawn_and_the_rest_reported(run, tmp_path):
    """One unusable folder must not prevent the tables of the others."""
    make_run(tmp_path / "cifar")
    make_draw_run(tmp_path / "draw", "normal", [])
    make_run(tmp_path / "other", kind="spectral_norm")
    names = ("absent", "draw", "other", "cifar")
    status, err, text = run(*(tmp_path / name for name in names))
    assert (status, err.count("\n")) == (2, 3)
    other = f"{tmp_path / 'other'}: its config.json has parameterization 'spectral_norm'"
    assert all(named in err for named in ("absent", "DRAW", other)), err
    assert cells(text, "weight norm")[0] == "10.00"


def test_how_soon_each_is_where_the_last_one_ends(run, tmp_path):
    """The table shows when each arm reached the final value of the worst arm."""
    for seed, shift in enumerate((-1, 0, 1)):
        normal = np.array([-200, -150, -120, -110]) + shift
        make_draw_run(tmp_path / "runs" / f"n{seed}", "normal", normal, seed=seed)
        make_draw_run(tmp_path / "runs" / f"w{seed}", "weight_norm", [-150, -100, -95], seed=seed)
    text = run(tmp_path / "runs")[2]
    assert "epochs to -110.00" in text
    assert cells(text, "normal")[:2] == [f"-110.00 ± {1 / np.sqrt(3):.2f}", "4.0"]
    # From -150 to -100 in one epoch: -110 after 0.8 of it.
    assert cells(text, "weight norm")[:2] == ["-95.00 ± 0.00", "1.8"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the files that `python -m models.figures` reads and writes."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs" / "figures", tmp_path / "docs" / "figures")
    shutil.copy(ROOT / "RESULTS.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_results_are_what_the_runs_in_the_repository_say(checkout):
    for path in checkout.glob("docs/figures/*.png"):
        path.unlink()
    text = (checkout / "RESULTS.md").read_text()
    assert call() == 0
    assert (checkout / "RESULTS.md").read_text() == text
    for folder in (ROOT / "results").iterdir():
        assert f"<!-- table: {folder.name} -->" in text
        assert (checkout / f"docs/figures/{folder.name}-curves.png").read_bytes().startswith(PNG)
        assert not re.search(
            r"(?<![\w.])/\w+/", "".join(path.read_text() for path in folder.rglob("config.json"))
        )


def test_what_a_document_lacks_or_has_no_runs_for(checkout, capsys):
    """RESULTS.md gets markers for new tables, and an error for a table without runs."""
    for folder in (checkout / "results").iterdir():
        shutil.rmtree(folder)  # Drawing them takes most of the time.
    document = checkout / "RESULTS.md"
    document.write_text("# A\n\n<!-- table: absent -->\nold\n<!-- end -->\n")
    make_run(checkout / "runs" / "a", rate=0.001, epochs=4)
    make_run(checkout / "runs" / "b", rate=0.003, epochs=4)
    assert call("runs", "--keep", "new") == 0
    assert call() == 2
    assert "no runs in results for its table absent" in capsys.readouterr().err
    text = document.read_text()
    assert "old" not in text
    for name in ("new", "new-rates"):
        assert text.count(f"<!-- table: {name} -->") == 1
    assert "](docs/figures/new-rates.png)" in text
    document.write_text(text.replace("absent", "new", 1))
    assert call() == 0


def test_runs_are_kept_by_arm_rate_and_seed_with_relative_paths(checkout, capsys):
    make_run(checkout / "runs" / "a", rate=0.001, out=str(checkout / "runs" / "a"))
    make_run(checkout / "runs" / "b", rate=0.003, diverged="loss is nan", done=2)
    make_run(checkout / "runs" / "c", rate=0.01, done=3)
    make_run(checkout / "runs" / "d", rate=0.1)
    content = json.loads((checkout / "runs" / "d" / "config.json").read_text())
    content["sessions"][0]["git"]["changed"] = True
    (checkout / "runs" / "d" / "config.json").write_text(json.dumps(content))
    for name in "abd":
        table = metrics.Metrics(checkout / "runs" / name, 4)
        table.write(1, {"epoch": 200 if name != "b" else 2})
    assert call("runs", "--keep", "new") == 2
    err = capsys.readouterr().err
    assert "runs/c has not finished" in err
    assert "runs/d ran with uncommitted changes" in err
    names = ["weight_norm-0.001-0", "weight_norm-0.003-0"]
    assert sorted(path.name for path in (checkout / "results" / "new").iterdir()) == names
    kept = json.loads((checkout / "results" / "new" / names[0] / "config.json").read_text())
    assert kept["config"]["out"] == "runs/a"
    assert kept["sessions"][0]["command"] == "-m x --out runs/a"
    assert call("runs", "--keep", "new") == 2  # The same run again.
    assert "a different run" not in capsys.readouterr().err
    make_run(checkout / "other" / "a", rate=0.001, out="runs/other")
    metrics.Metrics(checkout / "other" / "a", 4).write(1, {"epoch": 200})
    assert call("other", "--keep", "new") == 2
    assert "holds a different run" in capsys.readouterr().err
