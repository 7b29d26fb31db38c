"""`python -m slurm COMMAND ...`: calls the command's own module."""

from __future__ import annotations

import sys

from transfer.program import Program

COMMANDS = {
    "suite": ("slurm.commands.suite", "pretrain or take checkpoints, evaluate, report; locally or on SLURM"),
    "status": ("slurm.commands.status", "show the state of every job of a suite"),
    "cancel": ("slurm.commands.cancel", "stop a suite's jobs; the same suite command resumes them"),
    "logs": ("slurm.commands.logs", "print the log of one step"),
    "demo": ("slurm.commands.demo", "the whole suite, small, on this machine"),
}


main = Program(
    name="slurm", description="The benchmark suite as a graph of jobs.", commands=COMMANDS
).main  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
