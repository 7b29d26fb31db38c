"""Published figures of published.yaml, by task and protocol."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import yaml

from transfer.report.evidence.grouping import Task

FILE = Path(__file__).parent / "published.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published model's figures in one task, as its source prints them; nothing here was re-measured."""

    method: str
    arch: str
    pretraining: str
    """Epochs, batch, views."""
    task: str
    dataset: str
    protocol: str
    """name@version of our file of the same protocol; empty where there is none."""
    note: str
    metrics: dict[str, float]
    spread: dict[str, float]
    """Standard deviation where the source gives one."""
    trials: int | None
    selection: str
    """best: the epoch that is best on the images evaluated; empty where the source does not say."""
    n: int
    """Images evaluated."""
    source: str
    """URL."""

    @property
    def name(self) -> str:
        """The row's name: method, architecture, pretraining."""
        return f"{self.method}, {self.arch}, {self.pretraining}"


@functools.cache
def load_published() -> tuple[Published, ...]:
    """All entries, in the file's order. Raises ValueError for an entry without a source URL or a figure."""
    document: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    entries = []
    for raw in document["results"]:
        source = document["sources"].get(raw["source"], raw["source"])
        entry = Published(**{
            "arch": "resnet50", "protocol": "", "note": "", "spread": {}, "trials": None, "selection": "",
            "n": document["images"].get(raw["dataset"], 0), **raw, "source": source,
        })  # fmt: skip
        if not entry.source.startswith("https://") or not entry.metrics:
            raise ValueError(f"{FILE}: {entry.name} needs metrics and the URL of its source")
        if entry.n <= 0:
            raise ValueError(f"{FILE}: {entry.name} needs n, the number of images evaluated")
        entries.append(entry)
    return tuple(entries)


def same_protocol(task: Task) -> list[Published]:
    """Published figures that may stand beside this task's: same task, images and protocol, unaltered."""
    return [p for p in _of(task) if _alike(p, task)]


def other_protocols(task: Task) -> list[Published]:
    """Published figures of the task's data set under other protocols: never ranked against ours."""
    return [p for p in _of(task) if not _alike(p, task)]


def _alike(p: Published, task: Task) -> bool:
    return bool(p.protocol) and (p.protocol, p.n) == (task.protocol, task.images) and not task.altered


def _of(task: Task) -> list[Published]:
    """Of the same data set, as a whole: a split that says more than its name is another one, or a part."""
    whole = " (" not in task.split
    return [p for p in load_published() if whole and p.task == task.name and p.dataset == task.dataset]
