"""A graph submitted to SLURM: jobs with dependencies, arrays where steps are alike.

Everything is submitted at once: SLURM forgets old jobs and takes a dependency on a forgotten one for
satisfied, so each job also checks at its start that what it needs is done.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from pretrain.common.errors import UserError
from slurm.execution.launch import job_of, log_folder, python_command
from slurm.execution.sbatch_header import slurm_executor
from slurm.execution.slurm_queue import live_steps
from slurm.state.step_files import Record
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Steps that go to SLURM in one submission: one job, or an array."""

    steps: tuple[Step, ...]
    depends_on: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The kind of its steps, which all are of one: it names the resources."""
        return self.steps[0].kind

    @property
    def title(self) -> str:
        """The job's name: the step's, or the folder that an array's steps share, in characters that mean
        nothing to SLURM.
        """
        names = [re.sub(r"[^\w./+=-]", "_", s.name) for s in self.steps]
        if len(names) == 1:
            return names[0]
        shared = [a for a, *others in zip(*(n.split("/") for n in names)) if all(a == o for o in others)]
        return "/".join(shared) or self.kind


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a submission would do."""

    batches: list[Batch]
    done: list[str]
    live: dict[str, str]
    superseded: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of jobs, each element of an array counted."""
        return sum(len(b.steps) for b in self.batches)


def plan(graph: Graph, root: Path, redo: set[str]) -> Submission:
    """Which steps are done, which SLURM has already, and how the others go together.

    Steps of one kind that wait for the same steps become one array. A report that still waits is replaced,
    because there is something new to wait for.
    """
    live = {n: s for n, s in live_steps(root).items() if n in graph.steps}
    busy = sorted(redo & set(live))
    if busy:
        raise UserError(
            f"--force: {', '.join(busy)} is queued or running; `python -m slurm cancel {root}` first"
        )
    todo: list[Step] = []
    done: list[str] = []
    superseded: list[str] = []
    fresh: set[str] = set()
    for step in graph:
        is_done = Record(root, step.name).is_done(graph.keys[step.name], step.makes) and step.name not in redo
        if step.after:
            if fresh.intersection(step.after) or (not is_done and step.name not in live):
                superseded += [step.name] if step.name in live else []
                todo.append(step)
            elif is_done:
                done.append(step.name)
        elif step.name in live:
            pass
        elif is_done:
            done.append(step.name)
        else:
            todo.append(step)
            fresh.add(step.name)
    groups: dict[tuple, list[Step]] = {}
    for step in todo:
        groups.setdefault((step.kind, step.depends_on, step.after), []).append(step)
    batches = [Batch(steps=tuple(s), depends_on=n, after=a) for (_, n, a), s in groups.items()]
    return Submission(batches=batches, done=done, live=live, superseded=superseded)


def in_order(batches: list[Batch]) -> list[Batch]:
    """Batches so that each comes after those it waits for."""
    left, ordered = list(batches), []
    while left:
        waiting = {s.name for b in left for s in b.steps}
        ready = [b for b in left if not waiting.intersection((*b.depends_on, *b.after))]
        assert ready, "the graph has no cycle, so its batches have none"
        ordered += ready
        left = [b for b in left if b not in ready]
    return ordered


def dependency(batch: Batch, ids: dict[str, str]) -> str | None:
    """sbatch's --dependency: afterok for what is needed, afterany for what is only waited for."""
    ok = [ids[n] for n in batch.depends_on if n in ids]
    any_end = [ids[n] for n in batch.after if n in ids]
    parts = [f"afterok:{':'.join(ok)}"] if ok else []
    parts += [f"afterany:{':'.join(any_end)}"] if any_end else []
    return ",".join(parts) or None


def prepared(
    batch: Batch,
    resources: dict[str, Resources],
    code: Path,
    logs: Path,
    depends_on: str | None,
    *,
    dry: bool = False,
) -> submitit.Executor:
    """The executor that a batch is submitted with, or that writes its submission file alone."""
    asked = resources[batch.kind]
    if asked.cpus_per_task == "all":
        raise UserError(f"{batch.kind}: cpus_per_task is `all`; on SLURM a number is wanted")
    python = python_command(code, asked.cpus_per_task)
    return slurm_executor(batch.title, asked, python=python, logs=logs, dependency=depends_on, dry=dry)


def sbatch_text(batch: Batch, resources: dict[str, Resources], code: Path, root: Path) -> str:
    """The submission file of a batch, with the names of what it waits for in place of job ids.

    It needs no SLURM on this machine.
    """
    names = {n: f"<{n}>" for n in (*batch.depends_on, *batch.after)}
    logs = root / "jobs" / "logs" / "SUBMISSION"
    queue: Any = prepared(batch, resources, code, logs, dependency(batch, names), dry=True)
    if len(batch.steps) > 1:
        queue.parameters["map_count"] = len(batch.steps)
    # No public way to the text; submitit's own tests go this way.
    return queue._make_submission_file_text(queue._submitit_command_str, "dry")


def submit(
    graph: Graph, planned: Submission, root: Path, resources: dict[str, Resources], code: Path
) -> dict[str, str]:
    """Submit the batches; returns the job id of every step submitted. Hold the folder's lock."""
    ids = {name: str(Record(root, name).submitted["job_id"]) for name in planned.live}
    sent: dict[str, str] = {}
    order = {name: i for i, name in enumerate(graph.steps)}
    for batch in in_order(planned.batches):
        logs = log_folder(root)
        queue = prepared(batch, resources, code, logs, dependency(batch, ids))
        for step in batch.steps:
            Record(root, step.name).submit(
                step, graph.keys[step.name], order[step.name], cluster="slurm", code=str(code)
            )
        callables = [job_of(s, graph, root, resources[s.kind]) for s in batch.steps]
        try:
            jobs = queue.submit_array(callables) if len(callables) > 1 else [queue.submit(callables[0])]
        except FailedJobError as error:
            raise UserError(
                f"sbatch refused {batch.title}: {' '.join(str(error).split())}; submitted before: "
                f"{', '.join(sent) or 'nothing'}. Mend the profile, or wait for jobs "
                "to end, and run again: only the rest is submitted"
            ) from error
        for step, job in zip(batch.steps, jobs):
            Record(root, step.name).submitted_as(job.job_id, logs)
            ids[step.name] = sent[step.name] = job.job_id
    return sent
