"""Figure 1 (training error) and figure 2 (test error) of section 5.1."""

from models.cifar.config import PAPER
from models.common.comparison import Column, Comparison, Experiment
from models.common.figures import FinishedRun, Output

TRAIN = Column("train_error", "training error, %", scale=100)
TEST = Column("test_error", "test error, %", scale=100)
EXPERIMENT = Experiment(
    "CIFAR-10",
    TRAIN,
    (TEST, TRAIN),
    # The paper's normal arm is that of its code, where g is constant.
    {**PAPER, "normal_frozen_g": PAPER["normal"]},
    {
        "normal_frozen_g": "normal, constant g",
        "mean_only_bn": "mean-only batch norm",
        "weight_norm_mean_only_bn": "weight norm + mean-only batch norm",
    },
    limits=((0, 200), (0, 10)),
)


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Compares the parameterizations."""
    Comparison(EXPERIMENT, runs, output, "cifar").draw()
