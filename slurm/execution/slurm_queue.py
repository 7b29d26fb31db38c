"""The states of SLURM jobs by id: RUNNING, PENDING with the reason ...; jobs that have ended have none."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pretrain.common.errors import UserError
from slurm.state.local_process import LocalProcess
from slurm.state.step_files import records


def live_jobs(job_ids: Iterable[str]) -> dict[str, str]:
    """State of each of these SLURM jobs that is queued or running, such as RUNNING, PENDING Priority; array
    elements as 12_3.

    Raises UserError when SLURM does not answer: to take a job for gone would submit it twice.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        raise UserError(
            "jobs of this suite are on SLURM, but there is no squeue here: run this on the cluster"
        )
    listed = _squeue("--jobs", ",".join(sorted({i.partition("_")[0] for i in wanted})))
    if listed is None:  # an id that SLURM has forgotten fails the whole query on some versions: ask for all
        listed = _squeue() or ""
    found = {}
    for line in listed.splitlines():
        job_id, state, reason = [*line.strip().split("|", 2), "", ""][:3]
        if job_id in wanted:
            found[job_id] = f"{state} {reason}" if state == "PENDING" and reason != "None" else state
    return found


def _squeue(*selection: str) -> str | None:
    """What squeue lists; None where it knows one of the ids no more."""
    command = ["squeue", "--noheader", "--array", "--format", "%i|%T|%r", *selection]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "squeue did not answer within a minute: is the cluster up? Nothing was done"
        ) from error
    if done.returncode == 0:
        return done.stdout
    if "Invalid job id" in done.stderr:
        return None
    raise UserError(f"squeue failed, nothing was done: {done.stderr.strip()}")


def live_steps(root: Path) -> dict[str, str]:
    """The suite's steps that are queued or running, on SLURM or on this machine: one question for all."""
    sent = {record.name: record.submitted for record in records(root) if not record.done}
    on_slurm = {n: str(s["job_id"]) for n, s in sent.items() if s.get("cluster") == "slurm" and "job_id" in s}
    states = live_jobs(on_slurm.values())
    found = {name: states[job_id] for name, job_id in on_slurm.items() if job_id in states}
    for name, s in sent.items():
        process = LocalProcess.submitted(s)
        if process is not None and process.is_alive:
            found[name] = "RUNNING"
    return {n: "RUNNING" if s in ("RUNNING", "COMPLETING") else s for n, s in found.items()}
