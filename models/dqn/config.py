"""The hyper-parameters of section 5.4, the paper's results, and the options of the commands."""

import dataclasses
import functools
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional

from models.common.errors import UserError, first_line, nearest
from models.common.options import Count, Fraction, Preset, Range, Seed, SweepConfig, flag_of, option

# Maximum test scores, figure 6; nature and random play: Mnih et al. 2015, extended data table 2.
PAPER = {
    "Breakout": {"normal": 410, "weight_norm": 403, "nature": 401, "random": 1.7},
    "Enduro": {"normal": 1_250, "weight_norm": 1_448, "nature": 302, "random": 0.0},
    "Seaquest": {"normal": 7_188, "weight_norm": 7_375, "nature": 5_286, "random": 68.4},
    "SpaceInvaders": {"normal": 1_779, "weight_norm": 2_179, "nature": 1_975, "random": 148.0},
}
CPU = {
    "num_envs": 8, "batch_size": 32, "filters": (16, 32, 32), "hidden": 256,
    "steps": 500_000, "replay": 100_000, "learning_starts": 10_000, "target_every": 2_000,
    "epsilon": 0.05, "epsilon_steps": 100_000, "test_every": 50_000, "held_out": 800,
    "learning_rate": 3e-4,  # At 1e-4 the normal parameterization needs more steps than these.
    "init_output": 0.01,  # Each copy to the target network removes 1 % of the initial Q only.
    "protocol": "nature",  # The paper's would leave out long games in so few steps.
}  # fmt: skip
SMOKE = {
    "num_envs": 4, "batch_size": 8, "filters": (4, 4, 4), "hidden": 16, "init_batch": 64,
    "steps": 600, "replay": 400, "learning_starts": 200, "target_every": 100,
    "epsilon_steps": 200, "test_every": 200, "test_steps": 200, "held_out": 32, "log_every": 100,
}  # fmt: skip
NATURE = {
    "parameterization": "normal", "data_dependent_init": False, "protocol": "nature",
    "optimizer": "rmsprop", "learning_rate": 2.5e-4, "batch_size": 32, "scaling": "area",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """The hyper-parameters of section 5.4; a step is an action of the agent, 4 frames of a game."""

    # The run folder.
    out: str = option("runs/dqn-{game}-{preset}-{parameterization}-{seed}", resume="free")
    # An Atari game, as SpaceInvaders or ALE/SpaceInvaders-v5, or an environment of gymnasium with
    # discrete actions and images, as MODULE:NAME-v0.
    game: str = option("SpaceInvaders", resume="never")
    # How every layer's weights are parameterized.
    parameterization: Literal["weight_norm", "normal"] = option("weight_norm", resume="never")
    # Compute type; weights stay float32.
    mixed_precision: Literal["none", "bfloat16"] = option("none", resume="never")
    steps: Count = 50_000_000  # Actions of the agent, each of 4 frames; the paper: 200 epochs.
    replay: Count = option(1_000_000, memory=True)  # Transitions in the replay memory.
    learning_starts: Count = 50_000  # Random steps before the first update.
    update_every: Count = 4  # Steps per update.
    batch_size: Count = option(64, memory=True)  # Transitions per update (Nature: 32).
    learning_rate: float | None = None  # None: 3e-4 for weight_norm, 1e-4 for normal.
    # The learning rates of the sweep.
    learning_rates: tuple[float, ...] = option((1e-4, 3e-4, 1e-3), resume="free")
    # rmsprop: centered, with Nature's decays.
    optimizer: Literal["adamax", "rmsprop"] = option("adamax", resume="never")
    discount: Fraction = 0.99  # Discount factor for the value one step later.
    target_every: Count = 10_000  # Steps between copies of the online to the target network.
    epsilon: Fraction = 0.1  # Final probability of a random action.
    epsilon_steps: Count = 1_000_000  # Steps after the warm-up over which epsilon decays from 1.
    filters: tuple[Count, ...] = option((32, 64, 64), resume="never")  # Convolution filters.
    hidden: Count = option(512, resume="never")  # Units of the hidden dense layer.
    data_dependent_init: bool = True  # Section 3; both parameterizations start as one function.
    # The paper's code's normal parameterization: w = g v, and g, which this sets, stays constant.
    frozen_g: bool = option(False, resume="never")
    # Initial standard deviation of Q (none: the output layer is not initialized from data).
    init_output: Annotated[float, Range(1e-6)] | None = 1.0
    init_batch: Count = 512  # States in the initialization batch.
    test_every: Count = 250_000  # Steps per epoch.
    # Evaluation: test_steps actions, or 30 games of at most 5 minutes.
    protocol: Literal["paper", "nature"] = option("paper", named=True, was="test")
    test_steps: Count = option(125_000, named=True)  # Actions of --protocol paper.
    test_epsilon: Fraction = 0.05  # Probability of a random action in evaluation.
    held_out: Count = 3200  # States whose mean maximal Q is logged.
    # How frames are scaled to 84 x 84: as in deep_q_rl, or averaging areas, as in Nature's code.
    scaling: Literal["bilinear", "area"] = option("bilinear", resume="never")
    # Games side by side. 1: Nature's order. 8 or more: faster, in a process for each core, but the
    # weights behind an action may be two updates old.
    num_envs: Count = option(1, resume="never")
    # deep_q_rl: two more no-ops when a game or life begins, the first 4 actions of a life random,
    # updates counted from its beginning, no state that spans two lives.
    variant: Literal["nature", "deep_q_rl"] = "nature"
    replay_file: str = option("", resume="free")  # Keep the replay memory here instead of in RAM.
    save_replay: bool = option(True, named=True)  # Save it with checkpoints, for exact resuming.
    log_every: Count = option(1_000, named=True)  # Steps between rows of metrics.csv.

    # Initialization and parameterization; "one" and "hundredth" are the initial Q's deviation.
    ARMS: ClassVar[dict[str, dict[str, Any]]] = {
        f"{init}-{kind}": {
            "parameterization": kind, "frozen_g": False,
            **({"data_dependent_init": True, "init_output": output} if output else
               {"data_dependent_init": False}),
        }
        for init, output in (("nature", None), ("one", 1.0), ("hundredth", 0.01))
        for kind in ("normal", "weight_norm")
    }  # fmt: skip
    MEASURE: ClassVar[str] = "test_score"

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset("every number of the paper: 50M steps, 8 GiB, days on a GPU"),
        "nature": Preset(
            "Mnih et al. 2015: RMSProp, minibatches of 32, their initialization and protocol",
            NATURE,
        ),
        "cpu": Preset(
            "scaled: a quarter of the network, at most 500,000 steps, an hour on a laptop", CPU
        ),
        "demo": Preset(
            "scaled: the first half of `cpu` on Breakout: minutes, a beginner's play",
            CPU | {"game": "Breakout", "steps": 250_000},
        ),
        "smoke": Preset(
            "only to see that it runs, in less than a minute; its scores mean nothing", SMOKE
        ),
    }

    def __post_init__(self) -> None:
        if rom := rom_of(self.game):
            object.__setattr__(self, "game", _camel(rom))

    @property
    def last_epoch(self) -> float:
        """The number of epochs, perhaps a fraction."""
        return self.steps / self.test_every

    @property
    def title(self) -> str:
        """The game and the parameterization, for people."""
        return f"{self.game}, {self.parameterization.replace('_', ' ')}"

    @property
    def rate(self) -> float:
        """The learning rate; by default the paper's choice from its grid."""
        if self.learning_rate is None:
            return 3e-4 if self.parameterization == "weight_norm" else 1e-4
        return self.learning_rate

    def check(self) -> None:
        """Raises UserError for values that do not go together."""
        super().check()
        check_game(self.game)
        if self.strategy != "none":
            raise UserError(f"--strategy {self.strategy}: DQN trains on one device; leave it out")
        if self.steps <= self.learning_starts:
            raise UserError(
                f"--steps {self.steps} must be more than --learning-starts {self.learning_starts}"
            )
        if self.variant == "deep_q_rl" and self.num_envs != 1:
            raise UserError(f"--variant deep_q_rl needs --num-envs 1, got {self.num_envs}")
        if len(self.filters) != 3:
            raise UserError(f"--filters takes 3 numbers, got {len(self.filters)}")
        for name in ("steps", "learning_starts", "test_every"):
            if getattr(self, name) % self.num_envs:
                raise UserError(
                    f"{flag_of(name)} must be a multiple of --num-envs {self.num_envs}, got "
                    f"{getattr(self, name)}"
                )
        if not 8 * self.num_envs <= self.learning_starts <= self.replay:
            raise UserError(
                f"--learning-starts must lie between {8 * self.num_envs} and --replay "
                f"{self.replay}, got {self.learning_starts}"
            )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Plays full games with a trained network and prints their scores."""

    checkpoint: Positional[str]  # A run folder (its best network is used), or a checkpoint in one.
    # nature: 30 games of at most 5 minutes; paper: --test-steps actions, games of any length.
    protocol: Literal["nature", "paper"] = "nature"
    test_steps: Count | None = None  # Actions of --protocol paper (none: the run's).
    games: Count | None = None  # Number of games, instead of the protocol's.
    epsilon: Fraction = 0.05  # Probability of a random action.
    num_envs: Count = 8  # Games played side by side.
    seed: Seed = 1  # Seeds games and actions.

    def check(self) -> None:
        """Raises UserError for options that do not go together."""
        if self.test_steps and (self.protocol != "paper" or self.games):
            raise UserError("--test-steps needs --protocol paper without --games")


@dataclasses.dataclass(frozen=True)
class Watch:
    """Plays one game with a trained network and records a video of it."""

    checkpoint: Positional[str]  # A run folder (its best network is used), or a checkpoint in one.
    out: str = ""  # The video, .gif or .mp4 (default: game.gif in the run folder).
    seconds: Annotated[float, Range(1)] = 60.0  # Maximum length of the video.
    epsilon: Fraction = 0.05  # Probability of a random action.
    seed: Seed = 1  # Seeds game and actions.


def check_game(game: str) -> None:
    """Raises UserError for a game that neither ale-py nor gymnasium knows."""
    if rom_of(game):
        return
    if not (roms := rom_names()) and ":" not in game:
        raise UserError("Atari games need ale-py: pip install -e '.[models]' in the checkout")
    import gymnasium

    module, _, name = game.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(name)
    except Exception as error:  # Of gymnasium, or of the module that is named.
        similar = nearest(_stem(game), map(_camel, roms.values()))
        raise UserError(
            f"--game {game}: not one of ale-py's {len(roms)} games"
            + (similar or f"; gymnasium: {first_line(error)}")
        ) from None


def rom_of(game: str) -> str | None:
    """Returns the name of an Atari game's ROM, such as space_invaders, None for other games."""
    return rom_names().get(_plain(_stem(game)))


@functools.cache
def rom_names() -> dict[str, str]:
    """Returns {"spaceinvaders": "space_invaders", ...}, without importing ale_py (0.3 s)."""
    spec = importlib.util.find_spec("ale_py")
    folder = Path(spec.origin).parent / "roms" if spec and spec.origin else Path()
    return {_plain(rom.stem): rom.stem for rom in sorted(folder.glob("*.bin"))}


def _stem(game: str) -> str:
    """Returns an id of gymnasium without what DQN decides itself."""
    return re.sub(r"^ALE/|(NoFrameskip|Deterministic)?-v[045]$", "", game)


def _camel(name: str) -> str:
    return name.title().replace("_", "")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
