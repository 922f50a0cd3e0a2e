"""The programs' command lines, which tyro derives from a Config before TensorFlow is loaded."""

import contextlib
import dataclasses
import errno
import importlib
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from models.common import run_folder, sweep
from models.common.errors import UserError, nearest
from models.common.options import RunConfig, SweepConfig, check_ranges, flag_of, show


def main(functions: Mapping[type, str], argv: Sequence[str] | None = None) -> None:
    """Runs a program: trains, or runs the command named by the first argument.

    Args:
      functions: {options: "module.function"}: a dataclass, and the function that takes an instance.
        The first is the program's Config; each of the others defines a command, named like the
        class in lower case. A module is imported only once the command line is known to be valid.
      argv: the arguments without the program's name; default: sys.argv[1:].
    """
    words = list(sys.argv[1:] if argv is None else argv)
    config_class, *commands = functions
    program = f"python -m {run_folder.program_of(config_class)}"
    by_name = {command.__name__.lower(): command for command in commands}
    try:
        if words and not words[0].startswith("-"):
            name, *words = words
            if name not in by_name:
                raise UserError(
                    f"unknown command {name!r}: the commands are {', '.join(by_name) or 'none'}"
                    + nearest(name, by_name)
                )
            options = _parse(by_name[name], words, prog=f"{program} {name}")
        else:
            options = parse(config_class, words, commands)
            if getattr(options, "sweep", False):
                sweep.run(options)
                return
            run_folder.check(options)  # Early, before the program reads its data.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        module, _, function = functions[type(options)].rpartition(".")
        getattr(importlib.import_module(module), function)(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _explain(error, config_class)
        if message is None:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        sys.exit(2)


def parse(config_class: type[RunConfig], argv: Sequence[str], commands: Sequence[type] = ()) -> Any:
    """Returns the Config for a command line: the preset's values, overridden by the flags.

    With --resume, the values of the run in --out replace the preset's, and a flag may change them
    only as far as run_folder.refuse_changes allows.
    """
    program = run_folder.program_of(config_class)
    argv = list(argv)
    for field in dataclasses.fields(config_class):
        if was := field.metadata.get("was"):
            flags = flag_of(was), flag_of(field.name)
            argv = [w.replace(*flags, 1) if w.split("=")[0] == flags[0] else w for w in argv]
    first, _ = _in_one_line(
        tyro.cli, _First, args=argv, prog=program, return_unknown_args=True, add_help=False
    )
    if first.resume:
        if first.sweep:
            raise UserError("--resume is not needed with --sweep, which always continues: omit it")
        if not first.out:
            raise UserError("--resume needs --out RUN, the folder of the run to continue")
        saved = run_folder.load_config(first.out, config_class)
        default = dataclasses.replace(saved, accept_changes=False)
    elif first.preset in config_class.PRESETS:
        default = config_class.of_preset(first.preset)
    else:
        raise UserError(
            f"--preset {first.preset}: unknown; choose from {', '.join(config_class.PRESETS)}"
            + nearest(first.preset, config_class.PRESETS)
        )
    about = _describe(program, default, commands)
    config = _parse(
        config_class, argv, default=default, prog=f"python -m {program}", description=about
    )
    if issubclass(config_class, SweepConfig):
        _refuse_unused(config, argv)
    if first.resume:
        run_folder.refuse_changes(saved, config, "--resume")
    if config.out == config_class.out:  # Fill in the template.
        values = dataclasses.asdict(config) | {"program": program.split(".")[-1]}
        if getattr(config, "sweep", False):
            values |= {"parameterization": "sweep", "seed": ""}
        config = dataclasses.replace(config, out=config.out.format(**values).strip("-"))
    return config


def _refuse_unused(config: SweepConfig, argv: Sequence[str]) -> None:
    """Raises UserError if an option has no effect, either because of --sweep or without it."""
    given = {word.split("=")[0].replace("_", "-").replace("--no-", "--", 1) for word in argv}
    single = {"seed": "seeds", "learning_rate": "learning_rates"}
    single |= dict.fromkeys(sorted(config.arm_fields()), "arms")
    if config.sweep:
        for name, instead in single.items():
            if flag_of(name) in given:
                raise UserError(
                    f"{flag_of(name)} has no effect with --sweep: use {flag_of(instead)}"
                )
        return
    for name in sweep.GRID:
        if flag_of(name) in given:
            use = [flag_of(one) for one, many in single.items() if many == name]
            raise UserError(
                f"{flag_of(name)} has no effect without --sweep: add that"
                + (f", or for a single run, use {' and '.join(use)}" if use else "")
            )


@dataclasses.dataclass(frozen=True)
class _First:
    """The options that determine the defaults of the others."""

    preset: str = "paper"
    out: str = ""
    resume: bool = False
    sweep: bool = False


def _parse(cls: type, argv: Sequence[str], **options: Any) -> Any:
    parsed = _in_one_line(tyro.cli, cls, args=argv, registry=_registry, **options)
    check_ranges(parsed)
    if hasattr(parsed, "check"):
        parsed.check()
    return parsed


def _in_one_line(parse: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Returns what tyro parses, and turns its multi-line error boxes into one-line UserErrors."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse(*arguments, **options)
    except SystemExit as error:
        if not error.code:  # It was --help.
            raise
    # A box has a title and a message, then suggestions and other help, separated by rules.
    plain = re.sub(r"\x1b\[[\d;]*m", "", stderr.getvalue())  # Strip colors.
    _, *lines = (line.strip("│╭╮╰╯─ ") for line in plain.splitlines())
    text = " ".join(itertools.takewhile(bool, lines))
    meant = [after for line, after in itertools.pairwise(lines) if line == "Perhaps you meant:"]
    raise UserError(text + (f"; did you mean {meant[0].split()[0]}?" if meant else ""))


_registry = ConstructorRegistry()


def _accept(kind: type, metavar: str, convert: Callable[[str], Any]) -> None:
    """Registers `convert` as tyro's parser for a type."""
    spec: PrimitiveConstructorSpec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: convert(words[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value).lower()],
    )
    _registry.primitive_rule(lambda info: spec if info.type is kind else None)


def _whole_number(word: str) -> int:
    with contextlib.suppress(ValueError):
        return int(word)
    if not float(word).is_integer():
        raise ValueError(f"{word} is not a whole number")
    return int(float(word))


def _none(word: str) -> None:
    if word.lower() != "none":
        raise ValueError(f"{word} is not none")


_accept(int, "INT", _whole_number)  # Accepts 1e6, too.
_accept(type(None), "none", _none)


def _describe(program: str, config: RunConfig, commands: Sequence[type]) -> str:
    """Returns the text that --help shows above the options."""

    def table(title: str, rows: dict[str, str]) -> str:
        width = max(map(len, rows))
        return f"\n\n{title}\n" + "\n".join(f"  {n:{width}}  {about}" for n, about in rows.items())

    module = sys.modules.get(program) or sys.modules[type(config).__module__]
    text = (inspect.getdoc(module) or "").split("\n\n")[0]
    text += table("presets:", {name: preset.about for name, preset in config.PRESETS.items()})
    if arms := getattr(config, "ARMS", {}):
        text += f"\n\narms of --sweep: {', '.join(arms)}"
    if commands:
        about = {c.__name__.lower(): (inspect.getdoc(c) or "").split("\n")[0] for c in commands}
        text += table("commands (each has its own --help):", about)
    if differences := config.differences():
        rows = {flag_of(n): f"{show(b)} -> {show(a)}" for n, (b, a) in differences.items()}
        return text + table(f"changes from the paper's values, preset {config.preset}:", rows)
    slow = ", so training takes hours to weeks on a CPU: start with --preset cpu"
    text += f"\n\nThe defaults are the paper's values{slow if 'cpu' in config.PRESETS else ''}."
    return text + " Add --preset NAME to see what it changes."


def _explain(error: Exception, config_class: type[RunConfig]) -> str | None:
    """Returns the message for an error of the user or machine, None for a bug in the program."""
    if isinstance(error, UserError):
        return str(error)
    # TensorFlow may not be loaded, so match errors by name. It uses one for both disk and memory.
    kind, full = type(error).__name__, os.strerror(errno.ENOSPC)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or full in str(error):
        where = getattr(error, "filename", None) or "--out"
        return f"no space left on the disk for {where}: make room, then continue with --resume"
    if isinstance(error, MemoryError) or kind == "ResourceExhaustedError":
        fields = dataclasses.fields(config_class)
        flags = [flag_of(field.name) for field in fields if field.metadata.get("memory")]
        return f"out of memory: lower {' or '.join(flags) or 'the batch size'}"
    if kind in ("UnavailableError", "AbortedError", "DeadlineExceededError"):
        return "a worker of --strategy multi_worker was lost; restart all workers with --resume"
    return None
