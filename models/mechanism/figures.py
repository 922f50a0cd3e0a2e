"""Growth of ||v||, the angle of an update, and the gradient's covariance, by learning rate."""

import math

from models.common.comparison import Arm, Column, Comparison, Experiment
from models.common.figures import FinishedRun, Output, with_error

TEST = Column("test_error", "test error, %", scale=100)
ANGLE = Column("angle", "angle of a step, degrees", ".3f")
GROWTH = Column("growth", "norm of v (normal: of w) / initial norm", ".3f")
FORMULA = Column("growth_by_formula", "by the formula", ".3f")
SHARES = (
    Column("cosine", "cosine of w and C's first eigenvector"),
    Column("cosine_random", "of a random vector"),
    Column("share", "first eigenvalue / trace, C", ".3f"),
    Column("share_projected", "of M C M", ".3f"),
)
EXPERIMENT = Experiment(
    "A small network on MNIST, SGD",
    TEST,
    (TEST, ANGLE, GROWTH, *SHARES),
    labels={"weight_norm_matched": "weight norm, ‖v‖ = g at the start"},
)


def draw(runs: list[FinishedRun], output: Output) -> None:
    """Compares the parameterizations, and draws the effect of the updates by learning rate."""
    comparison = Comparison(EXPERIMENT, runs, output, "mechanism")
    comparison.draw()
    columns, rows = (GROWTH, FORMULA, ANGLE, *SHARES), []
    for arm in comparison.arms:
        for rate in arm.rates:
            run = arm.first(rate)
            if run and lives(arm, run):
                values = [with_error(c.of(run, arm.ends(run)), math.nan, c.form) for c in columns]
                rows.append([comparison.label(arm), f"{rate:g}", *values])
    heads = ["last epoch, one seed", "rate", *(column.label for column in columns)]
    output.table(f"{comparison.name}-updates", comparison.title, heads, rows)
    for column in (ANGLE, GROWTH):
        name = f"{comparison.name}-{column.name}"
        title = f"{comparison.title}: last epoch"
        with output.figure(name, title, "learning rate", column.label) as axes:
            axes.set(xscale="log", yscale="log" if column is ANGLE else "linear")
            for arm in comparison.arms:
                firsts = [run for r in arm.rates if (run := arm.first(r)) and lives(arm, run)]
                x = [run.config.rate for run in firsts]
                y = [column.of(run, arm.ends(run)) for run in firsts]
                axes.plot(x, y, marker="o", **comparison.style(arm))
                if column is GROWTH and arm.name == "weight_norm":
                    y = [FORMULA.of(run, arm.ends(run)) for run in firsts]
                    axes.plot(x, y, "k:", label="product of sqrt(1 + c²)")


def lives(arm: Arm, run: FinishedRun) -> bool:
    """Returns whether a run finished with updates that still turn w (not all units are dead)."""
    return arm.ends(run) > 0 and ANGLE.of(run, arm.ends(run)) > 1e-3
