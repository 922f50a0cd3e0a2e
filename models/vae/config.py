"""The hyper-parameters of section 5.2, and the options of the commands."""

import dataclasses
from typing import Any, ClassVar, Literal

from models.common.errors import UserError
from models.common.options import Count, Fraction, Preset, Seed, SweepConfig, option
from models.common.run_folder import RunPath

CPU = {
    "maps": (8, 16, 16), "hidden": 200, "made": (160,),
    "stochastic_layers": (1, 2), "features": 20, "latent_maps": 8, "flow_layers": 1,
    "epochs": 5, "batch_size": 32, "eval_samples": 10,
}  # fmt: skip
SMOKE = {
    "dataset": "synthetic_mnist",
    "maps": (2, 4, 4), "blocks": 1, "hidden": 16, "latents": 4, "made": (8,),
    "stochastic_layers": (1, 1), "features": 4, "latent_maps": 2, "flow_layers": 1,
    "epochs": 2, "init_examples": 100, "eval_samples": 3,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MnistConfig:
    """Options of the MNIST model."""

    # MNIST: draw binary pixels once (static) or at every use of an image (dynamic).
    binarization: Literal["static", "dynamic"] = option("static", named=True)
    maps: tuple[Count, ...] = (16, 32, 32)  # MNIST: feature maps at 28x28, 14x14 and 7x7.
    blocks: Count = 2  # MNIST: ResNet blocks at each of the three resolutions.
    hidden: Count = 450  # MNIST: units of the dense layer in encoder and decoder.
    latents: Count = 32  # MNIST: dimension of z.
    flow_steps: int = 2  # MNIST: flow steps (0: a diagonal Gaussian posterior).
    made: tuple[Count, ...] = (320, 320)  # MNIST: units of each flow step's hidden layers.


@dataclasses.dataclass(frozen=True)
class Cifar10Config:
    """Options of the CIFAR-10 model."""

    # CIFAR-10: number of stochastic layers at 16x16, 8x8, ...
    stochastic_layers: tuple[Count, ...] = (4, 4)
    features: Count = option(160, memory=True)  # CIFAR-10: feature maps of the deterministic path.
    latent_maps: Count = 32  # CIFAR-10: feature maps of each z.
    flow_layers: Count = 2  # CIFAR-10: hidden convolutions of each flow.
    open_ends: bool = False  # CIFAR-10: give values 0 and 255 the logistic's tails.


@dataclasses.dataclass(frozen=True)
class Config(Cifar10Config, MnistConfig, SweepConfig):
    """The hyper-parameters of section 5.2."""

    # The run folder.
    out: str = option("runs/vae-{dataset}-{preset}-{parameterization}-{seed}", resume="free")
    # Data set, which determines the model. Synthetic data needs no files.
    dataset: Literal["mnist", "cifar10", "synthetic_mnist", "synthetic_cifar10"] = option(
        "mnist", resume="never"
    )
    parameterization: Literal["normal", "weight_norm"] = "weight_norm"  # Used in every layer.
    # With --parameterization normal: w = g v with a constant g, as in the paper's code.
    frozen_g: bool = False
    free_bits: float | None = None  # Free nats per latent map (none: MNIST 0, CIFAR-10 0.25).
    data_dependent_init: bool = True  # Use the data-dependent initialization of section 3.
    init_examples: Count = option(200, memory=True)  # Images in the initialization batch.
    epochs: Count | None = None  # Passes over the training images (none: MNIST 300, CIFAR-10 450).
    # Number of training images to use (none: all).
    train_examples: Count | None = option(None, resume="never")
    # Images per step, over all replicas.
    batch_size: Count = option(100, memory=True, resume="never")
    learning_rate: float = 0.002  # Adamax: learning rate.
    # Learning rates tried by --sweep.
    learning_rates: tuple[float, ...] = option((0.001, 0.002, 0.004, 0.008), resume="free")
    beta_1: Fraction = 0.9  # Adamax: decay of the momentum.
    beta_2: Fraction = 0.999  # Adamax: decay of the infinity norm.
    epsilon: float = 1e-8  # Adamax: epsilon.
    average_epochs: float = 10.0  # Time constant of the parameter average, in epochs.
    eval_samples: Count = option(100, named=True)  # Importance samples of the final log-likelihood.

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset("section 5.2, as far as the paper specifies it"),
        "cpu": Preset("scaled: minutes on two cores; not comparable with the paper's numbers", CPU),
        "smoke": Preset(
            "a quick check that it runs, in under a minute; its numbers and images mean nothing",
            SMOKE,
        ),
    }

    ARMS: ClassVar[dict[str, dict[str, Any]]] = {
        "normal": {"parameterization": "normal", "frozen_g": False},
        "normal_frozen_g": {"parameterization": "normal", "frozen_g": True},
        "weight_norm": {"parameterization": "weight_norm", "frozen_g": False},
    }
    MEASURE: ClassVar[str] = "test_bound"

    @property
    def mnist(self) -> bool:
        """Whether this is the MNIST model, of binary images."""
        return "mnist" in self.dataset

    @property
    def last_epoch(self) -> int:
        """The number of epochs; by default, where figure 3's axis ends."""
        return self.epochs or (300 if self.mnist else 450)

    @property
    def least_kl(self) -> float:
        """The free bits per map in nats; by default the code's value."""
        if self.free_bits is None:
            return 0.0 if self.mnist else 0.25
        return self.free_bits

    def check(self) -> None:
        """Raises UserError if options conflict."""
        super().check()
        if len(self.maps) != 3:
            raise UserError(f"--maps takes 3 numbers, got {len(self.maps)}")
        if not self.made:
            raise UserError("--made takes at least one number")
        if not 1 <= len(self.stochastic_layers) <= 5:
            raise UserError(
                "--stochastic-layers takes 1 to 5 numbers, for 16x16 to 1x1 pixels; got "
                f"{len(self.stochastic_layers)}"
            )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints the bound and the log-likelihood of the test images, using averaged weights."""

    checkpoint: RunPath  # A run folder, or a checkpoint inside one.
    eval_samples: Count = 100  # Importance samples for the log-likelihood (1: only the bound).
    data_dir: str = ""  # Folder of the data sets (default: as in the run).


@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples images from a trained model."""

    checkpoint: RunPath  # A run folder, or a checkpoint inside one.
    out: str = ""  # The PNG (default: samples/samples.png in the run folder).
    count: Count = 100  # Number of images.
    seed: Seed = 0  # Seeds the samples.


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Draws test images, each with its reconstruction below it."""

    checkpoint: RunPath  # A run folder, or a checkpoint inside one.
    out: str = ""  # The PNG (default: samples/reconstructions.png in the run folder).
    count: Count = 50  # Number of images.
    seed: Seed = 0  # Seeds the samples.
    data_dir: str = ""  # Folder of the data sets (default: as in the run).
