"""The command line: `python -m models.vae`."""

from models.common import command_line
from models.vae.config import Config, Evaluate, Reconstruct, Sample

FUNCTIONS: dict[type, str] = {
    Config: "models.vae.training.train",
    Evaluate: "models.vae.evaluation.evaluate",
    Sample: "models.vae.pictures.sample",
    Reconstruct: "models.vae.pictures.reconstruct",
}

if __name__ == "__main__":
    command_line.main(FUNCTIONS)
