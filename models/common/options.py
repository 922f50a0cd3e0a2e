"""Options as dataclasses: the fields that all programs share, ranges of values, and presets."""

import dataclasses
import math
import typing
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from models.common.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a numeric option, as in Annotated[int, Range(1)]. By default it is nonnegative."""

    low: float = 0
    high: float = math.inf


Count = Annotated[int, Range(1)]
Fraction = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # The seeds that NumPy accepts.


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named set of values for some Config fields; the others keep the paper's values."""

    about: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


def option(
    default: Any,
    *,
    resume: Literal["ask", "free", "never"] = "ask",
    named: bool = False,
    memory: bool = False,
    was: str = "",
) -> Any:
    """Declares a Config field with metadata besides its default.

    Args:
      default: the paper's value.
      resume: when a resumed run may change it: "ask" (with --accept-changes), "free" or "never".
      named: results always show its value, so changing it does not count as a different preset.
      memory: lowering it saves memory, so an out-of-memory error suggests it.
      was: its former name, which is still accepted on the command line and in config.json.
    """
    metadata = {"resume": resume, "named": named, "memory": memory, "was": was}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The options of every program; each program's Config inherits them and adds its own.

    The defaults in a program's Config are the paper's values. The comment at the end of a field's
    line, or above it, is its help text.
    """

    preset: str = option("paper", resume="never")  # A set of values, listed above.
    seed: Seed = 0  # Seeds everything: weights, data order, noise, environments.
    out: str = option("runs/{program}-{preset}-{seed}", resume="free")  # The run folder.
    resume: bool = option(False, resume="free")  # Continue the run in --out with its options.
    accept_changes: bool = option(False, resume="free")  # Let --resume change hyper-parameters.
    data_dir: str = option("", resume="free")  # TFDS's data folder (if empty: $TFWN_DATA_DIR).
    mixed_precision: Literal["none", "bfloat16"] = "none"  # Compute dtype; weights stay float32.
    jit_compile: bool = False  # Compile the training step with XLA.
    strategy: Literal["none", "mirrored", "multi_worker"] = "none"  # Replicas (tf.distribute).
    checkpoint_every: float = option(300.0, resume="free")  # Seconds between checkpoints.
    keep: Count = option(2, resume="free")  # Checkpoints to keep, besides the best one.
    deterministic: bool = False  # Use TensorFlow's deterministic ops.

    PRESETS: ClassVar[dict[str, Preset]] = {"paper": Preset("the paper's values")}

    @classmethod
    def of_preset(cls, name: str, **values: Any) -> Any:
        """Returns a preset's Config, with some of its values replaced by `values`."""
        return cls(**{**cls.PRESETS[name].values, "preset": name, **values})

    def check(self) -> None:
        """Raises UserError for values that conflict; subclasses add their own checks."""
        if self.jit_compile and self.strategy != "none":
            raise UserError(
                f"--jit-compile does not work with --strategy {self.strategy}: omit one of them"
            )

    def differences(self, preset: Preset | None = None) -> dict[str, tuple[Any, Any]]:
        """Returns {name: (reference value, own value)} for the hyper-parameters that differ.

        Args:
          preset: the reference; default: the paper's values.
        """
        shared = {field.name for field in dataclasses.fields(RunConfig)} - {"mixed_precision"}
        found = {}
        for field in dataclasses.fields(self):
            expected = preset.values.get(field.name, field.default) if preset else field.default
            free = field.name in shared or field.metadata.get("resume") == "free"
            if not free and getattr(self, field.name) != expected:
                found[field.name] = expected, getattr(self, field.name)
        return found

    def changes(self, besides: Collection[str] = ()) -> str:
        """Returns the differences from the preset, as "changed: width 4, no-whiten", or "".

        Args:
          besides: fields to ignore.
        """
        named = {"parameterization", "dataset", "game"}
        named |= {f.name for f in dataclasses.fields(self) if f.metadata.get("named")}
        preset = self.PRESETS.get(self.preset, Preset(""))
        words = []
        for name, (_, value) in self.differences(preset).items():
            if name in besides or (name in named and not str(value).startswith("synthetic")):
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else f"no-{flag}")
            else:
                words.append(f"{flag} {show(value).lower()}")
        return f"changed: {', '.join(words)}" if words else ""

    def note(self, *caveats: str) -> str:
        """Returns a note to append to this run's results: " (preset; changes; caveats)", or ""."""
        scaled = self.PRESETS[self.preset].about if self.preset != "paper" else ""
        text = "; ".join(part for part in (scaled, shorten(self.changes()), *caveats) if part)
        return text and f" ({text})"


@dataclasses.dataclass(frozen=True)
class SweepConfig(RunConfig):
    """The options of a program that compares arms, which its Config lists in ARMS."""

    # Train every arm at each of --learning-rates, then at its best rate with more seeds.
    sweep: bool = option(False, resume="free")
    arms: tuple[str, ...] = option((), resume="free")  # The arms of the sweep; if empty, all.
    learning_rates: tuple[float, ...] = option((), resume="free")  # The rates of the sweep.
    # The seeds of the sweep: the first for every rate, the others for each arm's best rate.
    seeds: tuple[Seed, ...] = option((0, 1, 2), resume="free")
    jobs: Count = option(1, resume="free")  # Number of runs at a time; they share the cores.
    learning_rate: float | None = None  # The step size.

    ARMS: ClassVar[dict[str, dict[str, Any]]] = {}  # The field values that define each arm.
    # The column of metrics.csv whose last (or highest) value selects the rate.
    MEASURE: ClassVar[str] = ""
    SELECT_HIGHEST: ClassVar[bool] = False
    LOWER_IS_BETTER: ClassVar[bool] = False

    @property
    def last_epoch(self) -> float:
        """The last value in the column `epoch` of a finished run; by default the field `epochs`."""
        return self.epochs  # type: ignore[attr-defined]

    @classmethod
    def arm_fields(cls) -> set[str]:
        """Returns the names of the fields that define the arms."""
        return {field for values in cls.ARMS.values() for field in values}

    @property
    def rate(self) -> float:
        """The learning rate; programs override this to define what None means."""
        return self.learning_rate or 0.0

    @property
    def arm(self) -> str:
        """The name of the arm that these values belong to, "" if there is none."""
        for name, values in self.ARMS.items():
            if all(getattr(self, field) == value for field, value in values.items()):
                return name
        return ""

    def check(self) -> None:
        """Raises UserError for values that conflict; subclasses add their own checks."""
        super().check()
        if unknown := [name for name in self.arms if name not in self.ARMS]:
            raise UserError(
                f"--arms {unknown[0]}: unknown arm; choose from {', '.join(self.ARMS)}"
                + nearest(unknown[0], self.ARMS)
            )
        for name in ("learning_rates", "seeds"):
            if self.sweep and not getattr(self, name):
                raise UserError(f"{flag_of(name)} takes at least one number")
        if self.sweep and self.strategy == "multi_worker":
            raise UserError(
                "--sweep is for one machine: with --strategy multi_worker, start each run yourself"
            )
        if getattr(self, "frozen_g", False):
            kind = getattr(self, "parameterization", "normal")
            if kind not in ("normal", "mean_only_bn"):
                raise UserError(f"--frozen-g needs --parameterization normal, got {kind}")
            if not getattr(self, "data_dependent_init", True):
                raise UserError("--frozen-g needs --data-dependent-init, which sets g")


def shorten(text: str) -> str:
    """Returns a text with a list at its end, "changed: ...", cut to "changed: a, b and 3 more"."""
    before, mark, changes = text.partition("changed: ")
    parts = changes.split(", ")
    more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
    return before + mark + ", ".join(parts[:2]) + more


def show(value: Any) -> str:
    """Returns a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def flags(config: RunConfig, default: RunConfig) -> list[str]:
    """Returns the command-line arguments that turn `default` into `config`."""
    words = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), flag_of(field.name)
        if value == getattr(default, field.name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(show, value if isinstance(value, tuple) else (value,))]
    return words


def flag_of(name: str) -> str:
    """Returns a field's flag."""
    return "--" + name.replace("_", "-")


def check_ranges(options: Any) -> None:
    """Raises UserError if a number in an options dataclass is outside its Range."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        limits = _range(hints[field.name]) or Range()
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not limits.low <= number <= limits.high:
                rule = f"at least {limits.low:,}"
                if limits.high < math.inf:
                    rule = f"from {limits.low:,} to {limits.high:,}"
            elif number == math.inf:
                rule = "finite"
            else:
                continue
            raise UserError(f"{flag_of(field.name)} must be {rule}, got {number:,}")


def _range(hint: Any) -> Range | None:
    if isinstance(hint, Range):
        return hint
    return next(filter(None, map(_range, typing.get_args(hint))), None)
