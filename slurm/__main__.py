"""`python -m slurm COMMAND ...`: calls the command's own module."""

from __future__ import annotations

import difflib
import importlib
import sys

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from pretrain.common.help_formatter import EXIT_CODES, wrapped

# command: (module with `main(argv)`, one line of help). Modules are imported only when they are called.
COMMANDS = {
    "suite": ("slurm.commands.suite", "pretrain or take weights, judge, report: on SLURM or here"),
    "status": ("slurm.commands.status", "how every job of a suite stands"),
    "cancel": ("slurm.commands.cancel", "stop a suite's jobs; submit again to go on"),
    "logs": ("slurm.commands.logs", "print the log of one step"),
    "demo": ("slurm.commands.demo", "the whole suite, small, on this machine"),
}


def usage() -> str:
    """The commands with one line of help each."""
    lines = [f"  {name:6s}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([
        "usage: python -m slurm COMMAND [options]", "",
        "The benchmark suite as a graph of jobs. COMMAND --help lists its options.", "",
        "commands:", *lines, "", wrapped(EXIT_CODES),
    ])  # fmt: skip


def dispatch(argv: list[str]) -> int | None:
    """Run the command named by the first word."""
    if not argv:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{name!r} is no command of slurm: {', '.join(COMMANDS)}{hint}")
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def main(argv: list[str] | None = None) -> int:
    """The console script: exit code 0, 1, 2, 75 or 130."""
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
