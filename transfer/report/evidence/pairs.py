"""Every pair of methods of a task compared, and which methods lead."""

from __future__ import annotations

import dataclasses
from itertools import combinations

from transfer.report.evidence.compare import Difference, Summary, compare, correct
from transfer.report.evidence.grouping import Results, Task, condition


def compared(results: Results, task: Task) -> dict[tuple[str, str], Difference]:
    """Every pair of methods in `task`, in the report's order, corrected for their number.

    A method whose figure carries a warning is left out.
    """
    summaries = _summaries(results, task)
    pairs = list(combinations(summaries, 2))
    found = correct([compare(summaries[a], summaries[b], (a, b)) for a, b in pairs])
    told = [_with_reasons(results, task, pair, d) for pair, d in zip(pairs, found)]
    return dict(zip(pairs, told))


def leading(results: Results, task: Task) -> frozenset[str]:
    """The method with the highest mean and all that are not beyond noise of it; none where that is all."""
    means = {m: s.mean for m, s in _summaries(results, task).items()}
    if not means:
        return frozenset()
    best = max(means, key=lambda m: means[m])
    beaten = {m for pair, d in compared(results, task).items() if best in pair and d.beyond for m in pair}
    return frozenset(set(means) - (beaten - {best})) if beaten else frozenset()


def _summaries(results: Results, task: Task) -> dict[str, Summary]:
    have = ((m, results.headline(m, task)) for m in results.methods)
    return {m: s for m, s in have if s is not None and not results.warnings(m, task)}


def _with_reasons(results: Results, task: Task, pair: tuple[str, str], d: Difference) -> Difference:
    """What else a reader must know of the two: same weights, or evaluated under different conditions."""
    first, second = (results.records(m, task, results.selections(m, task)[0]) for m in pair)
    told = []
    if {r.identity for r in first} == {r.identity for r in second} != {("", "")}:
        told.append("the same weights")
    ours, theirs = first[0], second[0]  # one method has the same conditions throughout a task
    for key in sorted(ours.conditions.keys() & theirs.conditions.keys()):
        if ours.conditions[key] != theirs.conditions[key]:
            told.append(f"evaluated under {condition(ours, key)} against {condition(theirs, key)}")
    return dataclasses.replace(d, reason="; ".join([d.reason, *told]))
