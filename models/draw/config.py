"""The hyper-parameters of section 5.3."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from models.common.options import Count, Fraction, Preset, Range, SweepConfig, option
from models.common.run_folder import RunPath

FilterCount = Annotated[int, Range(2)]


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """The hyper-parameters of section 5.3."""

    out: str = option(
        "runs/draw-{preset}-{parameterization}-{seed}", resume="free"
    )  # The run folder.
    parameterization: Literal["normal", "weight_norm"] = "weight_norm"  # Used for every matrix.
    # Synthetic data needs no files.
    dataset: Literal["mnist", "synthetic_mnist"] = option("mnist", resume="never")
    # Images to train on, the first of the file's 60,000.
    train_images: Count = option(50_000, resume="never")
    binarization_seed: int = 0  # Seed for binarizing the gray values, done once.
    attention: bool = True  # Read and write through attention windows, not whole images.
    read_size: FilterCount = 2  # Filters per axis of the read window.
    write_size: FilterCount = 5  # Filters per axis of the write window.
    glimpses: Count = option(64, memory=True)  # Number of glimpses (time steps), T.
    encoder_units: Count = 256  # Units of the encoder's LSTM.
    decoder_units: Count = 256  # Units of the decoder's LSTM.
    latent_units: Count = 100  # Dimension of z at each glimpse.
    initial_stddev: float = 0.01  # Standard deviation of all initial weights.
    epochs: Count = 100  # Passes over the training images.
    # Images per step, over all replicas.
    batch_size: Count = option(100, memory=True, resume="never")
    learning_rate: float = 3e-4  # Adam's learning rate.
    learning_rates: tuple[float, ...] = option((3e-4,), resume="free")  # Rates tried by --sweep.
    beta_1: Fraction = 0.9  # Adam's momentum.
    beta_2: Fraction = 0.999  # Decay of Adam's average of squared gradients.
    epsilon: float = 1e-8  # Adam's epsilon.
    clip_norm: float = 10.0  # Maximum global norm of the gradient; larger ones are clipped.

    ARMS: ClassVar[dict[str, dict[str, Any]]] = {
        "normal": {"parameterization": "normal"},
        "weight_norm": {"parameterization": "weight_norm"},
    }
    MEASURE: ClassVar[str] = "test_bound"

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset("section 5.3 with attention windows of 2x2 and 5x5, 64 glimpses"),
        "no-attention": Preset(
            "whole images, 10 glimpses: the default of the code that the paper starts from",
            {"attention": False, "glimpses": 10, "learning_rate": 1e-3, "learning_rates": (1e-3,)},
        ),
        "cpu": Preset(
            "16 glimpses, 5 epochs, rate .001, wider init; not comparable with the paper's numbers",
            # With N(0, .01), the bound stays at the mean image's -208 for one to five epochs.
            {
                "glimpses": 16,
                "epochs": 5,
                "learning_rate": 1e-3,
                "learning_rates": (1e-3,),
                "initial_stddev": 0.05,
            },
        ),
        "smoke": Preset(
            "a quick check that it runs, in under a minute; its numbers and pictures mean nothing",
            {
                "dataset": "synthetic_mnist",
                "train_images": 1000,
                "glimpses": 4,
                "encoder_units": 32,
                "decoder_units": 32,
                "latent_units": 10,
                "learning_rate": 1e-2,
                "learning_rates": (1e-2,),
                "epochs": 2,
            },
        ),
    }


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Prints a checkpoint's bound on the test set."""

    checkpoint: RunPath  # A run folder, or a checkpoint inside one.
    draws: Count = 1  # Noise samples per image.
    data_dir: str = ""  # Folder of the data sets (default: as in the run).


@dataclasses.dataclass(frozen=True)
class Sample:
    """Writes a grid of samples, and a GIF of how they are drawn, with the attention window."""

    checkpoint: RunPath  # A run folder, or a checkpoint inside one.
    out: str = ""  # The folder to write to (default: samples in the run folder).
    seed: int = 0  # Seeds the samples.
    scale: Count = 4  # Screen pixels per image pixel in the GIF.
