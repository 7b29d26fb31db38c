"""The lock of a suite's folder, and the refusal of another suite in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pretrain.common.errors import UserError
from pretrain.common.locks import holder as lock_holder
from pretrain.common.output_folder import LOCK, FolderInUse, need_space, output_folder
from slurm.state.step_files import Record, differing, read_json
from slurm.steps.graph import Graph

SPACE_BYTES = 10**8
WRITES = ("jobs", "config.yaml")


@contextlib.contextmanager
def locked(root: Path, wait_s: float = 0.0, *, command: str = "slurm suite") -> Iterator[None]:
    """Hold the suite's folder: one submission, or one run on this machine, at a time."""
    try:
        with output_folder(root, command, writes=WRITES, earlier=is_suite, wait_s=wait_s):
            need_space(root, SPACE_BYTES, "the code that jobs run, and their logs")
            yield
    except FolderInUse as error:
        raise UserError(
            f"{error}; look at it with `python -m slurm status`, or stop it with `python -m slurm cancel`"
        ) from None


def is_suite(root: Path) -> bool:
    """Whether a folder without a marker is that of an earlier suite."""
    return any(root.glob("jobs/*/step.json")) or (root / "jobs" / "lock").exists()


def holder(root: Path) -> int | None:
    """The process that holds the lock on this machine, if one does."""
    by = lock_holder(root / LOCK)
    return by.pid if by is not None and by.is_here else None


def refuse_other_configuration(root: Path, graph: Graph, redo: set[str]) -> None:
    """A step that was submitted here with another command is never overwritten by chance."""
    lines = [line for line in differing(root, graph) if line.partition(":")[0] not in redo]
    if lines:
        shown = "\n  ".join(lines[:6])
        raise UserError(
            f"{root} holds a suite with another configuration:\n  {shown}\n"
            "take another --output, the earlier settings, or --force the steps to compute again"
        )


def set_aside(root: Path, graph: Graph, names: set[str]) -> None:
    """Move the outputs of steps to compute again out of the way."""
    for name in names:
        if read_json(Record(root, name).folder / "step.json"):
            Record(root, name).set_aside()
