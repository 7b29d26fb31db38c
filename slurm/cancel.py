"""A suite's folder enters; its jobs are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass

from pretrain.cli import UserError, parse_settings
from slurm.folder import holder
from slurm.local import end_jobs
from slurm.queue import live_steps
from slurm.record import Record
from slurm.status import suite_folder


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
    live = live_steps(root)
    sent = {name: Record(root, name).submitted for name in live}
    on_slurm = [s["job_id"] for s in sent.values() if s["cluster"] == "slurm"]
    here = [str(s["job_id"]) for s in sent.values() if s["cluster"] == "local"]
    for name in live:  # what was queued has no process to say so
        Record(root, name).set_state("stopped", ended_at=time.time())
    if on_slurm:
        done = subprocess.run(["scancel", *on_slurm], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise UserError(f"scancel failed: {done.stderr.strip()}")
    driver = holder(root)
    if driver is not None:  # a run on this machine stops its own jobs, and starts no further ones
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver, signal.SIGTERM)
    end_jobs(here)
    print(f"cancelled: {', '.join(live)}" if live else "nothing was queued or running")
    return None
