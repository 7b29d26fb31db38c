"""Whether a metric of the spectrum, which needs no labels, predicts the results of tasks."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from transfer.correlation import kendall
from transfer.report.evidence.grouping import Results, Task
from transfer.report.evidence.records import Record

DENSE = ("detection", "segmentation", "keypoints", "semantic")
BETTER = {
    "rankme": 1, "decay": 0, "stable_rank": 1, "entropy_rank": 1, "condition_number": -1, "largest_share": -1,
    "uniformity": -1, "cluster_learnability": 1, "intrinsic_dimension": 1, "clid": 1, "alignment": -1,
    "lidar": 1, "nc1": -1, "nc2_norms": -1, "nc2_angles": -1,
}  # fmt: skip
"""Metrics, and whether their authors take more (1) or less (-1) for better; of the decay the nearest to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One metric against one task, over the checkpoints that have both."""

    metric: str
    task: Task
    n: int
    tau: float | None
    """Kendall's τ-b; None for too few checkpoints, or where all values are equal."""
    low: float = math.nan
    high: float = math.nan
    chosen: str
    """The checkpoint that the metric would have taken."""
    best: str
    loss: float
    """How much worse the chosen one is in the task than the best, in the task's own percent."""


def predictions(results: Results) -> list[Prediction]:
    """Each metric of the spectrum against each task in which several diagnosed checkpoints have results."""
    spectra = _spectra(results)
    found = []
    for task in results.tasks:
        by_checkpoint = _values(results, task, spectra)
        for metric in BETTER:
            pairs = [
                (name, value, spectra[key][1]["metrics"][metric])
                for key, (name, value) in by_checkpoint.items()
                if metric in spectra[key][1]["metrics"]
            ]
            if len(pairs) >= 2:
                found.append(_prediction(metric, task, pairs))
    return found


def _prediction(metric: str, task: Task, pairs: Sequence[tuple[str, float, float]]) -> Prediction:
    names, values, metrics = zip(*pairs)
    sign = BETTER[metric]
    good = [sign * m if sign else -abs(m - 1) for m in metrics]
    chosen, best = good.index(max(good)), values.index(max(values))
    tau, low, high = kendall(metrics, values)
    return Prediction(
        metric=metric, task=task, n=len(pairs), tau=tau, low=low, high=high, chosen=names[chosen],
        best=names[best], loss=values[best] - values[chosen],
    )  # fmt: skip


def _spectra(results: Results) -> dict[str, tuple[str, Record]]:
    """The newest diagnosis of each checkpoint, by what tells it apart, with its method's name."""
    return {
        r.checkpoint or r.label: (method, r)
        for method in results.methods
        for task in results.spectra
        for r in results.all_records(method, task)
    }


def _values(
    results: Results, task: Task, spectra: dict[str, tuple[str, Record]]
) -> dict[str, tuple[str, float]]:
    """The mean headline figure of each diagnosed checkpoint, with its name.

    A detector's weights are a converted file: it belongs to the only checkpoint of its label.
    """
    of_label: dict[str, list[str]] = defaultdict(list)
    for key, (_, record) in spectra.items():
        of_label[record.label].append(key)
    metric = results.headline_metric(task)
    found: dict[str, list[float]] = defaultdict(list)
    for method in results.methods:
        selections = results.selections(method, task)
        for record in results.records(method, task, selections[0]) if selections else ():
            value = record["metrics"].get(metric)
            same = of_label.get(record.label, [])
            key = record.checkpoint if record.checkpoint in spectra else same[0] if len(same) == 1 else ""
            if key and isinstance(value, (int, float)) and value >= 0:
                found[key].append(float(value))
    return {key: (spectra[key][1].label, statistics.fmean(values)) for key, values in found.items()}
