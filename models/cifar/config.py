"""The hyper-parameters of section 5.1, and the paper's results."""

import dataclasses
from typing import Any, ClassVar, Literal

from models.common.errors import UserError
from models.common.options import Count, Fraction, Preset, SweepConfig, option
from models.common.run_folder import RunPath

PAPER = {  # Test error in percent, figure 2.
    "mean_only_bn": 8.52,
    "weight_norm": 8.46,
    "normal": 8.43,
    "batch_norm": 8.05,
    "weight_norm_mean_only_bn": 7.31,
}


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """The hyper-parameters of section 5.1."""

    # The run folder.
    out: str = option("runs/cifar-{preset}-{parameterization}-{seed}", resume="free")
    # Weight parameterization of every layer, including the output layer.
    parameterization: Literal[
        "normal", "batch_norm", "weight_norm", "weight_norm_mean_only_bn", "mean_only_bn"
    ] = "weight_norm"
    # Synthetic data needs no files.
    dataset: Literal["cifar10", "synthetic_cifar10"] = option("cifar10", resume="never")
    whiten: bool = True  # Apply ZCA whitening.
    zca_epsilon: float = 1e-5  # Added to the eigenvalues in ZCA whitening.
    width: Count = option(96, memory=True)  # Channels of convolutions 1 to 3; twice that later.
    noise: float = 0.15  # Standard deviation of the Gaussian noise added to whitened images.
    dropout: Fraction = 0.5  # Rate of both dropout layers.
    leak: float = 0.1  # Slope of the leaky ReLU below zero.
    init_examples: Count = 500  # Images used for data-dependent initialization.
    # Use the normal parameterization of the paper's code: w = g v with a constant g.
    frozen_g: bool = False
    bn_momentum: Fraction = 0.9  # Decay of the running moments in (mean-only) batch norm.
    bn_epsilon: float = 1e-6  # Added to the variance in batch norm.
    synchronized: bool = True  # Compute batch moments over all replicas, not per replica.
    epochs: Count = 200  # Passes over the training images.
    # Images per step, over all replicas.
    batch_size: Count = option(100, memory=True, resume="never")
    # Adam's learning rate in the first half of the epochs (none: 0.0003 for normal, else 0.003).
    learning_rate: float | None = option(None, named=True)
    # Learning rates tried by --sweep.
    learning_rates: tuple[float, ...] = option((0.0003, 0.001, 0.003, 0.01), resume="free")
    beta_1: Fraction = 0.9  # Adam's momentum in the first half of the epochs.
    beta_1_late: Fraction = 0.5  # Adam's momentum in the second half.
    beta_2: Fraction = 0.999  # Decay of Adam's average of squared gradients.
    epsilon: float = 1e-8  # Adam's epsilon.
    # Add Adam's epsilon inside the square root, as the paper's released code does.
    epsilon_inside_root: bool = False

    ARMS: ClassVar[dict[str, dict[str, Any]]] = {
        "normal": {"parameterization": "normal", "frozen_g": False},
        "normal_frozen_g": {"parameterization": "normal", "frozen_g": True},
        "weight_norm": {"parameterization": "weight_norm", "frozen_g": False},
        "batch_norm": {"parameterization": "batch_norm", "frozen_g": False},
        "mean_only_bn": {"parameterization": "mean_only_bn", "frozen_g": False},
        "weight_norm_mean_only_bn": {
            "parameterization": "weight_norm_mean_only_bn", "frozen_g": False,
        },
    }  # fmt: skip
    MEASURE: ClassVar[str] = "test_error"
    LOWER_IS_BETTER: ClassVar[bool] = True

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset("section 5.1 as published"),
        "cpu": Preset(
            "a quarter of the width, 8 epochs; not comparable with the paper's numbers",
            {"width": 24, "epochs": 8},
        ),
        "smoke": Preset(
            "a quick check that it runs, in under a minute; its numbers mean nothing",
            {
                "dataset": "synthetic_cifar10",
                "whiten": False,
                "width": 4,
                "epochs": 2,
                "init_examples": 100,
            },
        ),
    }

    def check(self) -> None:
        """Raises UserError if options conflict."""
        super().check()
        if self.jit_compile and self.deterministic:
            raise UserError(
                "--jit-compile does not work with --deterministic: XLA has no deterministic "
                "gradient for max pooling; omit one of the two"
            )

    @property
    def rate(self) -> float:
        """The learning rate of the first half of the epochs."""
        if self.learning_rate is None:
            return 0.0003 if self.parameterization == "normal" else 0.003
        return self.learning_rate


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints the test error of a checkpoint."""

    checkpoint: RunPath  # A run folder, or a checkpoint inside one.
    data_dir: str = ""  # Folder of the data sets (default: as in the run).
