"""The hyper-parameters of the experiment on section 2.1."""

import dataclasses
from typing import Any, ClassVar, Literal

from tyro.conf import Fixed, Suppress

from models.common.errors import UserError
from models.common.options import Count, Preset, SweepConfig, option


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """The hyper-parameters of the experiment on section 2.1."""

    # The run folder.
    out: str = option("runs/mechanism-{preset}-{parameterization}-{seed}", resume="free")
    parameterization: Literal["normal", "weight_norm"] = "weight_norm"  # Used in every layer.
    # Not options of this program, which computes in float32 on one device.
    mixed_precision: Suppress[Fixed[Literal["none", "bfloat16"]]] = "none"
    jit_compile: Suppress[Fixed[bool]] = False
    strategy: Suppress[Fixed[Literal["none", "mirrored", "multi_worker"]]] = "none"
    # Start with ||v|| = g, so that the first step changes w as in the normal parameterization.
    matched_start: bool = False
    # Synthetic data needs no files.
    dataset: Literal["mnist", "synthetic_mnist"] = option("mnist", resume="never")
    units: Count = 128  # Units of each of the two hidden layers.
    epochs: Count = 5  # Passes over the training images.
    batch_size: Count = option(100, memory=True, resume="never")  # Images per step.
    learning_rate: float = 0.1  # Learning rate of SGD, which has no momentum.
    # Learning rates tried by --sweep.
    learning_rates: tuple[float, ...] = option((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), resume="free")
    examples: Count = option(5000, memory=True)  # Images used to estimate C.
    samples: Count = 16  # Units per hidden layer for which C is computed.

    ARMS: ClassVar[dict[str, dict[str, Any]]] = {
        "normal": {"parameterization": "normal", "matched_start": False},
        "weight_norm": {"parameterization": "weight_norm", "matched_start": False},
        "weight_norm_matched": {"parameterization": "weight_norm", "matched_start": True},
    }
    MEASURE: ClassVar[str] = "test_error"
    LOWER_IS_BETTER: ClassVar[bool] = True
    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset("five epochs, about a minute"),
        "smoke": Preset(
            "a quick check that it runs; its numbers mean nothing",
            {"dataset": "synthetic_mnist", "units": 8, "epochs": 2, "examples": 100, "samples": 2},
        ),
    }

    def check(self) -> None:
        """Raises UserError if options conflict."""
        super().check()
        if self.matched_start and self.parameterization != "weight_norm":
            raise UserError("--matched-start needs --parameterization weight_norm: omit it")
