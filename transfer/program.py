"""A program of several commands, each with a module of its own that is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from pretrain.common.help_formatter import EXIT_CODES, wrapped

Commands = Mapping[str, tuple[str, str]]
"""Command: (module with `main(argv)`, one line of help)."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """`python -m NAME COMMAND ...`."""

    name: str
    description: str
    commands: Commands
    before: Callable[[str, list[str]], object] | None = None
    """Called before the module is imported: what answers --help and a wrong option at once."""

    def usage(self) -> str:
        """The commands with one line of help each."""
        width = max(map(len, self.commands)) + 2
        lines = [f"  {name:{width}s}{text}" for name, (_, text) in self.commands.items()]
        return "\n".join([
            f"usage: python -m {self.name} COMMAND [options]", "",
            wrapped(f"{self.description} COMMAND --help lists its options."), "",
            "commands:", *lines, "", wrapped(EXIT_CODES),
        ])  # fmt: skip

    def dispatch(self, argv: list[str]) -> int | None:
        """Run the command that the first word names. Raises UserError for an unknown one."""
        if not argv:
            print(self.usage(), file=sys.stderr)
            return 2
        name, *rest = argv
        if name in ("-h", "--help", "help"):
            print(self.usage())
            return 0
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(self.commands)
            raise UserError(f"{self.name} has no command {name!r}{hint} (commands: {known})")
        if self.before is not None:
            self.before(name, rest)
        return importlib.import_module(self.commands[name][0]).main(rest)

    def main(self, argv: list[str] | None = None) -> int:
        """The console script: exit code 0, 1, 2, 75 or 130."""
        return run(self.dispatch, argv)
