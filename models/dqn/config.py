"""The hyper-parameters of section 5.4, the paper's results, and the options of the commands."""

import dataclasses
import functools
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Suppress

from models.common.errors import UserError, first_line, nearest
from models.common.options import Count, Fraction, Preset, Range, Seed, SweepConfig, flag_of, option
from models.common.run_folder import RunPath

# Maximum test scores (figure 6). nature, random: Mnih et al. 2015, extended data table 2.
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
    "learning_rate": 3e-4,  # At 1e-4, the normal parameterization needs more steps than these.
    "init_output": 0.01,  # A large initial Q would fade by only 1 % per copy to the target network.
    "protocol": "nature",  # The paper's would leave out long games with so few steps.
}  # fmt: skip
SMOKE = {
    "num_envs": 4, "batch_size": 8, "filters": (4, 4, 4), "hidden": 16, "init_batch": 64,
    "steps": 600, "replay": 400, "learning_starts": 200, "target_every": 100,
    "epsilon_steps": 200, "test_every": 200, "test_steps": 200, "held_out": 32, "log_every": 100,
}  # fmt: skip
NATURE = {
    "parameterization": "normal", "data_dependent_init": False, "protocol": "nature",
    "optimizer": "rmsprop", "learning_rate": 2.5e-4, "batch_size": 32, "scaling": "area",
    "learning_rates": (1e-4, 2.5e-4, 1e-3, 3e-3),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """The hyper-parameters of section 5.4; a step is one action of the agent, 4 game frames."""

    # The run folder.
    out: str = option("runs/dqn-{game}-{preset}-{parameterization}-{seed}", resume="free")
    # An Atari game, such as SpaceInvaders or ALE/SpaceInvaders-v5, or a gymnasium environment with
    # discrete actions and images, given as MODULE:NAME-v0.
    game: str = option("SpaceInvaders", resume="never")
    # Weight parameterization of every layer.
    parameterization: Literal["weight_norm", "normal"] = option("weight_norm", resume="never")
    # Compute dtype; weights stay float32.
    mixed_precision: Literal["none", "bfloat16"] = option("none", resume="never")
    # Not options of this program: DQN trains on one device and reads no data sets.
    strategy: Suppress[Literal["none", "mirrored", "multi_worker"]] = "none"
    data_dir: Suppress[str] = option("", resume="free")
    steps: Count = 50_000_000  # Agent actions of 4 frames each (the paper's 200 epochs).
    replay: Count = option(1_000_000, memory=True)  # Transitions in the replay memory.
    learning_starts: Count = 50_000  # Random steps before the first update.
    update_every: Count = 4  # Steps per update.
    batch_size: Count = option(64, memory=True)  # Transitions per update (Nature: 32).
    learning_rate: float | None = None  # Step size (none: 3e-4 for weight_norm, 1e-4 for normal).
    # Learning rates tried by --sweep.
    learning_rates: tuple[float, ...] = option((1e-4, 3e-4, 1e-3, 3e-3), resume="free")
    # rmsprop is the centered variant, with Nature's decay rates.
    optimizer: Literal["adamax", "rmsprop"] = option("adamax", resume="never")
    discount: Fraction = 0.99  # Discount factor per step.
    # Steps (with --variant deep_q_rl: updates) between copies to the target network.
    target_every: Count = 10_000
    epsilon: Fraction = 0.1  # Final probability of a random action.
    epsilon_steps: Count = 1_000_000  # Steps after the warm-up over which epsilon decays from 1.
    filters: tuple[Count, ...] = option((32, 64, 64), resume="never")  # Filters per convolution.
    hidden: Count = option(512, resume="never")  # Units of the hidden dense layer.
    data_dependent_init: bool = True  # Use the data-dependent initialization of section 3.
    # With --parameterization normal: w = g v with a constant g, as in the paper's code.
    frozen_g: bool = option(False, resume="never")
    # Initial standard deviation of Q (none: the output layer is not initialized from data).
    init_output: Annotated[float, Range(1e-6)] | None = 1.0
    init_batch: Count = 512  # States in the initialization batch.
    test_every: Count = option(250_000, resume="never")  # Steps per epoch, which ends with a test.
    # Tests: --test-steps actions (paper), or 30 games of at most 5 minutes (nature).
    protocol: Literal["paper", "nature"] = option("paper", named=True, was="test")
    test_steps: Count = 125_000  # Actions per test with --protocol paper.
    test_epsilon: Fraction = 0.05  # Probability of a random action in evaluation.
    held_out: Count = 3200  # Number of held-out states whose mean maximum Q is logged.
    # Scaling of frames to 84 x 84: bilinear as in deep_q_rl, or area averages as in Nature's code.
    scaling: Literal["bilinear", "area"] = option("bilinear", resume="never")
    # Games played in parallel. 1: acts and learns in Nature's order. 8 or more: faster, with one
    # process per core, but actions are chosen with weights up to two updates old.
    num_envs: Count = option(1, resume="never")
    # deep_q_rl: two extra no-ops at the start of a game or life, 4 random actions at the start of a
    # life, updates counted from the start of a life, no states that span two lives, and
    # --target-every counts updates.
    variant: Literal["nature", "deep_q_rl"] = "nature"
    replay_file: str = option("", resume="free")  # Keep the replay memory in this file, not in RAM.
    save_replay: bool = option(True, named=True)  # Save the replay memory, so resuming is exact.
    log_every: Count = option(1_000, named=True)  # Steps between rows of metrics.csv.

    # INIT-PARAMETERIZATION; "one" and "hundredth" are the standard deviation of the initial Q.
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
    SELECT_HIGHEST: ClassVar[bool] = True  # Figure 5.

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset("the paper's values: 50M steps, 7 GiB of memory, days"),
        "nature": Preset(
            "Mnih et al. 2015: RMSProp, minibatches of 32, their initialization and protocol",
            NATURE,
        ),
        "cpu": Preset(
            "scaled: half the width, up to 500,000 steps, about an hour on a laptop", CPU
        ),
        "demo": Preset(
            "scaled: the first half of `cpu`, on Breakout, at the rate that was best there",
            CPU | {"game": "Breakout", "steps": 250_000, "learning_rate": 3e-3},  # RESULTS.md
        ),
        "smoke": Preset(
            "a quick check that it runs, in under a minute; its scores mean nothing", SMOKE
        ),
    }

    def __post_init__(self) -> None:
        if rom := rom_of(self.game):
            object.__setattr__(self, "game", _camel(rom))

    @property
    def last_epoch(self) -> float:
        """The number of epochs, which may be fractional."""
        return self.steps / self.test_every

    @property
    def title(self) -> str:
        """The game and the parameterization, as a title."""
        return f"{self.game}, {self.parameterization.replace('_', ' ')}"

    @property
    def rate(self) -> float:
        """The learning rate; by default the paper's choice from its grid."""
        if self.learning_rate is None:
            return 3e-4 if self.parameterization == "weight_norm" else 1e-4
        return self.learning_rate

    def check(self) -> None:
        """Raises UserError if options conflict."""
        super().check()
        check_game(self.game)
        if self.strategy != "none":
            raise UserError(f"--strategy {self.strategy}: DQN trains on one device; omit it")
        if self.sweep and self.replay_file:
            raise UserError("--sweep: each run needs its own file, so omit --replay-file")
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

    checkpoint: RunPath  # A run folder (its best network is used), or a checkpoint inside.
    # nature: 30 games of at most 5 minutes; paper: --test-steps actions, games of any length.
    protocol: Literal["nature", "paper"] = "nature"
    test_steps: Count | None = None  # Actions with --protocol paper (none: as in the run).
    games: Count | None = None  # Number of games (none: the protocol's).
    epsilon: Fraction = 0.05  # Probability of a random action.
    num_envs: Count = 8  # Games played in parallel.
    seed: Seed = 1  # Seeds games and actions.

    def check(self) -> None:
        """Raises UserError if options conflict."""
        if self.test_steps and (self.protocol != "paper" or self.games):
            raise UserError("--test-steps needs --protocol paper without --games")


@dataclasses.dataclass(frozen=True)
class Watch:
    """Plays one game with a trained network and records a video of it."""

    checkpoint: RunPath  # A run folder (its best network is used), or a checkpoint inside.
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
    except Exception as error:  # Raised by gymnasium or by the module.
        similar = nearest(_stem(game), map(_camel, roms.values()))
        raise UserError(
            f"--game {game}: not one of ale-py's {len(roms)} games"
            + (similar or f"; gymnasium: {first_line(error)}")
        ) from None


def rom_of(game: str) -> str | None:
    """Returns the name of an Atari game's ROM, such as space_invaders, or None for others."""
    return rom_names().get(_plain(_stem(game)))


@functools.cache
def rom_names() -> dict[str, str]:
    """Returns {"spaceinvaders": "space_invaders", ...}, without importing ale_py (0.3 s)."""
    spec = importlib.util.find_spec("ale_py")
    folder = Path(spec.origin).parent / "roms" if spec and spec.origin else Path()
    return {_plain(rom.stem): rom.stem for rom in sorted(folder.glob("*.bin"))}


def _stem(game: str) -> str:
    """Returns a gymnasium id without its namespace, frame skip and version."""
    return re.sub(r"^ALE/|(NoFrameskip|Deterministic)?-v[045]$", "", game)


def _camel(name: str) -> str:
    return name.title().replace("_", "")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
