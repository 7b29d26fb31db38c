"""This project's commands in forked children: as `python -m` runs them, but PyTorch is imported already."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

PROGRAMS = ("pretrain", "transfer", "slurm")
MODULES = {"transfer.train_net"}
"""Further modules to run: each has a `main(argv) -> exit code`."""


def program_of(argv: Sequence[str]) -> tuple[str, list[str]] | None:
    """The module that a command line runs and its words; None where it is no command of this project."""
    first, *words = argv
    name = Path(first).name
    if name.removeprefix("intl-") in PROGRAMS and name.startswith("intl-"):
        return name.removeprefix("intl-"), words
    if name.startswith("python") and words[:1] == ["-m"] and {*PROGRAMS, *MODULES} & {*words[1:2]}:
        return words[1], words[2:]
    return None


class Forked:
    """A child that runs a command, with subprocess.Popen's words."""

    def __init__(
        self, program: str, words: Sequence[str], cwd: Path | None, env: Mapping[str, str] | None
    ) -> None:
        self.args = [program, *words]
        self.returncode: int | None = None
        self._said = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        module = importlib.import_module(f"{program}.__main__" if program in PROGRAMS else program)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(module.main, program, list(words), cwd, dict(os.environ if env is None else env), self._said)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        """SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it said on standard output and error, once it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        for file in self._said:
            file.seek(0)
        out, err = (file.read() for file in self._said)
        return out, err


Child = Forked | subprocess.Popen[str]


def _run(
    main: Callable[[list[str]], int], program: str, words: list[str], cwd: Path | None, env: dict[str, str],
    said: list[IO[str]],
) -> None:  # fmt: skip
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number, file in enumerate(said, start=1):
            os.dup2(file.fileno(), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", buffering=1) for n in (1, 2))
        logging.root.handlers.clear()  # pytest's; the command sets its own
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd or os.getcwd())
        sys.argv = [program, *words]
        code = main(words) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)


def start(argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Child:
    """Start a command line; it is forked where it is this project's."""
    found = program_of(argv)
    if found is not None:
        return Forked(*found, cwd, env)
    return subprocess.Popen(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_command(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait for its end."""
    child = start(argv, cwd=cwd, env=env)
    out, err = child.communicate(timeout=600)
    return subprocess.CompletedProcess(list(argv), int(child.returncode or 0), out, err)
