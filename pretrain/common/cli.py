"""The command line: options into frozen settings, errors into one line and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import os
import re
import sys
import threading
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings

from pretrain.common.errors import RunFailed, UserError, outside_reason, worker_failure
from pretrain.common.files import whole_number, write_text
from pretrain.common.help_formatter import EXIT_CODES, Formatter, help_text, in_words
from pretrain.common.package import __version__
from pretrain.common.signals import Stopped
from pretrain.common.terminal import Plain, PlainFormatter, printable, show_all_characters

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # stopped by a signal, everything saved; the same command goes on (EX_TEMPFAIL of sysexits)
EXIT_INTERRUPTED = 130

MOST_RANKS = 10**6
LONGEST_LINE = 4000
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
TRUTH = ("true", "false", "yes", "no")

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """argparse with this project's help, and one line for a mistake."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, epilog=EXIT_CODES, formatter_class=Formatter,
            allow_abbrev=False, add_help=False,
        )  # fmt: skip
        self.add_argument("-h", "--help", action="help", help="Print this text.")

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of printing the usage and leaving."""
        raise _mistake(message, self._option_string_actions)


class _SettingsParser(ArgumentParser):
    """jsonargparse with options spelt the usual way: --data-dir (for data_dir), --dry-run, --no-verify."""

    help_text = ""
    types: Mapping[str, Any] = {}
    hints: Mapping[str, str] = {}

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("type") is bool:
            del kwargs["type"]
            kwargs |= {"action": ActionYesNo(yes_prefix="", no_prefix="no-"), "nargs": "?"}
        dashed = [a.replace("_", "-") if isinstance(a, str) and a.startswith("--") else a for a in args]
        return super().add_argument(*dashed, **kwargs)

    def format_help(self, *_: Any) -> str:
        return self.help_text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        raise _mistake(message, self._option_string_actions, self.types, self.hints) from ex


def _mistake(
    message: str, options: Collection[str], types: Mapping[str, Any] = {}, hints: Mapping[str, str] = {}
) -> UserError:
    """One line in the user's words instead of the parser's several.

    `types` are the options' by their names, `hints` what to say of options that other programs have.
    """
    line = " ".join(message.split())
    key = re.match(r'Parser key "([\w.]+)":.*?(?:Got|Given) value: (.*)$', line)
    truth = re.match(r"argument (--[\w-]+)/--no-[\w-]+: invalid _boolean_type value: '(.*)'$", line)
    required = "the following arguments are required: "
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", line, re.IGNORECASE)
    in_file = re.match(r"Option '(\w+)' is not accepted", line)
    of_file = f"--{in_file[1].replace('_', '-')}" if in_file else ""
    if key and key[1] in types:
        line = f"--{key[1].replace('_', '-')} {key[2]}: wanted {in_words(_given(types[key[1]]))}"
    elif truth:
        line = f"{truth[1]} {truth[2]}: wanted true or false"
    elif line.startswith(required):
        missing = line.removeprefix(required).split(", ")
        known = [f"--{name.replace('_', '-')}" for name in missing]
        line = required + ", ".join(n if n in options else m for n, m in zip(known, missing))
    elif of_file in hints:
        line += f" in a file; {hints[of_file]}"
    elif unknown and unknown[1] in hints:
        line += f"; {hints[unknown[1]]}"
    elif unknown:
        near = difflib.get_close_matches(
            unknown[1], {*options} - {"--help", "--print-config"}, n=1, cutoff=0.7
        )
        line += f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{line} (--help lists all options)")


def _given(hint: Any) -> Any:
    """A type without None, which nobody types."""
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    return args[0] if type(None) in typing.get_args(hint) and len(args) == 1 else hint


def parse_settings(
    cls: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    config_flag: str = "--config",
    presets: Path | None = None,
    positional: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
    hints: Mapping[str, str] | None = None,
) -> Settings:
    """Parse `argv` into the frozen dataclass `cls`: a YAML file's values, overridden by options.

    `config_flag FILE` may be given several times, later ones winning; where `presets` names a folder, FILE
    may also be the name of a YAML file in it. Words that belong to no option are the values of `positional`
    in order, the last of which may be a list. `groups` are those of the help text, as `usage.help_text` has
    it, `hints` what to say of options that other programs have. ValueErrors of `cls.__post_init__` become
    UserErrors.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _SettingsParser(prog=prog, allow_abbrev=False, print_config="--print-config")
    known = sorted(p.stem for p in presets.glob("*.yaml")) if presets else []
    parser.types, parser.hints = typing.get_type_hints(cls), hints or {}
    parser.add_argument(config_flag, action="config")
    parser.add_class_arguments(cls)
    takes = "YAML file with any of these options" + (f", or one of: {', '.join(known)}" if known else "")
    parser.help_text = help_text(
        cls, {a.dest: a.help or "" for a in parser._actions}, prog=prog, description=description,
        config=(config_flag, f"{takes}."), positional=positional, groups=groups,
    )  # fmt: skip
    words = _with_presets(_with_names(cls, argv, positional), config_flag, presets, known)
    namespace = parser.parse_args(words)
    values = {f.name: namespace[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _with_names(cls: type, argv: Sequence[str], positional: Sequence[str]) -> list[str]:
    """`--watch DIR` becomes `--watch --dir=DIR` where `dir` is positional."""
    hints = typing.get_type_hints(cls)
    dashed = [f"--{name.replace('_', '-')}" for name, hint in hints.items() if hint is bool]
    bare = {"-h", "--help", "--print-config", *dashed, *(f"--no-{flag[2:]}" for flag in dashed)}
    options: list[str] = []
    words: list[str] = []
    takes_value = False
    for word in argv:
        if takes_value or word.startswith("-") or (options[-1:] and options[-1] in bare and word in TRUTH):
            takes_value = not takes_value and word.startswith("-") and "=" not in word and word not in bare
            options.append(word)
        else:
            words.append(word)
    for name in positional[: len(words)]:
        many = typing.get_origin(hints[name]) is list
        value, words = (json.dumps(words), []) if many else (words[0], words[1:])
        options.append(f"--{name.replace('_', '-')}={value}")
    return options + words


def _with_presets(argv: list[str], flag: str, presets: Path | None, known: list[str]) -> list[str]:
    """Replace the name after `flag` by its path; say what exists when there is no such file."""
    out: list[str] = []
    expect_value = False
    for word in argv:
        name, joined, value = word.partition("=")
        if expect_value or (joined and name == flag):
            value = word if expect_value else value
            path = Path(value)
            if presets and value in known:
                path = presets / f"{value}.yaml"
            if not path.is_file():
                choice = f"; known names: {', '.join(known)}" if known else ""
                raise UserError(f"{flag} {value}: no such file{choice}")
            out.append(str(path) if expect_value else f"{flag}={path}")
            expect_value = False
        else:
            out.append(word)
            expect_value = word == flag
    return out


def settings_as_dict(settings: Any) -> dict[str, Any]:
    """A dataclass as plain JSON / YAML values."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def save_settings(settings: Any, path: str | Path) -> None:
    """Write the settings really used as YAML, so that `--config` of that file repeats the run."""
    write_text(path, yaml.safe_dump(settings_as_dict(settings), sort_keys=False))


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main`, turn what it raises into one clear line and an exit code; answer `--version`."""
    show_all_characters()
    log = logging.StreamHandler()
    log.setFormatter(PlainFormatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.getLogger("timm").setLevel(logging.WARNING)  # it tells of every file it loads
    earlier_hook, threading.excepthook = threading.excepthook, _note_thread_error
    stdout, plain = sys.stdout, Plain(sys.stdout)
    sys.stdout = plain  # type: ignore[assignment]
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        logging.getLogger().setLevel(log_level())
        _check_environment()
        if words == ["--version"]:
            print(f"intl-bench {__version__}")
            return EXIT_OK
        return main(words) or EXIT_OK
    except UserError as error:
        _tell(f"error: {error}")
        return EXIT_USAGE
    except RunFailed as error:
        _tell(f"error: {error}")
        return EXIT_FAILED
    except Stopped as stop:
        _tell(f"{stop}; run the same command again to go on")
        return EXIT_STOPPED
    except KeyboardInterrupt:
        _tell("interrupted; run the same command again to go on")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]
        return EXIT_OK
    except Exception as error:
        reason = worker_failure(error) if isinstance(error, RuntimeError) else None  # told by a signal
        if (path := _bad_path(error)) is not None:
            _tell(f"error: {path}")
            return EXIT_USAGE
        reason = reason or outside_reason(error)
        if reason is None:
            raise
        _tell(f"error: {reason}")
        return EXIT_FAILED
    finally:
        threading.excepthook = earlier_hook
        if sys.stdout is plain:  # type: ignore[comparison-overlap]
            sys.stdout = stdout


def log_level() -> int:
    """LOG_LEVEL of the environment: a name of logging's or a number. Raises UserError."""
    said = os.environ.get("LOG_LEVEL") or "INFO"
    level = logging.getLevelName(said.upper()) if whole_number(said) is None else whole_number(said)
    if not isinstance(level, int):
        raise UserError(f"LOG_LEVEL={said}: wanted DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return level


def _check_environment() -> None:
    """Raises UserError for variables of a launcher that are no numbers, or do not fit each other."""
    counts = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE",
                 "SLURM_RESTART_COUNT", "MASTER_PORT"):  # fmt: skip
        said = os.environ.get(name)
        if said is not None and ((number := whole_number(said)) is None or number > MOST_RANKS):
            raise UserError(f"{name}={said}: wanted a whole number; a launcher (torchrun, SLURM) sets it")
        counts[name] = None if said is None else int(said)
    size, rank = counts["WORLD_SIZE"], counts["RANK"] or 0
    if size == 0 or rank >= (size or 1):
        told = "; unset both where no launcher has set them"
        raise UserError(f"RANK={rank} WORLD_SIZE={size}: wanted a rank below the number of processes{told}")


def _bad_path(error: Exception) -> str | None:
    """What to say of a path that no file system could have; else None."""
    if isinstance(error, OSError) and error.errno in NO_PATH:
        return f"{str(error.filename)[:100]}...: {error.strerror}" if error.filename else error.strerror
    return "a path holds a null byte" if str(error) == "embedded null byte" else None


def _tell(line: str) -> None:
    middle = " [...] " if len(line) > LONGEST_LINE else ""  # what was typed, told again
    line = line[: LONGEST_LINE // 2] + middle + line[-LONGEST_LINE // 2 :] if middle else line
    print(printable(line), file=sys.stderr)


def _note_thread_error(failed: threading.ExceptHookArgs) -> None:
    """One line for what a library's thread met in the outside world (TensorBoard's: a full disk)."""
    if isinstance(failed.exc_value, OSError):
        logger.warning("in the background: %s", failed.exc_value)
    else:
        threading.__excepthook__(failed)
