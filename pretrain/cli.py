"""argv enters; frozen settings, progress and an exit code leave: the look and feel of every command."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import sys
import threading
import time
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings

from pretrain.files import write_json, write_text
from pretrain.signals import Stopped
from pretrain.usage import EXIT_CODES, Formatter, help_text

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # stopped by a signal, everything saved; the same command goes on (EX_TEMPFAIL of sysexits)
EXIT_INTERRUPTED = 130

TRUTH = ("true", "false", "yes", "no")

Settings = TypeVar("Settings")


class UserError(ValueError):
    """A mistake the user can mend: the message says what we got, what we wanted and what to do."""


class RunFailed(RuntimeError):
    """A run that cannot go on for a reason that its message gives in full: exit code 1, no traceback."""


class Parser(argparse.ArgumentParser):
    """argparse with this project's help, and one line for a mistake."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, epilog=EXIT_CODES, formatter_class=Formatter,
            allow_abbrev=False, add_help=False,
        )  # fmt: skip
        self.add_argument("-h", "--help", action="help", help="Print this text.")

    def error(self, message: str) -> NoReturn:
        raise _mistake(message, self._option_string_actions)


class _SettingsParser(ArgumentParser):
    """jsonargparse with options spelt the usual way: --data-dir (for data_dir), --dry-run, --no-verify."""

    help_text = ""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("type") is bool:
            del kwargs["type"]
            kwargs |= {"action": ActionYesNo(yes_prefix="", no_prefix="no-"), "nargs": "?"}
        dashed = [a.replace("_", "-") if isinstance(a, str) and a.startswith("--") else a for a in args]
        return super().add_argument(*dashed, **kwargs)

    def format_help(self, *_: Any) -> str:
        return self.help_text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        raise _mistake(message, self._option_string_actions) from ex


def _mistake(message: str, options: Collection[str]) -> UserError:
    """One line in the user's words instead of the parser's several."""
    line = " ".join(message.split()).replace("<class 'int'>", "whole number")
    line = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda m: "one of " + m[1].replace("'", ""), line)
    line = line.replace("Expected a one of", "Expected one of")
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
    line = re.sub(r'Parser key "([\w.]+)":', lambda m: f"--{m[1].replace('_', '-')}:", line)
    required = "the following arguments are required: "
    if line.startswith(required):
        missing = line.removeprefix(required).split(", ")
        known = [f"--{name.replace('_', '-')}" for name in missing]
        line = required + ", ".join(n if n in options else m for n, m in zip(known, missing))
    unknown = re.match(r"unrecognized arguments: (--[\w-]+)", line, re.IGNORECASE)
    near = difflib.get_close_matches(unknown[1], options, n=1) if unknown else []
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{line}{hint} (--help lists all options)")


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
) -> Settings:
    """Parse `argv` into the frozen dataclass `cls`: a YAML file's values, overridden by options.

    `config_flag FILE` may be given several times, later ones winning; where `presets` names a folder, FILE
    may also be the name of a YAML file in it. Words that belong to no option are the values of `positional`
    in order, the last of which may be a list. `groups` are those of the help text, as `usage.help_text` has
    it. ValueErrors of `cls.__post_init__` become UserErrors.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _SettingsParser(prog=prog, allow_abbrev=False)
    known = sorted(p.stem for p in presets.glob("*.yaml")) if presets else []
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
    """Call `main` and turn what it raises into one clear line and an exit code."""
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "INFO"),
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("timm").setLevel(logging.WARNING)  # it tells of every file it loads
    earlier_hook, threading.excepthook = threading.excepthook, _note_thread_error
    try:
        return main(list(sys.argv[1:] if argv is None else argv)) or EXIT_OK
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as stop:
        print(f"{stop}; run the same command again to go on", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]
        return EXIT_OK
    finally:
        threading.excepthook = earlier_hook


def _note_thread_error(failed: threading.ExceptHookArgs) -> None:
    """One line for what a library's thread met in the outside world (TensorBoard's: a full disk)."""
    if isinstance(failed.exc_value, OSError):
        logger.warning("in the background: %s", failed.exc_value)
    else:
        threading.__excepthook__(failed)


class Progress:
    """A progress bar on a terminal, a line now and then in a log, and a small JSON file for other processes.

    The file (`progress.json`: label, done, total, unit, per_second, eta_s, values) is what `python -m slurm
    status` reads. Only rank 0 shows and writes.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str,
        unit: str = "step",
        start: int = 0,
        file: str | Path | None = None,
        every_s: float = 10.0,
    ) -> None:
        self.total, self.label, self.unit, self.done, self.file = total, label, unit, start, file
        self._start, self._began = start, time.monotonic()
        self._every_s, self._shown, self._written = every_s, self._began, 0.0
        self._main = int(os.environ.get("RANK", 0)) == 0
        self._values: dict[str, float | str] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._main and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def update(self, count: int = 1, **values: float | str) -> None:
        """Count `count` more units done; `values` (loss, images/s …) are shown beside the bar until others of
        the same names come."""
        self.done += count
        self._values |= values
        values = self._values
        if not self._main:
            return
        now = time.monotonic()
        last = self.done >= self.total
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=_spell(values))
        elif now - self._shown >= self._every_s or (last and now - self._began > 2):
            self._shown = now
            left = "" if last else f", {_duration(self.eta_s(now))} left"
            line = f"{self.label}: {self.done}/{self.total} {self.unit}s {_spell(values)}".rstrip()
            print(line + left, file=sys.stderr, flush=True)
        if self.file and (now - self._written >= 1 or last):
            self._written = now
            write_json(self.file, {
                "label": self.label, "done": self.done, "total": self.total, "unit": self.unit,
                "per_second": (self.done - self._start) / max(now - self._began, 1e-9),
                "eta_s": self.eta_s(now), "values": values,
            })  # fmt: skip

    def eta_s(self, now: float) -> float:
        """Seconds left at the mean rate so far."""
        gone = self.done - self._start
        return (self.total - self.done) * (now - self._began) / gone if gone > 0 else 0.0

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _spell(values: dict[str, float | str]) -> str:
    return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {seconds % 60:02d} s"
        if minutes
        else f"{seconds} s"
    )
