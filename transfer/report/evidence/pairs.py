"""What can be said about each pair of methods of a task, and which of them lead."""

from __future__ import annotations

import dataclasses
from itertools import combinations

from transfer.report.evidence.compare import Difference, compare, correct
from transfer.report.evidence.grouping import Results, Task


def compared(results: Results, task: Task) -> dict[tuple[str, str], Difference]:
    """Every pair of methods in `task`, in the report's order, corrected for their number."""
    summaries = {m: s for m in results.methods if (s := results.headline(m, task)) is not None}
    pairs = list(combinations(summaries, 2))
    found = correct([compare(summaries[a], summaries[b], (a, b)) for a, b in pairs])
    told = [_with_reasons(results, task, pair, d) for pair, d in zip(pairs, found)]
    return dict(zip(pairs, told))


def leading(results: Results, task: Task) -> frozenset[str]:
    """The method with the highest mean and all that are not beyond noise of it; none where that is all."""
    means = {m: s.mean for m in results.methods if (s := results.headline(m, task)) is not None}
    if not means:
        return frozenset()
    best = max(means, key=lambda m: means[m])
    beaten = {m for pair, d in compared(results, task).items() if best in pair and d.beyond for m in pair}
    return frozenset(set(means) - (beaten - {best})) if beaten else frozenset()


def _with_reasons(results: Results, task: Task, pair: tuple[str, str], d: Difference) -> Difference:
    """What else a reader must know of the two: that they are one, or were judged differently."""
    first, second = (results.records(m, task, results.selections(m, task)[0]) for m in pair)
    told = []
    if {r.identity for r in first} == {r.identity for r in second} != {("", "")}:
        told.append("the same weights")
    sizes = [sorted({r["image_size"] for r in side if r["image_size"]}) for side in (first, second)]
    if sizes[0] != sizes[1] and all(sizes):
        told.append("judged at " + " and ".join(f"{', '.join(map(str, s))} px" for s in sizes))
    return dataclasses.replace(d, reason="; ".join([d.reason, *told]))
