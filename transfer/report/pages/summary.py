"""The report in one paragraph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transfer.options.weights import RAW_PIXELS
from transfer.report.evidence.compare import CANNOT, Difference
from transfer.report.evidence.grouping import Results, Task
from transfer.report.evidence.pairs import compared
from transfer.report.pages.statements import OF_THESE

CENTRED = ("fashion_mnist",)
"""Data sets of small, centred images, many of which are near-duplicates of each other."""
MOST_TOLD = 3
ABOUT_CHECKPOINTS = f"A verdict that names its noise is about these checkpoints: {OF_THESE}."


def summary(results: Results) -> str:
    """Where the best model stands, how much of that is noise, and what raw pixels above it mean.

    The verdicts are those of the differences, word by word; empty without any result.
    """
    if not results.tasks:
        return ""
    best = results.methods[0]
    pairs = [
        (task, second, d)
        for task in results.tasks
        for (first, second), d in compared(results, task).items()
        if first == best
    ]
    if not pairs:
        return (
            f"Nothing can be compared with {best}: no other row has a figure of the same task and protocol."
        )
    above = [pair for pair in pairs if round(pair[2].points, 9) < 0]
    columns = list(dict.fromkeys(task for task, _, _ in pairs))
    behind = {task for task, _, _ in above}
    told = [f"{best} has the highest figure in {_of(len(columns) - len(behind), len(columns))}."]
    if above:
        told.append(f"Above it: {'; '.join(_spelt(*pair) for pair in above[:MOST_TOLD])}{_more(above)}.")
    level = [f"{o} in {task.title} on {task.dataset}" for task, o, d in pairs if not round(d.points, 9)]
    if level:
        told.append(f"Level with it: {'; '.join(level[:MOST_TOLD])}{_more(level)}.")
    verdicts = Counter(d.verdict for _, _, d in pairs)
    if len(pairs) > 1:
        counts = [f"{n} {_is(verdict, n)}" for verdict, n in verdicts.items()]
        counts = [", ".join(counts[:-1]), counts[-1]] if len(counts) > 1 else counts
        told.append(f"Of its {len(pairs)} differences from other rows, {' and '.join(counts)}.")
    elif not level:
        told.append(f"The difference {_is(pairs[0][2].verdict, 1)}.")
    if any(d.p is not None and d.noise != "noise" for _, _, d in pairs):
        told.append(ABOUT_CHECKPOINTS)
    pixels = [task for task, other, _ in above if task.name == "knn" and _is_pixels(results, other, task)]
    return " ".join([*told, *([_about_pixels(best, pixels)] if pixels else [])])


def _more(pairs: Sequence[object]) -> str:
    return f"; and {len(pairs) - MOST_TOLD} more" if len(pairs) > MOST_TOLD else ""


def _is(verdict: str, count: int) -> str:
    return verdict if verdict == CANNOT else f"{'is' if count == 1 else 'are'} {verdict}"


def _of(count: int, columns: int) -> str:
    """In how many of the columns."""
    if columns == 1:
        return "the only column that it is compared in" if count else "no column"
    if count == columns:
        return f"all {columns} columns that it is compared in"
    return f"{count or 'none'} of the {columns} columns that it is compared in"


def _spelt(task: Task, other: str, d: Difference) -> str:
    return f"{other} in {task.title} on {task.dataset}, by {-d.points:.2f} points ({d.verdict})"


def _is_pixels(results: Results, method: str, task: Task) -> bool:
    return any((r["weights"] or {}).get("path") == RAW_PIXELS for r in results.all_records(method, task))


def _about_pixels(best: str, tasks: list[Task]) -> str:
    """What it means that raw pixels are above the best model in k-NN."""
    if all(task.dataset in CENTRED for task in tasks):
        return (
            "Raw pixels do so well in k-NN because small, centred, grey images often have near-duplicates "
            "among the training images, which need no features to be found: natural images, such as cifar10, "
            "tell more about a model."
        )
    return (
        f"Raw pixels above it in k-NN: the images themselves tell the classes apart better than {best} does."
    )
