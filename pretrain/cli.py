"""argv enters; frozen settings, progress and an exit code leave: the look and feel of every command."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings

from pretrain.files import write_json, write_text
from pretrain.signals import Stopped

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # stopped by a signal, everything saved; the same command goes on (EX_TEMPFAIL of sysexits)
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "exit codes: 0 done; 1 failed; 2 wrong input, nothing started; "
    "75 stopped by SIGTERM or SIGUSR2 with everything saved, run it again to go on; 130 interrupted"
)

Settings = TypeVar("Settings")


class UserError(ValueError):
    """A mistake the user can mend: the message says what we got, what we wanted and what to do."""


class RunFailed(RuntimeError):
    """A run that cannot go on for a reason that its message gives in full: exit code 1, no traceback."""


class _Parser(ArgumentParser):
    """jsonargparse with options spelt the usual way: --data-dir (for data_dir), --dry-run, --no-verify."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("type") is bool:
            del kwargs["type"]
            kwargs |= {"action": ActionYesNo(yes_prefix="", no_prefix="no-"), "nargs": "?"}
        dashed = [a.replace("_", "-") if isinstance(a, str) and a.startswith("--") else a for a in args]
        return super().add_argument(*dashed, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """One line instead of the usage and several."""
        line = " ".join(message.split()).replace("<class 'int'>", "whole number")
        line = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda m: "one of " + m[1].replace("'", ""), line)
        line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
        line = re.sub(r'Parser key "([\w.]+)":', lambda m: f"--{m[1].replace('_', '-')}:", line)
        required = "the following arguments are required: "
        if line.startswith(required):
            options = line.removeprefix(required).split(", ")
            line = required + ", ".join(f"--{o.replace('_', '-')}" for o in options)
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", line, re.IGNORECASE)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{line}{hint} (--help lists all options)") from ex


def parse_settings(
    cls: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    config_flag: str = "--config",
    presets: Path | None = None,
) -> Settings:
    """Parse `argv` into the frozen dataclass `cls`: a YAML file's values, overridden by options.

    `config_flag FILE` may be given several times, later ones winning; where `presets` names a folder, FILE
    may also be the name of a YAML file in it. ValueErrors of `cls.__post_init__` become UserErrors.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=prog, description=description, epilog=EXIT_CODES, allow_abbrev=False)
    known = sorted(p.stem for p in presets.glob("*.yaml")) if presets else []
    parser.add_argument(
        config_flag,
        action="config",
        help="YAML file with any of the options below"
        + (f", or one of: {', '.join(known)}" if known else ""),
    )
    parser.add_class_arguments(cls)
    namespace = parser.parse_args(_with_presets(list(argv), config_flag, presets, known))
    values = {f.name: namespace[f.name] for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


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
        """Count `count` more units done; `values` (loss, images/s …) are shown beside the bar."""
        self.done += count
        if not self._main:
            return
        now = time.monotonic()
        last = self.done >= self.total
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=_spell(values))
        elif now - self._shown >= self._every_s or (last and now - self._began > 2):
            self._shown = now
            left = "" if last else f", {_duration(self.eta_s(now))} left"
            print(
                f"{self.label}: {self.done}/{self.total} {self.unit}s {_spell(values)}{left}",
                file=sys.stderr,
                flush=True,
            )
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
