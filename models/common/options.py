"""Options as dataclasses: documented fields that become flags, and presets of their values."""

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union

from models.common.errors import UserError


def ranges(positive: str = "", probability: str = "") -> dict[str, tuple[float, float]]:
    """Returns the RANGES of a Config: names of numbers from 1 on, and of those from 0 to 1."""
    found = dict.fromkeys(["keep", *positive.split()], (1.0, math.inf))
    found |= dict.fromkeys(["seed", "seeds"], (0, 2**32 - 1))  # NumPy's.
    return found | dict.fromkeys(probability.split(), (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Preset:
    """Named values for some of a Config's fields; every other field keeps the paper's."""

    about: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Options every program has; a program's Config inherits them and adds its own.

    The defaults of a program's Config are the paper's values. A comment at the end of a field's
    line is its help text.
    """

    preset: str = "paper"  # A named set of values, see below.
    seed: int = 0  # Seeds everything: weights, data order, noise, environments.
    out: str = ""  # The run folder (default: runs/PROGRAM-PRESET-PARAMETERIZATION-SEED).
    resume: bool = False  # Go on with the run in --out; its own options are taken up again.
    accept_changes: bool = False  # Resume although hyper-parameters differ from the run's.
    data_dir: str = ""  # Where data sets are (TFDS layout; default: $TFWN_DATA_DIR).
    mixed_precision: Literal["none", "bfloat16"] = "none"  # Compute type; weights stay float32.
    jit_compile: bool = False  # Compile the training step with XLA.
    strategy: Literal["none", "mirrored", "multi_worker"] = "none"  # Replicas (tf.distribute).
    checkpoint_every: float = 300.0  # Seconds between checkpoints (and one at the end).
    keep: int = 2  # Checkpoints kept, besides the best one.
    deterministic: bool = False  # Deterministic TensorFlow ops: the same seed, the same bits.

    # Fields that may differ when a run is resumed.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"out", "resume", "accept_changes", "data_dir", "checkpoint_every", "keep"}
    )
    # Fields that may not, even with --accept-changes: the state would not fit them.
    FIXED: ClassVar[frozenset[str]] = frozenset()
    # Fields that are named beside each result anyway: a flag that sets one does not count as a
    # change of the preset, except to synthetic data.
    NAMED: ClassVar[frozenset[str]] = frozenset({"parameterization", "dataset", "game"})
    # Fields whose values are in the default name of the run folder, after the program's.
    FOLDER_FIELDS: ClassVar[tuple[str, ...]] = ()
    # Where numbers lie, made by ranges(); those not named are not negative.
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = ranges()
    # Flags to lower when memory runs out, named in the error.
    MEMORY_FLAGS: ClassVar[tuple[str, ...]] = ("--batch-size",)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of an options class, ready to become a flag."""

    name: str
    kind: type
    choices: tuple[Any, ...] | None
    optional: bool
    many: bool
    default: Any
    help: str
    owner: type

    @property
    def flag(self) -> str:
        """The flag, as typed on the command line."""
        return "--" + self.name.replace("_", "-")


def options_of(cls: type) -> list[Option]:
    """Returns the fields of a dataclass as options, in order of definition."""
    hints = typing.get_type_hints(cls)
    owners = {
        name: base
        for base in reversed(cls.__mro__)
        for name in vars(base).get("__annotations__", ())
    }
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= _comments(base)
    result = []
    for field in dataclasses.fields(cls):
        kind, choices, optional, many = _unpack(hints[field.name])
        result.append(
            Option(
                field.name, kind, choices, optional, many,
                field.default, comments.get(field.name, ""), owners[field.name],
            )
        )  # fmt: skip
    return result


def check_ranges(values: Any) -> None:
    """Raises UserError for a number of an options object that is outside of its range."""
    ranges = getattr(values, "RANGES", {})
    for option in options_of(type(values)):
        low, high = ranges.get(option.name, (0, math.inf))
        value = getattr(values, option.name)
        for number in value if isinstance(value, tuple) else (value,):
            if option.kind not in (int, float) or number is None:
                continue
            shown = [f"{n:,}" if isinstance(n, int) else f"{n:g}" for n in (low, high, number)]
            if not math.isfinite(number):
                rule = "a finite number"
            elif not low <= number <= high:
                rule = (
                    f"at least {shown[0]}" if high == math.inf else "from {} to {}".format(*shown)
                )
            else:
                continue
            raise UserError(f"{option.flag} must be {rule}, got {shown[2]}")


def note(presets: Mapping[str, Preset], config: RunConfig, *caveats: str) -> str:
    """Returns what to say beside a run's results, " (...)": what is scaled, and the caveats."""
    scaled = presets[config.preset].about if config.preset != "paper" else ""
    changed = shorten(changes(presets, config))
    told = "; ".join(text for text in (scaled, changed, *caveats) if text)
    return told and f" ({told})"


def changes(presets: Mapping[str, Preset], config: RunConfig) -> str:
    """Returns what differs from the run's preset, "changed: width 4, no-whiten"; "" for nothing."""
    preset = presets[config.preset].values if config.preset in presets else {}
    told = []
    for name, (_, value) in differences(config, preset).items():
        if name in config.NAMED and not str(value).startswith("synthetic"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            told.append(flag if value else f"no-{flag}")
        else:
            several = value if isinstance(value, tuple) else (value,)
            shown = (f"{v:g}" if isinstance(v, float) else str(v).lower() for v in several)
            told.append(" ".join([flag, *shown]))
    return f"changed: {', '.join(told)}" if told else ""


def shorten(changed: str) -> str:
    """Returns a text with `changes` in it, of which all but the first two are counted."""
    before, mark, told = changed.partition("changed: ")
    parts = told.split(", ")
    more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
    return before + mark + ", ".join(parts[:2]) + more


def differences(
    config: RunConfig, preset: dict[str, Any] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Returns {hyper-parameter: (the paper's value, this configuration's)} where they differ.

    With the values of a preset: {hyper-parameter: (the preset's value, this configuration's)}.
    """
    shared = {field.name for field in dataclasses.fields(RunConfig)} - {"mixed_precision"}
    values = {field.name: field.default for field in dataclasses.fields(config)} | (preset or {})
    return {
        name: (value, getattr(config, name))
        for name, value in values.items()
        if name not in shared | config.MAY_CHANGE and getattr(config, name) != value
    }


def _unpack(hint: Any) -> tuple[type, tuple[Any, ...] | None, bool, bool]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in args if a is not type(None))
        kind, choices, _, many = _unpack(inner)
        return kind, choices, True, many
    if origin is Literal:
        return type(args[0]), args, False, False
    if origin is tuple:
        return args[0], None, False, True
    return hint, None, False, False


def _comments(cls: type) -> dict[str, str]:
    """Reads the comment at the end of each field's last line, else the lines above it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        tail = lines[(node.end_lineno or 0) - 1][node.end_col_offset :]
        if "#" in tail:
            found[node.target.id] = tail.split("#", 1)[1].strip()
            continue
        above: list[str] = []
        row = node.lineno - 2
        while row >= 0 and lines[row].strip().startswith("#"):
            above.insert(0, lines[row].strip().lstrip("# "))
            row -= 1
        found[node.target.id] = " ".join(above)
    return found
