"""The files of one step in the suite's folder: command, submission, state, failures, result.

OUT/jobs/<step>/step.json       the command and its key, there from the start
OUT/jobs/<step>/submitted.json  where and under which id it was handed in last
OUT/jobs/<step>/state.json      written by the job itself: started, requeued, stopped
OUT/jobs/<step>/failure-*.json  the first error of an attempt, with its traceback
OUT/jobs/<step>/done.json       the key it was done with
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.common.files import read_json, read_jsonl, remove_leftovers, write_json
from slurm.steps.graph import Graph, Step


class Record:
    """The files of one step in the suite's output folder."""

    def __init__(self, root: str | Path, name: str) -> None:
        self.root, self.name = Path(root), name
        self.folder = self.root / "jobs" / name.replace("/", ".")

    # what is there

    @property
    def step(self) -> dict[str, Any]:
        """step.json: the command and its key; empty where there is none."""
        return read_json(self.folder / "step.json")

    @property
    def submitted(self) -> dict[str, Any]:
        """submitted.json: cluster, job id, logs; empty before the first submission."""
        return read_json(self.folder / "submitted.json")

    @property
    def state(self) -> dict[str, Any]:
        """state.json, which the job itself writes; empty before it starts."""
        return read_json(self.folder / "state.json")

    @property
    def done(self) -> dict[str, Any]:
        """done.json: the key, when, seconds; empty until the step has succeeded."""
        return read_json(self.folder / "done.json")

    @property
    def failure(self) -> dict[str, Any]:
        """The first error of the latest attempt, or an empty dict."""
        files = sorted(self.folder.glob("failure-*.json"), key=lambda p: p.stat().st_mtime)
        return read_json(files[-1]) if files else {}

    def is_done(self, key: str, makes: tuple[Path, ...] = ()) -> bool:
        """Whether this very command finished and what it made is still there."""
        return self.done.get("key") == key and all(p.exists() for p in makes)

    @property
    def progress(self) -> dict[str, Any]:
        """The command's own progress.json, when it belongs to the present attempt."""
        path = Path(self.step.get("output", self.folder)) / "progress.json"
        started = self.state.get("started_at", 0.0)
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= started - 1:
                return read_json(path)
        return {}

    @property
    def number(self) -> str:
        """The result to show: first metrics of each line of its results.jsonl."""
        told: dict[str, str] = {}
        for line in read_jsonl(Path(self.step.get("output", self.folder)) / "results.jsonl"):
            for metric, value in list(line.get("metrics", {}).items())[:1]:
                if isinstance(value, (int, float)):  # the first line of a task is its main one, as in reports
                    told.setdefault(f"{line.get('task', '')} {metric}", f"{value:.2f}")
        return ", ".join(f"{name} {value}" for name, value in told.items())

    # what is written

    def describe(self, step: Step, key: str, order: int) -> None:
        """Write the command down: what is to come is seen before it is submitted."""
        write_json(self.folder / "step.json", {
            "name": step.name, "kind": step.kind, "command": step.command, "argv": list(step.argv),
            "key": key, "depends_on": list(step.depends_on),
            "after": list(step.after), "output": str(step.output), "order": order,
        })  # fmt: skip

    def submit(self, step: Step, key: str, order: int, **values: Any) -> None:
        """Before a submission: forget how the last one went, write the command down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (
            *self.folder.glob("failure-*.json"),
            self.folder / "state.json",
            self.folder / "done.json",
        ):
            path.unlink(missing_ok=True)
        self.describe(step, key, order)
        write_json(self.folder / "submitted.json", {"submitted_at": time.time(), **values})

    def submitted_as(self, job_id: str, logs: Path, started: str = "") -> None:
        """After a submission: the id it got; of a process of this machine, when it `started`."""
        place = {"host": os.uname().nodename, "started": started} if started else {}
        write_json(
            self.folder / "submitted.json", {**self.submitted, "job_id": job_id, "logs": str(logs), **place}
        )

    def clean(self) -> None:
        """Remove what a killed suite left half-written of the files that suites alone write."""
        for name in ("step.json", "submitted.json") if self.folder.is_dir() else ():
            remove_leftovers(self.folder, of=name)

    def announce(self, step: Step, key: str, order: int) -> None:
        """Before a run that comes to this step later: it waits again, whatever an earlier run had done."""
        if not self.submitted:
            (self.folder / "state.json").unlink(missing_ok=True)
            self.describe(step, key, order)
        elif self.state.get("state") == "skipped":
            (self.folder / "state.json").unlink(missing_ok=True)

    def set_state(self, state: str, **values: Any) -> None:
        """Note how the job goes, keeping what was noted before."""
        write_json(self.folder / "state.json", {**self.state, "state": state, **values})

    def fail(self, attempt: str, error: str, trace: str | None, rank: int) -> None:
        """Note why an attempt failed; the first of several ranks to say so is the cause."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"error": error, "traceback": trace, "rank": rank, "at": time.time()}, indent=2)
        with contextlib.suppress(FileExistsError):
            handle = os.open(self.folder / f"failure-{attempt}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)

    def finish(self, key: str, **values: Any) -> None:
        """Note that the command with this key is done."""
        write_json(self.folder / "done.json", {"key": key, "finished_at": time.time(), **values})

    def set_aside(self) -> None:
        """For a recomputation: the done marker goes, the old output moves to where no report looks."""
        (self.folder / "done.json").unlink(missing_ok=True)
        output = Path(self.step.get("output", self.folder / "none"))
        if output.is_dir() and output.resolve() != self.root.resolve():
            output.rename(self.folder / f"replaced-{time.strftime('%Y%m%d-%H%M%S')}")

    def logs(self, rank: int = 0) -> list[Path]:
        """Standard output and error of the last submission."""
        sent = self.submitted
        if "logs" not in sent or "job_id" not in sent:
            return []
        return [Path(sent["logs"]) / f"{sent['job_id']}_{rank}_log.{end}" for end in ("out", "err")]


def records(root: str | Path) -> Iterator[Record]:
    """All steps of this folder, submitted or still to come, in the graph's order."""
    found = [read_json(p) for p in Path(root).glob("jobs/*/step.json")]
    for step in sorted((s for s in found if "name" in s), key=lambda s: s.get("order", 0)):
        yield Record(root, step["name"])


def stop_waiting(root: str | Path) -> None:
    """After a cancellation: what was to come does not wait any more."""
    for record in records(root):
        if not (record.done or record.state or record.failure or record.submitted.get("job_id")):
            record.set_state("stopped")


def differing(root: str | Path, graph: Graph) -> list[str]:
    """Steps on disk that had another command than the graph gives them, each as a line to print."""
    lines = []
    for step in graph:
        record = Record(root, step.name)
        old = record.step if record.submitted else {}
        if not old or step.after or old.get("key") == graph.keys[step.name]:
            continue
        before, now = old.get("argv", []), list(step.argv)
        gone = [w for w in before if w not in now]
        new = [w for w in now if w not in before]
        if gone or new:
            lines.append(f"{step.name}: was {' '.join(gone) or '-'}, now {' '.join(new) or '-'}")
        else:
            lines.append(f"{step.name}: the content of an input or of a step it needs is another one")
    return lines
