"""Hyper-parameters, presets and options of the commands; imports nothing that takes time."""

import dataclasses
from typing import ClassVar, Literal

from models.common import options
from models.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class MnistConfig:
    """The model of MNIST."""

    binarization: Literal["static", "dynamic"] = "static"  # MNIST: pixels drawn once, or each time.
    maps: tuple[int, ...] = (16, 32, 32)  # MNIST: feature maps at 28x28, 14x14 and 7x7.
    blocks: int = 2  # MNIST: ResNet blocks in each of the three sequences.
    hidden: int = 450  # MNIST: units of the fully connected layer.
    latents: int = 32  # MNIST: units of z.
    flow_steps: int = 2  # MNIST: steps of the flow (0: a diagonal posterior).
    made: tuple[int, ...] = (320, 320)  # MNIST: units of the hidden layers of each step.


@dataclasses.dataclass(frozen=True)
class Cifar10Config:
    """The model of CIFAR-10."""

    stochastic_layers: tuple[int, ...] = (4, 4)  # CIFAR-10: number of layers at 16x16, 8x8, ...
    features: int = 160  # CIFAR-10: feature maps of the deterministic path.
    latent_maps: int = 32  # CIFAR-10: feature maps of each z.
    flow_layers: int = 2  # CIFAR-10: hidden convolutions of each flow.
    open_ends: bool = False  # CIFAR-10: values 0 and 255 have the logistic's tails.


@dataclasses.dataclass(frozen=True)
class Config(Cifar10Config, MnistConfig, options.RunConfig):
    """The hyper-parameters of section 5.2."""

    # Which model and data; the synthetic data sets need no files.
    dataset: Literal["mnist", "cifar10", "synthetic_mnist", "synthetic_cifar10"] = "mnist"
    parameterization: Literal["normal", "weight_norm"] = "weight_norm"  # Of every layer.
    free_bits: float | None = None  # Nats per map without cost (none: MNIST 0, CIFAR-10 .25).
    data_dependent_init: bool = True  # Section 3; both parameterizations start as one function.
    init_examples: int = 200  # Images in the initialization batch.
    epochs: int | None = None  # Passes over the training images (none: MNIST 300, CIFAR-10 450).
    train_examples: int | None = None  # Number of training images to use (none: all).
    batch_size: int = 100  # Images per step, over all replicas.
    learning_rate: float = 0.002  # Adamax: step size.
    beta_1: float = 0.9  # Adamax: decay of the momentum.
    beta_2: float = 0.999  # Adamax: decay of the infinity norm.
    epsilon: float = 1e-8  # Adamax: epsilon.
    average_epochs: float = 10.0  # Epochs over which the parameters are averaged.
    eval_samples: int = 100  # Importance samples of the log-likelihood reported at the end.

    NAMED: ClassVar[frozenset[str]] = options.RunConfig.NAMED | {"binarization", "eval_samples"}
    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size", "--features", "--init-examples")
    FOLDER_FIELDS: ClassVar[tuple[str, ...]] = ("dataset",)
    RANGES = options.ranges(
        "maps blocks hidden latents made stochastic_layers features latent_maps flow_layers "
        "init_examples epochs train_examples batch_size eval_samples",
        "beta_1 beta_2",
    )

    @property
    def mnist(self) -> bool:
        """Whether the model is MNIST's, of binary images."""
        return "mnist" in self.dataset


PRESETS = {
    "paper": options.Preset("section 5.2 as far as it is known"),
    "cpu": options.Preset(
        "scaled: minutes on two cores; not comparable with the paper's numbers",
        {
            "maps": (8, 16, 16),
            "hidden": 200,
            "made": (160,),
            "stochastic_layers": (1, 2),
            "features": 20,
            "latent_maps": 8,
            "flow_layers": 1,
            "epochs": 5,
            "batch_size": 32,
            "eval_samples": 10,
        },
    ),
    "smoke": options.Preset(
        "only to see that it runs, in less than a minute; its numbers and pictures mean nothing",
        {
            "dataset": "synthetic_mnist",
            "maps": (2, 4, 4),
            "blocks": 1,
            "hidden": 16,
            "latents": 4,
            "made": (8,),
            "stochastic_layers": (1, 1),
            "features": 4,
            "latent_maps": 2,
            "flow_layers": 1,
            "epochs": 2,
            "init_examples": 100,
            "eval_samples": 3,
        },
    ),
}

# For MNIST and for CIFAR-10: the ends of figure 3's axes, and the free bits of the code.
EPOCHS = {True: 300, False: 450}
FREE_BITS = {True: 0.0, False: 0.25}


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints the bound and the log-likelihood of the test images, with averaged weights."""

    checkpoint: str  # A run folder or one of its checkpoints.
    eval_samples: int = 100  # Importance samples of the log-likelihood (1: the bound alone).
    data_dir: str = ""  # Folder of the data sets (default: the run's own).

    RANGES = options.ranges("eval_samples")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws images from a model."""

    checkpoint: str  # A run folder or one of its checkpoints.
    out: str = ""  # The PNG (default: samples/samples.png in the run folder).
    count: int = 100  # Number of images.
    seed: int = 0  # Of the draws.

    RANGES = options.ranges("count")


@dataclasses.dataclass(frozen=True)
class Reconstruct:
    """Shows test images, each with the model's reconstruction below it."""

    checkpoint: str  # A run folder or one of its checkpoints.
    out: str = ""  # The PNG (default: samples/reconstructions.png in the run folder).
    count: int = 50  # Number of images.
    seed: int = 0  # Of the draws.
    data_dir: str = ""  # Folder of the data sets (default: the run's own).

    RANGES = options.ranges("count")


def check(config: Config) -> None:
    """Raises UserError for a configuration that cannot work."""
    if len(config.maps) != 3:
        raise UserError(f"--maps takes 3 numbers, got {len(config.maps)}")
    if len(config.stochastic_layers) > 5:
        raise UserError(
            "--stochastic-layers takes at most 5 numbers, for 16x16 to 1x1 pixels, got "
            f"{len(config.stochastic_layers)}"
        )
