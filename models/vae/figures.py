"""Figure 3: the bound on the test images of MNIST (top) and CIFAR-10 (bottom)."""

from models.common.comparison import Column, Comparison, Experiment
from models.common.errors import UserError
from models.common.figures import FinishedRun, Output, group, refuse_mixed

BOUND = Column("test_bound", "bound, nats")
LIKELIHOOD = Column("test_log_likelihood", "log-likelihood, nats")
AXIS = Column("test_paper_axis", "bound in figure 3, nats", ".0f")
BITS = Column("test_bits_per_dim", "bits/dim", ".3f")
EXPERIMENTS = {
    "mnist": Experiment(
        "Convolutional VAE on MNIST", BOUND, (BOUND, LIKELIHOOD), limits=((50, 300), (-88, -84))
    ),
    "cifar10": Experiment(
        "Convolutional VAE on CIFAR-10", AXIS, (BOUND, AXIS, BITS, LIKELIHOOD),
        limits=((0, 450), (8000, 10_000)),
    ),
}  # fmt: skip


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Compares the parameterizations on each data set."""
    for dataset, here in group(runs, lambda run: run.config.dataset).items():
        with output.attempt():
            if dataset not in EXPERIMENTS:
                raise UserError(f"{here[0].path} holds a run of synthetic images; leave it out")
            if dataset == "mnist":
                refuse_mixed(here, "binarization", "MNIST runs")
            measured = [run for run in here if len(run.curve(LIKELIHOOD.name)[0])]
            refuse_mixed(measured, "eval_samples", f"{dataset} runs")
            Comparison(EXPERIMENTS[dataset], here, output, f"vae-{dataset}").draw()
