"""A run's kept checkpoints: each task's figure over the epochs of pretraining."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from transfer.evaluation.provenance import kept_epoch
from transfer.report.evidence.grouping import Results, Task, metric_name
from transfer.report.evidence.records import Record
from transfer.report.pages.plots import Plot, Series, draw, lines

EPOCH = re.compile(r"[\s,/-]*(?:checkpoint_epoch|epoch )\d+(?:\.pt)?")
TEXT = (
    "The checkpoints that a pretraining kept (checkpoint_epochN.pt), the mean where there are several seeds "
    "of an evaluation. Tasks of whole images and of pixels need not rise together."
)


def epoch_plots(results: Results) -> list[Plot]:
    """One plot a task of which a run has results at several epochs: a line a run, a colour a method."""
    plots = []
    for task in results.tasks:
        series = _series(results, task)
        if series:
            title = f"{task.title} over epochs ({task.dataset}, {task.protocol})"
            y = f"{metric_name(results.headline_metric(task))}, percent"
            plots.append(draw(f"epochs-{task.slug}", title, _lines, series, y))
    return plots


def _series(results: Results, task: Task) -> Series:
    metric = results.headline_metric(task)
    runs: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method in results.methods:
        for selection in results.selections(method, task)[:1]:
            for record in results.records(method, task, selection):
                path, value = _path(record), record["metrics"].get(metric)
                epoch = kept_epoch(path)
                if epoch is not None and isinstance(value, int | float) and value >= 0:
                    name = EPOCH.sub("", method) or Path(path).parent.name
                    runs[name, str(Path(path).parent)][epoch].append(float(value))
    return [
        (name, sorted(values), [statistics.fmean(values[epoch]) for epoch in sorted(values)])
        for (name, _), values in runs.items()
        if len(values) > 1
    ]


def _lines(axes: Axes, series: Series, y: str) -> None:
    lines(axes, series, x="epoch of pretraining", y=y, marker="o")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _path(record: Record) -> str:
    return str((record["weights"] or {}).get("path") or "")
