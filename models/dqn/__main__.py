"""The command line: `python -m models.dqn`."""

from models.common import command_line
from models.dqn.config import Config, Evaluate, Watch

FUNCTIONS: dict[type, str] = {
    Config: "models.dqn.training.train",
    Evaluate: "models.dqn.play.evaluate",
    Watch: "models.dqn.play.watch",
}

if __name__ == "__main__":
    command_line.main(FUNCTIONS)
