"""Figure 3: the bound on the test images of MNIST (top) and CIFAR-10 (bottom)."""

from models.common import figures
from models.common.errors import UserError


def draw(runs: list[figures.FinishedRun], output: figures.Output) -> None:
    """Draws each half of figure 3 and prints it as a table."""
    runs = figures.finished(runs, "test_bound", "the auto-encoders'")
    by_dataset = {name: here for (name,), here in figures.group(runs, "dataset").items()}
    if not by_dataset.keys() & {"mnist", "cifar10"}:
        raise UserError("the auto-encoders' runs are of synthetic images: there is nothing to draw")
    for name, title, column, limits in (
        ("mnist", "MNIST", "test_bound", ((50, 300), (-88, -84))),
        ("cifar10", "CIFAR-10", "test_paper_axis", ((0, 450), (8000, 10_000))),
    ):
        if name in by_dataset:
            with output.attempt():
                draw_half(name, title, column, limits, by_dataset[name], output)


def draw_half(
    name, title, column, limits, runs: list[figures.FinishedRun], output: figures.Output
) -> None:
    """Draws one data set's half; `limits` are those of the paper's axes, ((x), (y))."""
    if len(figures.group(runs, "binarization")) > 1 and name == "mnist":
        raise UserError(
            "some MNIST runs have --binarization static and some dynamic: their bounds are not "
            "comparable; draw them apart"
        )
    measured = [run for run in runs if len(run.curve("epoch", "test_log_likelihood")[0])]
    samples = sorted({run.config["eval_samples"] for run in measured})
    if len(samples) > 1:
        raise UserError(
            f"some {title} runs have --eval-samples {samples[0]} and some {samples[1]}: their "
            "log-likelihoods are not comparable; draw them apart"
        )
    rows = []
    y = "bound on marginal likelihood, nats"
    with output.figure(
        f"figure-3-{name}", f"Convolutional VAE on {title}", runs, "training epochs", y
    ) as figure:
        for _, seeds in sorted(figures.group(runs, "parameterization", "preset").items()):
            figures.check_same_settings(seeds)
            figure.line(seeds, "epoch", column)
            rows.append([figures.row_label(seeds[0].config, output), *values(seeds, column)])
        if all(run.config["preset"] == "paper" for run in runs):
            figure.axes.set(xlim=limits[0], ylim=limits[1])
    likelihood = "log-likelihood, nats" + "".join(f" ({n} samples)" for n in samples)
    columns = ["", "bound, nats", likelihood, "seeds", "epochs"]
    if name == "cifar10":
        columns[2:2] = ["in figure 3", "bits/dim"]
    axis = f"the paper's axis: {limits[1][0]} to {limits[1][1]}, to epoch {limits[0][1]}"
    output.table(f"{title} (figure 3)", columns, rows, figures.notes_of(runs, axis))


def values(seeds: list[figures.FinishedRun], column: str) -> list[str]:
    """Returns a row's values at the last epoch that all seeds have reached."""
    epoch = min(run.curve("epoch", column)[0][-1] for run in seeds)

    def value(name: str, form: str = ".2f") -> str:
        found = []
        for run in seeds:
            epochs, values = run.curve("epoch", name)
            found += list(values[epochs == epoch])
        return (
            ""
            if len(found) < len(seeds)
            else figures.with_error(*figures.mean_and_error(found), form)
        )

    shown = [value("test_bound")]
    if column == "test_paper_axis":
        shown += [value(column, ".0f"), value("test_bits_per_dim", ".3f")]
    return [*shown, value("test_log_likelihood"), f"{len(seeds)}", f"{epoch:.0f}"]
