"""Nothing that a stranger wrote steers the terminal, and no terminal is too poor for what is printed."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys

import pytest

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from pretrain.common.help_formatter import wrapped
from pretrain.common.terminal import PlainFormatter, console, printable, width

NASTY = "a\x1b]0;owned\x07\x9b2J\rb\u202ec\x08\x7f\u200b"


def test_every_way_out_is_plain(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str]) -> None:
        from rich.table import Table

        print(NASTY)
        sys.stdout.writelines([NASTY, "\n"])
        table = Table(NASTY)
        table.add_row(NASTY)
        console(force_terminal=True, width=80).print(table, style="red")
        raise UserError(NASTY)

    assert run(command, []) == 2
    out, err = capsys.readouterr()
    assert "\x1b[31m" in out  # rich's own colours
    left = {c for c in out.replace("\x1b[", "") + err if not (c.isprintable() or c == "\n")}
    assert left == set() and "]0;owned" in out and "error: a?]0;owned" in err
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s", (NASTY,), None)
    assert PlainFormatter("%(message)s").format(record).isprintable()
    assert printable("é ─▶ λ\n\tλ") == "é ─▶ λ\n\tλ"


@pytest.mark.parametrize("argv", ["transfer formats", "slurm suite --help", "pretrain --help"])
def test_a_terminal_of_ascii_shows_all(argv: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", *argv.split()], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and len(done.stdout) > 500


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str]) -> None:
        assert not sys.stdout.isatty()
        print("x")
        raise UserError("y")

    monkeypatch.setattr(sys, closed, None)
    assert run(command, []) == 2


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run(lambda argv: print("x"), []) == 0


@pytest.mark.parametrize(
    ("columns", "wide"), [("1", 40), ("0", 80), ("-5", 80), ("x", 80), ("90", 90), ("100000", 110)]
)
def test_the_width_is_one_that_words_fit_in(columns: str, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())  # no terminal, whose own width would count
    assert width() == wide
    assert wrapped("many words " * 20) and max(map(len, wrapped("many words " * 20).split("\n"))) < wide
