"""The command line: `python -m models.draw`."""

from models.common import command_line
from models.draw.config import Config, Evaluate, Sample

FUNCTIONS: dict[type, str] = {
    Config: "models.draw.training.train",
    Evaluate: "models.draw.training.evaluate",
    Sample: "models.draw.pictures.sample",
}

if __name__ == "__main__":
    command_line.main(FUNCTIONS)
