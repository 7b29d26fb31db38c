"""Boards: the results that may be ranked together, and on which line each stands."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.common.files import regular
from transfer.evaluation.results import FILE, hash_of
from transfer.report.evidence.collect import Evidence
from transfer.report.evidence.grouping import SPECTRUM, Results, Task, condition, group, task_of
from transfer.report.evidence.labels import printable
from transfer.report.evidence.records import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """Results that may be ranked."""

    task: Task
    selection: str
    conditions: tuple[str, ...]
    """What parts it from other boards of the same task."""
    under: str
    """Hash of the conditions."""
    results: Results

    @property
    def title(self) -> str:
        """What was measured, and how."""
        chosen = {"last": "last epoch", "best": "best epoch on the images reported"}.get(
            self.selection, f"epoch chosen on {self.selection} images"
        )
        return ", ".join([f"{self.task.title}: {self.task.setting}", chosen, *self.conditions])

    @property
    def metric(self) -> str:
        """What is ranked by."""
        return self.results.headline_metric(self.results.tasks[0])

    def means(self) -> dict[str, float]:
        """Of the methods that may be ranked, the best first: none that is stale or warned of."""
        task = self.results.tasks[0]
        found = {}
        for method in self.results.methods:
            summary = self.results.headline(method, task)
            records = self.results.records(method, task, self.selection)
            if summary and not self.results.warnings(method, task) and not any(r.stale for r in records):
                found[method] = summary.mean
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def boards_of(evidence: Evidence, *, pool: bool) -> tuple[list[Board], list[Record]]:
    """The boards in the report's order of tasks, and the records that say too little to be ranked."""
    found: dict[tuple[Task, str, str], list[Record]] = defaultdict(list)
    unranked = []
    for record in evidence.records:
        under = record["evaluated_under"]
        if record["task"] == SPECTRUM:
            continue
        if not isinstance(under, dict) or not under:
            unranked.append(record)
            continue
        ambiguous = frozenset([record.protocol])  # by its hash, whatever it is called
        task = task_of(record, ambiguous)
        found[task, str(record["selection"] or "last"), hash_of(under)].append(record)
    boards = []
    for task, selection, under in sorted(found):
        others = [records for (t, _, _), records in found.items() if t == task]
        parting = _parting([records[0] for records in others])
        records = found[task, selection, under]
        boards.append(Board(
            task=task, selection=selection, under=under,
            conditions=tuple(condition(records[0], key) for key in parting),
            results=group(dataclasses.replace(evidence, records=records), pool=pool),
        ))  # fmt: skip
    return boards, unranked


def _parting(records: Sequence[Record]) -> list[str]:
    """The conditions in which any two of the records differ."""
    keys = sorted({key for r in records for key in r.conditions})
    return [
        key for key in keys if len({json.dumps(r.conditions.get(key), sort_keys=True) for r in records}) > 1
    ]


def results_of(record: Record) -> Path:
    """The file that the record's line stands in."""
    return record.folder / FILE


def key_of(line: dict[str, Any]) -> str:
    """A line's content but its label, which the report may have changed."""
    return json.dumps(printable({k: v for k, v in line.items() if k != "label"}), sort_keys=True)


def numbered(folder: Path) -> dict[str, int]:
    """The number of each line of a folder's results, by its content."""
    found: dict[str, int] = {}
    text = regular(folder / FILE).read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.setdefault(key_of(value), number)
    return found
