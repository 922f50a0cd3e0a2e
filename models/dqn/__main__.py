"""The command line of section 5.4."""

from models.common import command_line
from models.dqn import play, training
from models.dqn.config import PRESETS, Config, Evaluate, Watch

if __name__ == "__main__":
    command_line.main(Config, training.train, PRESETS, {Evaluate: play.evaluate, Watch: play.watch})
