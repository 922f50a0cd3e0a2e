"""The command line: `python -m models.cifar`."""

from models.cifar.config import Config, Evaluate
from models.common import command_line

FUNCTIONS: dict[type, str] = {
    Config: "models.cifar.training.train",
    Evaluate: "models.cifar.training.evaluate",
}

if __name__ == "__main__":
    command_line.main(FUNCTIONS)
