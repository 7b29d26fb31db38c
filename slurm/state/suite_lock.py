"""The lock of a suite's folder, and the refusal of another suite in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.common.errors import UserError
from slurm.state.step_files import Record, differing, read_json
from slurm.steps.graph import Graph


@contextlib.contextmanager
def locked(root: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold OUT/jobs/lock: one submission, or one run on this machine, at a time. The kernel frees it."""
    folder = root / "jobs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {root} cannot be written: {error}") from error
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"{root} is in use by another suite ({file.read().strip() or 'unknown process'}); "
                        "wait for it, look at it with `python -m slurm status`, "
                        "or stop it with `python -m slurm cancel`"
                    ) from error
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(root: Path) -> int | None:
    """The process that holds the lock on this machine, if one does."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(root / "jobs" / "lock", "r+") as file:
        words = file.read().split()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # else its process was killed, and the number may be another's by now
            if words[3] == os.uname().nodename:
                return int(words[1])
    return None


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
