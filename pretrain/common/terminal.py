"""What is printed shows as it stands, wherever its text came from.

Labels, names and keys come from other people's files: none of them may steer the terminal. Standard output
passes through `Plain`, log lines through `PlainFormatter`, and what rich draws in colours through `console`.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


LEAST_WIDTH = 40


def printable(text: str) -> str:
    """`text` with "?" for every character that steers a terminal or shows nothing."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


class Plain:
    """A text stream that writes printable text alone."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write `text` as `printable` has it; the characters taken."""
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line in turn."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class PlainFormatter(logging.Formatter):
    """Log lines of printable text, tracebacks as well."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for `record`, printable."""
        return printable(super().format(record))


def show_all_characters() -> None:
    """Let standard output and error spell what their encoding lacks (\\u2500), instead of failing on it.

    One that whoever started us has closed leads nowhere: its number must not become that of a file we write.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def width(most: int = 110, *, otherwise: int = 80) -> int:
    """Columns of the terminal (COLUMNS where it is set, `otherwise` where nothing says).

    At least LEAST_WIDTH, for words to fit, and at most `most`.
    """
    return max(LEAST_WIDTH, min(shutil.get_terminal_size((otherwise, 24)).columns, most))


def console(*, stderr: bool = False, **options: Any) -> Console:
    """A rich console whose text is printable and whose colours are rich's own."""
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    file: Any = sys.stderr if stderr else sys.stdout
    return PlainConsole(file=file.stream if isinstance(file, Plain) else file, **options)
