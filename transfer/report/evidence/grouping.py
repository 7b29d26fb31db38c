"""Records grouped: methods are rows, comparable tasks are columns."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.common.files import whole_number
from pretrain.data.transfer_sets import metric_of
from transfer.evaluation.provenance import short_names
from transfer.options.weights import RAW_PIXELS
from transfer.report.evidence.collect import Evidence
from transfer.report.evidence.compare import Summary, Trial
from transfer.report.evidence.labels import file_name
from transfer.report.evidence.records import Record

TASK_NAMES = {
    "knn": "k-NN",
    "linear": "Linear",
    "semisup": "Semi-supervised",
    "detection": "Box",
    "segmentation": "Mask",
    "keypoints": "Keypoint",
    "semantic": "Semantic",
    "spectrum": "Spectrum",
}
SPECTRUM = "spectrum"
"""The task whose figures are no results to compare, but what may predict them."""
SELECTIONS = ("last", "held-out", "best")
"""In the order in which one is taken for the headline: nothing selected on the reported split comes first."""
PROPORTIONS = ("top1", "top5")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Task:
    """What two results must have in common to be set against each other."""

    order: int
    name: str
    label_percent: float
    dataset: str
    split: str
    protocol: str
    protocol_hash: str
    images: int
    altered: str = ""
    """How it differs from the protocol that is shipped under this name."""
    conditions: tuple[str, ...] = ()
    """What else sets it apart from the same task here: conditions of which one method has several."""
    ambiguous: bool = False
    """Whether another protocol here has this name, but other content."""
    data: str = dataclasses.field(default="", compare=False, repr=False)
    """Data set and split as they are shown: a folder by its name. What it is, `dataset` and `split` say."""

    @property
    def partly(self) -> bool:
        """Whether the share of the labels is worth naming."""
        return self.name == "semisup" or self.label_percent != 100

    @property
    def title(self) -> str:
        """The task's name, with the share of labels where it matters: `Semi-supervised 1 %`."""
        share = f" {self.label_percent:g} %" if self.partly else ""
        return TASK_NAMES.get(self.name, self.name) + share

    @property
    def setting(self) -> str:
        """Data set, split, protocol, number of images, and what differs from the protocol."""
        count = f", {self.images:,} images" if self.images else ""
        which = f" ({self.protocol_hash[:6]})" if self.ambiguous else ""
        told = [
            self.data or f"{self.dataset} {self.split}",
            f"{self.protocol}{which}{count}",
            *self.conditions,
        ]
        return ", ".join(told) + (f"; differs from {self.protocol}: {self.altered}" if self.altered else "")

    @property
    def slug(self) -> str:
        """A name for its files; the digits tell tasks apart whose names are the same in these letters."""
        share = f"-{self.label_percent:g}" if self.partly else ""
        name = f"{self.name}{share}-{self.dataset}-{self.protocol.replace('@', '-v')}"
        return f"{file_name(name)}-{hashlib.sha256(repr(self).encode()).hexdigest()[:6]}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """Trials by method, task and selection; later runs of the same trial replace earlier ones."""

    methods: tuple[str, ...]
    """The rows: checkpoints, then random weights, then raw pixels; among those the best first."""
    tasks: tuple[Task, ...]
    """In the order of the report's columns; without those of `spectra`."""
    spectra: tuple[Task, ...]
    """Diagnoses of the spectrum."""
    groups: dict[tuple[str, Task, str], tuple[Record, ...]]
    notes: tuple[str, ...]
    run_names: dict[Path, str]
    """The method by the folder of its results."""

    def records(self, method: str, task: Task, selection: str) -> tuple[Record, ...]:
        """The trials under one selection (last, held-out, best), by rising seed; empty without any."""
        return self.groups.get((method, task, selection), ())

    def all_records(self, method: str, task: Task) -> list[Record]:
        """The trials under every selection, those for the headline first."""
        return [
            r for selection in self.selections(method, task) for r in self.groups[method, task, selection]
        ]

    def warnings(self, method: str, task: Task) -> list[str]:
        """Why the headline figure may say nothing."""
        told = [w for r in self.records(method, task, self.selections(method, task)[0]) for w in r.warnings]
        return list(dict.fromkeys(told))

    @functools.cached_property
    def _selections(self) -> dict[tuple[str, Task], list[str]]:
        found: dict[tuple[str, Task], list[str]] = defaultdict(list)
        for method, task, selection in self.groups:
            found[method, task].append(selection)
        place = {s: i for i, s in enumerate(SELECTIONS)}
        return {key: sorted(s, key=lambda s: (place.get(s, len(place)), s)) for key, s in found.items()}

    def selections(self, method: str, task: Task) -> list[str]:
        """The selections there are trials of, in the order in which they are taken for the headline."""
        return self._selections.get((method, task), [])

    @functools.cached_property
    def _metrics(self) -> dict[Task, list[str]]:
        names: dict[Task, dict[str, None]] = defaultdict(dict)
        for (_, task, _), records in self.groups.items():
            for record in records:
                names[task].update(dict.fromkeys(record["metrics"]))
        return {task: list(found) for task, found in names.items()}

    def metrics(self, task: Task) -> list[str]:
        """Names of the task's metrics, in the order in which the records have them."""
        return self._metrics[task]

    def headline_metric(self, task: Task) -> str:
        """The metric that stands for the task: AP, mIoU, or what the data set is reported in (top-1, mean per
        class); of several k, 20 or else the first."""
        names = self.metrics(task)
        kept = metric_of(task.dataset)
        of_set = [kept, f"{kept}_k20", *(n for n in names if n.startswith(f"{kept}_k"))]
        wanted = ("AP", "mIoU", *of_set, "top1", "top1_k20", "mean_per_class", "mAP")
        return next((n for n in wanted if n in names), names[0])

    def summary(self, method: str, task: Task, selection: str, metric: str) -> Summary | None:
        """The trials' values; None where there is none. COCO's −1 for "no such objects" is none."""
        found = [(r, r["metrics"].get(metric)) for r in self.records(method, task, selection)]
        trials = tuple(
            Trial(value=float(v), images=task.images, seed=r["seed"], weights=r.checkpoint, fixed=r.fixed)
            for r, v in found
            if isinstance(v, (int, float)) and v >= 0
        )
        return Summary(trials=trials, proportion=metric.startswith(PROPORTIONS)) if trials else None

    def headline(self, method: str, task: Task, metric: str | None = None) -> Summary | None:
        """The trials shown first: of the last epoch where there are any."""
        metric = metric or self.headline_metric(task)
        for selection in self.selections(method, task):
            if (found := self.summary(method, task, selection, metric)) is not None:
                return found
        return None


def metric_name(metric: str) -> str:
    """A metric's name as a paper has it: top1_k20 is 'top-1, k = 20'."""
    head, _, k = metric.partition("_k")
    spelt = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}.get(head, head)
    return f"{spelt}, k = {k}" if whole_number(k) is not None else spelt


def task_of(record: Record, ambiguous: frozenset[str] = frozenset()) -> Task:
    """The task of a record; protocols named in `ambiguous` are told apart by their hash."""
    name = str(record["task"])
    folder = (record["settings"] or {}).get("folder")
    protocol: dict[str, Any] = record["protocol"] or {}
    return Task(
        order=list(TASK_NAMES).index(name) if name in TASK_NAMES else len(TASK_NAMES),
        name=name,
        label_percent=float(record["label_percent"] or 100),
        dataset=str(record["dataset"]),
        split=str(record["split"] or ""),
        protocol=record.protocol,
        protocol_hash=str(protocol.get("hash") or ""),
        images=int(record["n"] or 0),
        altered=record.altered,
        ambiguous=record.protocol in ambiguous,
        data=f"{folder} {record['split'] or ''}" if folder and isinstance(folder, str) else "",
    )


HASHED = re.compile(r", files [0-9a-f]{6}(?=\)$)")


def _without_hashes(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Data set and split of folders of images as they are shown: by the first one's name, and by the hash of
    their files only where others of that name are here."""
    shown: dict[tuple[str, str], str] = {}
    for task in map(task_of, records):
        if task.data:
            shown.setdefault((task.dataset, task.split), task.data)
    counts = Counter(HASHED.sub("", data) for data in shown.values())
    return {key: short if counts[short := HASHED.sub("", data)] == 1 else data for key, data in shown.items()}


def group(evidence: Evidence, *, pool: bool = False) -> Results:
    """Sort the records into methods and tasks.

    A label found under several of the given folders with different weights or figures is several methods,
    told apart by the folder's name; with `pool` it is one, its folders being further seeds.
    """
    names = _method_names(evidence, pool)
    notes: list[str] = []
    groups: dict[tuple[str, Task, str], dict[tuple[Any, ...], Record]] = defaultdict(dict)
    replaced = 0
    hashes = {(r.protocol, task_of(r).protocol_hash) for r in evidence.records}
    counts = Counter(name for name, _ in hashes)
    ambiguous = frozenset(name for name, count in counts.items() if count > 1)
    parting = _parting(evidence.records, names)
    order = {id(r): i for i, r in enumerate(evidence.records)}
    data = _without_hashes(evidence.records)
    by_time = sorted(evidence.records, key=lambda r: (str(r["started_at"] or ""), order[id(r)]))
    for record in by_time:
        task = task_of(record, ambiguous)
        conditions = tuple(condition(record, key) for key in sorted(parting[task_of(record)]))
        shown = data.get((task.dataset, task.split), "")
        task = dataclasses.replace(task, conditions=conditions, data=shown)
        key = (names[id(record)], task, str(record["selection"] or "last"))
        same = (
            record.identity,
            record["seed"],
            *([record.root] if pool and record["seed"] is not None else []),
        )
        previous = groups[key].get(same)
        if previous is not None and previous.values != record.values:
            replaced += 1
        groups[key][same] = record
    if replaced:
        notes.append(
            f"{replaced} earlier {'results were' if replaced > 1 else 'result was'} replaced by a later run "
            "of the same."
        )
    chosen = {key: _fresh(trials.values(), order) for key, trials in groups.items()}
    ranks: dict[str, int] = {}
    for r in sorted(evidence.records, key=lambda r: (_rank(r), r.root, r.label)):
        ranks.setdefault(names[id(r)], _rank(r))
    results = Results(
        methods=tuple(ranks),
        tasks=tuple(sorted({task for _, task, _ in chosen if task.name != SPECTRUM})),
        spectra=tuple(sorted({task for _, task, _ in chosen if task.name == SPECTRUM})),
        groups=dict(sorted(chosen.items(), key=lambda item: (item[0][1], item[0][0], item[0][2]))),
        notes=tuple(notes),
        run_names={r.folder: names[id(r)] for r in evidence.records},
    )
    above = _above(results)
    return dataclasses.replace(
        results, methods=tuple(sorted(ranks, key=lambda method: (ranks[method], -above[method])))
    )


def _above(results: Results) -> Counter[str]:
    """How many others each method is above, over all tasks; figures with a warning do not count."""
    found: Counter[str] = Counter()
    for task in results.tasks:
        have = ((m, results.headline(m, task)) for m in results.methods)
        means = {m: s.mean for m, s in have if s is not None and not results.warnings(m, task)}
        rising = sorted(means.values())
        found.update({m: bisect.bisect_left(rising, mean) for m, mean in means.items()})
    return found


def condition(record: Record, key: str) -> str:
    """One of a record's conditions in words."""
    value = record.conditions.get(key)
    text = ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
    return f"{key.replace('_', ' ')} {'not recorded' if value is None else text[:24]}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _parting(records: Iterable[Record], names: dict[int, str]) -> dict[Task, set[str]]:
    """The conditions that part a task: those that one method has several values of in it."""
    seen: dict[tuple[str, Task, str], set[str]] = defaultdict(set)
    parting: dict[Task, set[str]] = defaultdict(set)
    for r in records:
        task = task_of(r)
        for key, value in r.conditions.items():
            seen[names[id(r)], task, key].add(json.dumps(value, sort_keys=True))
    for (_, task, key), values in seen.items():
        parting[task] |= {key} if len(values) > 1 else set()
    return parting


def _fresh(trials: Iterable[Record], order: dict[int, int]) -> tuple[Record, ...]:
    """Stale trials are shown only where nothing newer stands in their place."""
    records = sorted(trials, key=lambda r: (r["seed"] is not None, r["seed"] or 0, order[id(r)]))
    fresh = [r for r in records if not r.stale]
    return tuple(fresh or records)


def _rank(record: Record) -> int:
    """Checkpoints come first, then random weights, then raw pixels."""
    path = (record["weights"] or {}).get("path")
    if path == RAW_PIXELS:
        return 2
    untrained = not path or any(word in record.label.lower() for word in ("random", "control"))
    return int(untrained)


def _method_names(evidence: Evidence, pool: bool) -> dict[int, str]:
    """The row of each record, by id."""
    roots: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    figures: dict[str, dict[tuple[Any, ...], set[tuple[int, str]]]] = defaultdict(lambda: defaultdict(set))
    for r in evidence.records:
        roots[r.label][r.root].add(r.sha256)
        same = r.sha256, task_of(r), r["selection"], r["seed"]
        figures[r.label][same].add((r.root, str(sorted(r["metrics"].items()))))
    apart = set()
    for label, weights in roots.items():
        differ = len({frozenset(s) for s in weights.values()}) > 1
        clash = any(all(len({*side}) > 1 for side in zip(*found)) for found in figures[label].values())
        if len(weights) > 1 and (differ or clash) and not pool:
            apart.add(label)
    folder_names = short_names([str(root.resolve()) for root in evidence.roots])
    return {
        id(r): f"{r.label} ({folder_names[r.root]})" if r.label in apart else r.label
        for r in evidence.records
    }
