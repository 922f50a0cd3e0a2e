"""The command line: `python -m models.mechanism`."""

from models.common import command_line
from models.mechanism.config import Config

FUNCTIONS: dict[type, str] = {Config: "models.mechanism.training.train"}

if __name__ == "__main__":
    command_line.main(FUNCTIONS)
