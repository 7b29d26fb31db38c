"""`slurm cancel`: stop a suite's jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from slurm.commands.status import suite_folder
from slurm.execution.local import end_jobs
from slurm.execution.slurm_queue import live_steps
from slurm.state.local_process import LocalProcess
from slurm.state.step_files import Record, records, stop_waiting
from slurm.state.step_state import RUNNING, look
from slurm.state.suite_lock import holder


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Settings of `python -m slurm cancel`."""

    dir: str
    """The suite's output folder."""


def main(argv: list[str]) -> int | None:
    """Stop what is queued or running; what is saved stays, and submitting again goes on."""
    asked = parse_settings(
        Cancel, argv, prog="python -m slurm cancel", positional=["dir"],
        description="Stop a suite's jobs. What they saved is kept; the same suite command goes on.",
    )  # fmt: skip
    root = suite_folder(asked.dir)
    driver = holder(root)
    elsewhere = sorted({p.host for p in _elsewhere(root)})
    live = live_steps(root)
    if driver is not None:  # a run on this machine stops its own jobs, and starts no further ones
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver, signal.SIGTERM)
        live |= live_steps(root)  # with what it had started meanwhile
    going = _not_done(root, live)  # a step's process outlives its last word by moments
    sent = {name: Record(root, name).submitted for name in going}
    on_slurm = [s["job_id"] for s in sent.values() if s["cluster"] == "slurm"]
    here = [p for p in map(LocalProcess.submitted, sent.values()) if p is not None]
    for name in going:  # what was queued has no process to say so
        Record(root, name).set_state("stopped", ended_at=time.time())
    if on_slurm:
        done = subprocess.run(["scancel", *on_slurm], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise UserError(f"scancel failed: {done.stderr.strip()}")
    end_jobs(here)
    stop_waiting(root)
    stopped = _not_done(root, going)
    finished = [name for name in going if name not in stopped]
    if stopped:
        print(f"cancelled: {', '.join(stopped)}")
    if finished:
        print(f"done before it could be cancelled: {', '.join(finished)}")
    if elsewhere:
        print(f"left running on {', '.join(elsewhere)}: cancel there as well")
    elif not going:
        print("nothing was queued or running")
    if driver is not None:
        print(f"process {driver}, which ran the suite here, starts no further step")
    return None


def _elsewhere(root: Path) -> Iterator[LocalProcess]:
    """What runs on other machines that share the folder, as far as its files say."""
    for record in records(root):
        process = LocalProcess.submitted(record.submitted)
        if process and process.host and not process.is_here and look(record, None).state == RUNNING:
            yield process


def _not_done(root: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not Record(root, name).done]
