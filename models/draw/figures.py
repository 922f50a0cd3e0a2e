"""Figure 4 (the bound on the test set) of section 5.3."""

from models.common.comparison import Column, Comparison, Experiment
from models.common.figures import FinishedRun, Output

BOUND = Column("test_bound", "bound on the test set, nats")
EXPERIMENT = Experiment("DRAW on MNIST", BOUND, (BOUND,), limits=((0, 100), (-120, -80)))


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Compares the parameterizations."""
    Comparison(EXPERIMENT, runs, output, "draw").draw()
