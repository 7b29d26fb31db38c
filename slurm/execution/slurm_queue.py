"""What SLURM says about job ids: PENDING, RUNNING ... or nothing for what is over."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pretrain.common.errors import UserError
from slurm.execution.local import is_alive
from slurm.state.step_files import records


def live_jobs(job_ids: Iterable[str]) -> dict[str, str]:
    """State of each of these SLURM jobs that is queued or running; array elements as 12_3.

    Raises UserError when SLURM does not answer: to take a job for gone would submit it twice.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        raise UserError(
            "jobs of this suite are on SLURM, but there is no squeue here: call this on the cluster"
        )
    whole = sorted({i.partition("_")[0] for i in wanted})
    told = _squeue(whole)
    if told is None:  # an id that SLURM has forgotten fails the whole query on some versions
        told = "".join(_squeue([i]) or "" for i in whole)
    found = {}
    for line in told.splitlines():
        job_id, _, state = line.strip().partition("|")
        if job_id in wanted:
            found[job_id] = state
    return found


def _squeue(ids: list[str]) -> str | None:
    command = ["squeue", "--noheader", "--array", "--jobs", ",".join(ids), "--format", "%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "squeue did not answer within a minute: is the cluster up? Nothing was done"
        ) from error
    if done.returncode == 0:
        return done.stdout
    if "Invalid job id" in done.stderr:
        return None if len(ids) > 1 else ""
    raise UserError(f"squeue failed, nothing was done: {done.stderr.strip()}")


def live_steps(root: Path) -> dict[str, str]:
    """The suite's steps that are queued or running, on SLURM or on this machine."""
    sent = {record.name: record.submitted for record in records(root)}
    on_slurm = {n: str(s["job_id"]) for n, s in sent.items() if s.get("cluster") == "slurm" and "job_id" in s}
    states = live_jobs(on_slurm.values())
    found = {name: states[job_id] for name, job_id in on_slurm.items() if job_id in states}
    for name, s in sent.items():
        if s.get("cluster") == "local" and is_alive(str(s.get("job_id", ""))):
            found[name] = "RUNNING"
    return {n: "RUNNING" if s in ("RUNNING", "COMPLETING") else s for n, s in found.items()}
