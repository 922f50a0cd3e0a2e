"""The command line of section 5.2."""

from models.common import command_line
from models.vae import evaluation, pictures, training
from models.vae.config import PRESETS, Config, Evaluate, Reconstruct, Sample

if __name__ == "__main__":
    command_line.main(
        Config,
        training.train,
        PRESETS,
        {
            Evaluate: evaluation.evaluate,
            Sample: pictures.sample,
            Reconstruct: pictures.reconstruct,
        },
    )
