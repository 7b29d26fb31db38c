"""The state of a step in one word, with details for the table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.common.progress import counted
from slurm.state.local_process import LocalProcess
from slurm.state.step_files import Record, records

DONE, RUNNING, QUEUED, FAILED, CANCELLED, WAITING = (
    "done",
    "running",
    "queued",
    "failed",
    "cancelled",
    "waiting",
)


@dataclass(frozen=True, kw_only=True)
class View:
    """One line of the table."""

    name: str
    state: str
    detail: str = ""
    seconds: float | None = None
    job_id: str = ""
    log: Path | None = None


def look(record: Record, live: str | None) -> View:
    """What to tell about a step; `live`: RUNNING or PENDING Resources by the machine or SLURM, or None."""
    now = time.time()
    sent, state, done, failure = record.submitted, record.state, record.done, record.failure
    job_id = str(sent.get("job_id", ""))
    logs = record.logs(int(failure.get("rank", 0)))
    log = logs[1] if logs else None
    started = state.get("started_at")

    def view(word: str, detail: str = "", seconds: float | None = None) -> View:
        return View(name=record.name, state=word, detail=detail, seconds=seconds, job_id=job_id, log=log)

    if done:
        return view(DONE, record.number, done.get("seconds"))
    here = live == "RUNNING" and state.get("state") == "running"
    again = _times(max(0, state.get("starts", 0) - here))
    if here:
        told = ", ".join(x for x in (_progress(record.progress), again) if x)
        return view(RUNNING, told or "starting", now - started if started else None)
    if live == "RUNNING":
        return view(RUNNING, again or "starting")
    if live is not None:
        word, _, reason = live.partition(" ")
        why = (again, reason, "" if word == "PENDING" else word.lower())
        return view(QUEUED, ", ".join(filter(None, why)))
    ended = state.get("ended_at") or failure.get("at") or now
    seconds = ended - started if started else None
    if state.get("state") == "skipped":
        return view(CANCELLED, f"never started: it needs {', '.join(state['lacks'])}")
    if failure and state.get("state") != "stopped":
        return view(FAILED, failure["error"], seconds)
    process = LocalProcess.submitted(sent)
    if state.get("state") == "running" and process is not None and process.host and not process.is_here:
        detail = ", ".join(x for x in (f"on {process.host}", _progress(record.progress)) if x)
        return view(RUNNING, detail, now - started if started else None)
    if state.get("state") == "running":
        return view(FAILED, "ended without a message: killed, out of memory, or machine down", seconds)
    if state.get("starts"):
        return view(CANCELLED, "goes on when submitted again", seconds)
    if state or sent.get("job_id"):
        lacking = [n for n in record.step.get("depends_on", []) if not Record(record.root, n).done]
        return view(
            CANCELLED, f"never started: it needs {', '.join(lacking)}" if lacking else "before it started"
        )
    return view(WAITING)


def _times(count: int) -> str:
    return "" if count <= 0 else f"interrupted {counted(count, 'time')}"


def _progress(values: Mapping) -> str:
    if not values.get("total"):
        return ""
    told = f"{values.get('done', 0)}/{counted(values['total'], values.get('unit', 'step'))}"
    for name, value in list(values.get("values", {}).items())[:2]:
        told += f", {name} {value:.3g}" if isinstance(value, float) else f", {name} {value}"
    left = values.get("eta_s")
    return told + (
        f", {spell_seconds(left)} left" if left and values.get("done", 0) < values["total"] else ""
    )


def spell_seconds(seconds: float) -> str:
    """12 s, 3:04, 2:03:04."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes.lstrip("0").rjust(4, "0")


def all_views(root: Path, live: Mapping[str, str]) -> list[View]:
    """Every step ever submitted in this folder."""
    return [look(record, live.get(record.name)) for record in records(root)]
