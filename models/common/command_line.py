"""The command line of every program, made from its Config: flags, presets, subcommands, errors.

With argparse, not tyro, because of three things: errors of one line, the paper's value beside a
preset's in --help, and knowing which flags were given, which --resume needs.
"""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from models.common import options, run_folder
from models.common.errors import UserError, nearest


def main(
    config_class: type[options.RunConfig],
    train: Callable[[Any], None],
    presets: Mapping[str, options.Preset],
    commands: Mapping[type, Callable[[Any], None]] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a program: `train(config)`, or the command named by the first word.

    Args:
      config_class: the program's Config, a frozen dataclass derived from RunConfig.
      train: called with the parsed Config.
      presets: {name: Preset}; must contain "paper".
      commands: {options dataclass: function}; the command is the class's name in lower case, its
        fields without a default are positional.
      argv: the words of the command line, without the program; default sys.argv.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    program = _program(config_class)
    by_name = {cls.__name__.lower(): (cls, function) for cls, function in (commands or {}).items()}
    try:
        if words and not words[0].startswith("-"):
            if words[0] not in by_name:
                raise UserError(
                    f"unknown command {words[0]!r}: the commands are {', '.join(by_name) or 'none'}"
                    + nearest(words[0], by_name)
                )
            cls, function = by_name[words[0]]
            function(_parse_command(cls, f"{program} {words[0]}", words[1:]))
        else:
            config = parse(config_class, presets, words, program=program, commands=by_name)
            run_folder.check(config)  # Before a program reads its data.
            train(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _explain(error, config_class)
        if message is None:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _explain(error: Exception, config_class: type[options.RunConfig]) -> str | None:
    """Returns what to tell a user of an error, None for one that is the program's."""
    if isinstance(error, UserError):
        return str(error)
    # TensorFlow's errors by name: nothing here needs TensorFlow. It has one for all that can run
    # out.
    kind, full = type(error).__name__, os.strerror(errno.ENOSPC)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or full in str(error):
        where = getattr(error, "filename", None) or "--out"
        return f"no space left on the disk of {where}: make room, then go on with --resume"
    if isinstance(error, MemoryError) or kind == "ResourceExhaustedError":
        return f"out of memory: lower {' or '.join(config_class.MEMORY_FLAGS)}"
    if kind in ("UnavailableError", "AbortedError", "DeadlineExceededError"):
        return "a worker of --strategy multi_worker was lost; start all of them again with --resume"
    return None


def parse(
    config_class: type[options.RunConfig],
    presets: Mapping[str, options.Preset],
    argv: Sequence[str],
    program: str | None = None,
    commands: Mapping[str, tuple[type, Any]] | None = None,
) -> Any:
    """Returns the Config for a command line: the preset's values, then the flags given.

    With --resume the values of the run in --out take the preset's place; a flag (or a preset)
    that contradicts them is refused unless --accept-changes is given.
    """
    fields = options.options_of(config_class)
    program = program or _program(config_class)
    chosen = _early(argv, "--preset") or "paper"
    if chosen not in presets:
        raise UserError(
            f"--preset {chosen}: unknown; the presets are {', '.join(presets)}"
            + nearest(chosen, presets)
        )
    parser = _config_parser(config_class, fields, presets, chosen, program, commands or {})
    given = vars(parser.parse_args(list(argv)))
    wanted = {**presets[chosen].values, **given}
    if given.get("resume"):
        if not given.get("out"):
            raise UserError("--resume needs --out RUN: the folder of the run to go on with")
        explicit = wanted if "preset" in given else given
        wanted = run_folder.resumed_values(given["out"], config_class, explicit)
    config = config_class(**wanted)
    options.check_ranges(config)
    if config.jit_compile and config.strategy != "none":
        raise UserError(
            f"--jit-compile cannot be used with --strategy {config.strategy}: leave one of them out"
        )
    if not config.out:
        config = dataclasses.replace(config, out=_default_out(program, config))
    return config


def _default_out(program: str, config: Any) -> str:
    parts: list[str | None] = [program.split()[-1].split(".")[-1]]
    parts += [getattr(config, name) for name in config.FOLDER_FIELDS]
    parts += [config.preset]
    if getattr(config, "sweep", False):
        parts += ["sweep"]
    else:
        parts += [getattr(config, "parameterization", None), str(config.seed)]
    return os.path.join("runs", "-".join(p for p in parts if p))


class _Parser(argparse.ArgumentParser):
    """Raises UserError, with the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            word = message[len(unknown) :].split()[0]
            shown = [action for action in self._actions if action.help is not argparse.SUPPRESS]
            flags = [flag for action in shown for flag in action.option_strings]
            raise UserError(
                f"unknown {'option' if word.startswith('-') else 'word'} {word.split('=')[0]}"
                + (nearest(word.split("=")[0], flags) or f"; see {self.prog} --help")
            )
        message = message.removeprefix("argument ").replace("(choose from", "(it is one of")
        raise UserError(
            re.sub(r"invalid (whole number|number|value) value: (.*)", r"\2 is not a \1", message)
        )


def _config_parser(
    config_class: type,
    fields: list[options.Option],
    presets: Mapping[str, options.Preset],
    chosen: str,
    program: str,
    commands: Mapping[str, tuple[type, Any]],
) -> _Parser:
    values = presets[chosen].values
    width = max(len(name) for name in presets)
    epilog = "presets:\n" + "\n".join(f"  {n:{width}}  {p.about}" for n, p in presets.items())
    if commands:
        width = max(len(name) for name in commands)
        epilog += "\n\ncommands:\n" + "\n".join(
            f"  {n:{width}}  {_first_line(cls)}" for n, (cls, _) in commands.items()
        )
        epilog += f"\n  (each has its own --help: {program} {next(iter(commands))} --help)"
    module = inspect.getmodule(config_class)
    parser = _Parser(
        prog=program,
        usage=f"{program} [options]" + "".join(f"\n       {program} {c} ..." for c in commands),
        description=(inspect.getdoc(module) or "").split("\n\n")[0],
        epilog=epilog,
        formatter_class=_formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    own = parser.add_argument_group("hyper-parameters (the paper's value in brackets)")
    shared = parser.add_argument_group("run")
    for option in fields:
        is_shared = option.owner is options.RunConfig
        text = option.help
        current = values.get(option.name, option.default)
        if not is_shared:
            text += f" [{_show(option.default)}]"
            if current != option.default:
                text += f" ({chosen}: {_show(current)})"
        else:
            text += _default(current)
        extra = {"choices": tuple(presets)} if option.name == "preset" else {}
        _add(shared if is_shared else own, option, text, **extra)
    return parser


def _parse_command(cls: type, program: str, argv: Sequence[str]) -> Any:
    parser = _Parser(
        prog=program, description=inspect.getdoc(cls), formatter_class=_formatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for option in options.options_of(cls):
        if option.default is dataclasses.MISSING:
            parser.add_argument(option.name, type=option.kind, help=option.help)
        else:
            _add(parser, option, option.help + _default(option.default))
    values = cls(**vars(parser.parse_args(list(argv))))
    options.check_ranges(values)
    return values


def _add(parser: Any, option: options.Option, text: str, **extra: Any) -> None:
    text = text.replace("%", "%%")
    if option.kind is bool:
        words = [option.flag, "--no-" + option.flag[2:]]
        parser.add_argument(words[0], action="store_true", help=text)
        parser.add_argument(
            words[1], action="store_false", dest=option.name,
            help="" if option.default else argparse.SUPPRESS,
        )  # fmt: skip
        return
    kind: Callable[[str], Any] = _converter(option)
    if option.choices:
        extra["choices"] = option.choices
        extra["metavar"] = "{" + ",".join(map(str, option.choices)) + "}"
    else:
        extra.setdefault("metavar", "N" if option.kind in (int, float) else option.name.upper())
    if option.many:
        extra["nargs"] = "+"
        extra["action"] = _Tuple
    parser.add_argument(option.flag, type=kind, help=text, **extra)


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _converter(option: options.Option) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        if option.optional and word.lower() == "none":
            return None
        if option.kind is int:
            with contextlib.suppress(ValueError):
                return int(word.replace("_", ""))
            with contextlib.suppress(ValueError, OverflowError):
                if float(word) == int(float(word)):
                    return int(float(word))  # 1e6
            raise ValueError
        return option.kind(word)

    convert.__name__ = {int: "whole number", float: "number"}.get(option.kind, "value")
    return convert


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=100)


def _early(argv: Sequence[str], flag: str) -> str | None:
    found = None  # The last one counts, as it does for argparse.
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            found = following
        elif word.startswith(flag + "="):
            found = word[len(flag) + 1 :]
    return found


def _default(value: Any) -> str:
    """Returns what to add to a help text; where the default has no value the text tells it."""
    return "" if value is None or value is False or value == "" else f" (default: {_show(value)})"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]


def _program(config_class: type) -> str:
    return f"python -m {run_folder.program_of(config_class)}"
