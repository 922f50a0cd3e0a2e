"""Hyper-parameters, presets and options of the commands; imports nothing that takes time."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path
from typing import ClassVar, Literal

from models.common import options
from models.common.errors import UserError, nearest

# Maximum test scores, figure 6; nature and random play: Mnih et al. 2015, extended data table 2.
PAPER = {
    "Breakout": {"normal": 410, "weight_norm": 403, "nature": 401, "random": 1.7},
    "Enduro": {"normal": 1_250, "weight_norm": 1_448, "nature": 302, "random": 0.0},
    "Seaquest": {"normal": 7_188, "weight_norm": 7_375, "nature": 5_286, "random": 68.4},
    "SpaceInvaders": {"normal": 1_779, "weight_norm": 2_179, "nature": 1_975, "random": 148.0},
}
LEARNING_RATES = {"weight_norm": 3e-4, "normal": 1e-4}  # The paper's choice from its grid.


@dataclasses.dataclass(frozen=True)
class Config(options.RunConfig):
    """The hyper-parameters; a step is one action of the agent, 4 frames of a game."""

    game: str = "SpaceInvaders"  # Any game of ale-py, in any spelling.
    parameterization: Literal["weight_norm", "normal"] = "weight_norm"  # Of every layer.
    steps: int = 50_000_000  # Length of training: 200 epochs.
    replay: int = 1_000_000  # Transitions in the replay memory.
    learning_starts: int = 50_000  # Random steps before the first update.
    update_every: int = 4  # Steps per update.
    batch_size: int = 64  # Transitions per update (Nature: 32).
    learning_rate: float | None = None  # None: 3e-4 for weight_norm, 1e-4 for normal.
    optimizer: Literal["adamax", "rmsprop"] = "adamax"  # rmsprop: centered, with Nature's decays.
    discount: float = 0.99  # Of the value one step later.
    target_every: int = 10_000  # Steps between copies of the online to the target network.
    epsilon: float = 0.1  # Final probability of a random action.
    epsilon_steps: int = 1_000_000  # Steps after the warm-up over which epsilon decays from 1.
    filters: tuple[int, ...] = (32, 64, 64)  # Of the three convolutions.
    hidden: int = 512  # Units of the hidden dense layer.
    data_dependent_init: bool = True  # Section 3; both parameterizations start as one function.
    init_output: float | None = 1.0  # Initial standard deviation of Q (none: not initialized).
    init_batch: int = 512  # States in the initialization batch.
    test_every: int = 250_000  # Steps per epoch.
    test_steps: int = 125_000  # Steps of the test after each epoch (--test paper).
    test: Literal["paper", "nature"] = "paper"  # nature: 30 games of at most 5 minutes.
    test_epsilon: float = 0.05  # Probability of a random action in tests.
    held_out: int = 3200  # States whose mean maximal Q is logged.
    num_envs: int = 1  # Games played side by side: 1 strict, 8 fast (deviation 1).
    # deep_q_rl: two more no-ops when a game or life begins, the first 4 actions of a life random,
    # updates counted from its beginning, no state that spans two lives.
    variant: Literal["nature", "deep_q_rl"] = "nature"
    replay_file: str = ""  # Keep the replay memory in this file instead of in RAM.
    save_replay: bool = True  # Save the replay memory with checkpoints, for exact resuming.
    log_every: int = 1_000  # Steps between rows of metrics.csv.

    MAY_CHANGE: ClassVar[frozenset[str]] = options.RunConfig.MAY_CHANGE | {"replay_file"}
    FIXED: ClassVar[frozenset[str]] = frozenset({
        "game", "num_envs", "parameterization", "filters", "hidden", "optimizer", "mixed_precision",
    })  # fmt: skip
    NAMED: ClassVar[frozenset[str]] = options.RunConfig.NAMED | {
        "test", "test_steps", "save_replay", "log_every",
    }  # fmt: skip
    FOLDER_FIELDS: ClassVar[tuple[str, ...]] = ("game",)
    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size", "--replay (or --replay-file FILE)")
    RANGES = options.ranges(
        "replay update_every batch_size target_every filters hidden init_batch test_every "
        "test_steps held_out num_envs log_every",
        "discount epsilon test_epsilon",
    ) | {"init_output": (1e-6, math.inf)}

    def __post_init__(self) -> None:
        object.__setattr__(self, "game", game_name(self.game))

    @property
    def title(self) -> str:
        """The game and the parameterization, for people."""
        return f"{self.game}, {self.parameterization.replace('_', ' ')}"


CPU = {
    "num_envs": 8,
    "steps": 500_000,
    "replay": 100_000,
    "learning_starts": 10_000,
    "batch_size": 32,
    "target_every": 2_000,
    "epsilon": 0.05,
    "epsilon_steps": 100_000,
    "filters": (16, 32, 32),
    "hidden": 256,
    "learning_rate": 3e-4,  # At 1e-4 the normal parameterization needs more steps than these.
    "init_output": 0.01,  # Each copy to the target network removes 1 % of the initial Q only.
    "test": "nature",  # The paper's test would drop long games at this number of steps.
    "test_every": 50_000,
    "held_out": 800,
}
PRESETS = {
    "paper": options.Preset("every number of the paper: 50M steps, 8 GiB, days on a GPU"),
    "nature": options.Preset(
        "Mnih et al. 2015: RMSProp, minibatches of 32, their initialization and test",
        {
            "optimizer": "rmsprop",
            "learning_rate": 2.5e-4,
            "batch_size": 32,
            "data_dependent_init": False,
            "parameterization": "normal",
            "test": "nature",
        },
    ),
    "cpu": options.Preset(
        "scaled: what a laptop learns in an hour: 500,000 steps, a quarter of the network", CPU
    ),
    "demo": options.Preset(
        "scaled: the first half of `cpu` on Breakout: minutes, a beginner's play",
        CPU | {"game": "Breakout", "steps": 250_000},
    ),
    "smoke": options.Preset(
        "only to see that it runs, in less than a minute; its scores mean nothing",
        {
            "steps": 600,
            "replay": 400,
            "learning_starts": 200,
            "batch_size": 8,
            "target_every": 100,
            "epsilon_steps": 200,
            "filters": (4, 4, 4),
            "hidden": 16,
            "init_batch": 64,
            "test_every": 200,
            "test_steps": 200,
            "held_out": 32,
            "log_every": 100,
            "num_envs": 4,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Plays full games with a trained network and prints their scores."""

    checkpoint: str  # A run folder (its best network is used) or one of its checkpoints.
    # nature: 30 games of at most 5 minutes; paper: --test-steps actions, games of any length.
    protocol: Literal["nature", "paper"] = "nature"
    test_steps: int | None = None  # Actions of --protocol paper (default: the run's).
    games: int | None = None  # Number of games, instead of the protocol's.
    epsilon: float = 0.05  # Probability of a random action.
    num_envs: int = 8  # Games played side by side.
    seed: int = 1  # Of games and actions.

    RANGES = options.ranges("test_steps games num_envs", "epsilon")


@dataclasses.dataclass(frozen=True)
class Watch:
    """Plays one game with a trained network and records a video of it."""

    checkpoint: str  # A run folder (its best network is used) or one of its checkpoints.
    out: str = ""  # The video, .gif or .mp4 (default: game.gif in the run folder).
    seconds: float = 60.0  # Maximum length of the video.
    epsilon: float = 0.05  # Probability of a random action.
    seed: int = 1  # Of game and actions.

    RANGES = options.ranges("seconds", "epsilon")


def check(config: Config) -> None:
    """Raises UserError for a configuration that cannot work."""
    rom_name(config.game)
    if config.strategy != "none":
        raise UserError(f"--strategy {config.strategy}: DQN trains on one device; leave it out")
    if config.steps <= config.learning_starts:
        raise UserError(
            f"--steps {config.steps} ends before learning begins, at --learning-starts "
            f"{config.learning_starts}"
        )
    if config.variant == "deep_q_rl" and config.num_envs != 1:
        raise UserError(f"--variant deep_q_rl needs --num-envs 1, got {config.num_envs}")
    if len(config.filters) != 3:
        raise UserError(f"--filters takes 3 numbers, got {len(config.filters)}")
    for name in ("steps", "learning_starts", "test_every"):
        if getattr(config, name) % config.num_envs:
            raise UserError(
                f"--{name.replace('_', '-')} must be a multiple of --num-envs "
                f"{config.num_envs}, got {getattr(config, name)}"
            )
    if not 8 * config.num_envs <= config.learning_starts <= config.replay:
        raise UserError(
            f"--learning-starts must lie between {8 * config.num_envs} and --replay "
            f"{config.replay}, got {config.learning_starts}"
        )


def game_name(game: str) -> str:
    """Returns a game's name spelled like SpaceInvaders; an unknown name is returned unchanged."""
    return _camel(_roms()[_plain(game)]) if _plain(game) in _roms() else game


def rom_name(game: str) -> str:
    """Returns the name of a game's ROM, spelled like space_invaders."""
    if not _roms():
        raise UserError("Atari games need ale-py: pip install 'tensorflow-weight-norm[models]'")
    if _plain(game) not in _roms():
        raise UserError(
            f"--game {game}: not one of ale-py's {len(_roms())} games"
            + (
                nearest(game, map(_camel, _roms().values()))
                or "; for example SpaceInvaders, Breakout, Enduro, Seaquest"
            )
        )
    return _roms()[_plain(game)]


def _roms() -> dict[str, str]:
    """Returns {plain name: ROM name}. Importing ale_py for that would take 0.3 s."""
    spec = importlib.util.find_spec("ale_py")
    if spec is None or spec.origin is None:
        return {}
    roms = sorted((Path(spec.origin).parent / "roms").glob("*.bin"))
    return {_plain(rom.stem): rom.stem for rom in roms}


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
