"""The methods of a task compared pair by pair, and which of them lead."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict

import numpy as np

from transfer.report.evidence.compare import Difference, Summary, compare, paired_seeds, spelt
from transfer.report.evidence.grouping import Results, Task, condition
from transfer.report.evidence.significance import SIGNIFICANCE, holm, p_values

MOST_SHOWN = 40
"""Methods of a task of which every pair is shown; of more only those with the first method."""
MOST_TESTED = 5000
"""Methods of a task that are tested: their pairs grow with the square."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """The methods of one task, and the corrected p of each pair."""

    summaries: dict[str, Summary]
    """By method, in the report's order; methods whose figure carries a warning are left out."""
    p: np.ndarray
    """Of the pairs (0, 1), (0, 2) … (1, 2) …; NaN without a test."""
    tests: int
    """How many pairs are tested, for which p is corrected."""

    def p_of(self, i: int, j: int) -> float:
        """The corrected p of the methods in places i < j."""
        return float(self.p[i * len(self.summaries) - i * (i + 1) // 2 + j - i - 1])


@functools.lru_cache(maxsize=512)
def pairs_of(results: Results, task: Task) -> Pairs | None:
    """The methods of `task` against each other; None for more than MOST_TESTED."""
    have = ((m, results.headline(m, task)) for m in results.methods)
    summaries = {m: s for m, s in have if s is not None and not results.warnings(m, task)}
    if len(summaries) > MOST_TESTED:
        return None
    raw = _raw_p(list(summaries.values()))
    return Pairs(summaries=summaries, p=holm(raw), tests=int(np.count_nonzero(~np.isnan(raw))))


def compared(results: Results, task: Task) -> dict[tuple[str, str], Difference]:
    """Pairs of methods in `task`, in the report's order, corrected for the number of all pairs.

    A method whose figure carries a warning is left out; of more than MOST_SHOWN methods, the pairs without
    the first one are.
    """
    pairs = pairs_of(results, task)
    if pairs is None:
        return {}
    count = len(pairs.summaries)
    shown = range(count if count <= MOST_SHOWN else 1)
    names, found = list(pairs.summaries), {}
    for i, j in ((first, second) for first in shown for second in range(first + 1, count)):
        pair = names[i], names[j]
        found[pair] = _told(results, task, pair, pairs, pairs.p_of(i, j))
    return found


def leading(results: Results, task: Task) -> frozenset[str]:
    """The method with the highest mean and all that are not beyond noise of it; none where that is all."""
    pairs = pairs_of(results, task)
    if pairs is None or not pairs.summaries:
        return frozenset()
    names = list(pairs.summaries)
    means = [s.mean for s in pairs.summaries.values()]
    best = means.index(max(means))
    level = [
        j == best or not pairs.p_of(min(best, j), max(best, j)) < SIGNIFICANCE for j in range(len(names))
    ]
    return frozenset() if all(level) else frozenset(n for n, is_level in zip(names, level) if is_level)


def _raw_p(summaries: list[Summary]) -> np.ndarray:
    """p of each pair as `compare` has it, in arrays: a row is one method against all behind it."""
    count, nan = len(summaries), math.nan
    means = np.array([s.mean for s in summaries])
    complete = np.array([s.complete for s in summaries], bool)
    images = np.array([nan if s.binomial_error is None else s.binomial_error**2 for s in summaries])
    sides = np.array([s.variance or (nan, nan) for s in summaries]).reshape(-1, 2)
    by_seeds = _by_seeds(summaries)
    rows = [np.empty(0)]
    for i in range(count - 1):
        rest = slice(i + 1, None)
        variances = np.stack(np.broadcast_arrays(sides[i, 0], sides[rest, 0]))
        known = ~np.isnan(variances).any(0)
        variances = np.nan_to_num(variances)
        freedom = np.stack(np.broadcast_arrays(sides[i, 1], sides[rest, 1]))
        variance = variances.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(np.isnan(freedom), 0.0, (variances / variance) ** 2 / freedom)
            df = np.where(variance > 0, 1 / shares.sum(0), math.inf)
        if i in by_seeds:
            places, values = by_seeds[i]
            others = places > i
            at = places[others] - i - 1
            apart = np.round(values[places == i] - values[others], 9)  # rounding errors are no spread
            paired = (apart != apart[:, :1]).any(1) & ~(complete[i] & complete[places[others]])
            at, apart = at[paired], apart[paired]
            variance[at] = apart.var(1, ddof=1) / apart.shape[1]
            df[at] = apart.shape[1] - 1
        image = images[i] + images[rest]
        p = p_values(means[i] - means[rest], variance, df, np.nan_to_num(image))
        p[np.isnan(image) & ((variance == 0) | ~known)] = nan
        rows.append(p)
    return np.concatenate(rows)


def _by_seeds(summaries: list[Summary]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of each method that is one checkpoint evaluated once by each of several seeds: the places of those with
    the same seeds, rising, and their values, method x seed."""
    groups: dict[tuple[int, ...], dict[int, list[float]]] = defaultdict(dict)
    for place, s in enumerate(summaries):
        if values := paired_seeds(s):
            groups[tuple(sorted(values))][place] = [values[seed] for seed in sorted(values)]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for members in groups.values():
        arrays = np.array(list(members)), np.array(list(members.values()))
        found |= dict.fromkeys(members, arrays)
    return found


def _told(results: Results, task: Task, pair: tuple[str, str], pairs: Pairs, p: float) -> Difference:
    """The difference with its corrected p, and what else a reader must know of the two: same weights, or
    evaluated under different conditions."""
    d = compare(pairs.summaries[pair[0]], pairs.summaries[pair[1]], pair)
    told = [d.reason]
    if d.p is not None and pairs.tests > 1:
        d = dataclasses.replace(d, p=p)
        told.append(f"{spelt(p)} by Holm over {pairs.tests} comparisons of the task")
    first, second = (results.records(m, task, results.selections(m, task)[0]) for m in pair)
    if {r.identity for r in first} == {r.identity for r in second} != {("", "")}:
        told.append("the same weights")
    ours, theirs = first[0], second[0]  # one method has the same conditions throughout a task
    for key in sorted(ours.conditions.keys() & theirs.conditions.keys()):
        if ours.conditions[key] != theirs.conditions[key]:
            told.append(f"evaluated under {condition(ours, key)} against {condition(theirs, key)}")
    return dataclasses.replace(d, reason="; ".join(told))
