"""Means and spreads of trials, and what a difference allows to say (docs/statistics.md)."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from scipy import special

from transfer.report.evidence.significance import SIGNIFICANCE, margin, p_values

CANNOT = "cannot be told"
"""The verdict where there is no test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One trained and evaluated model."""

    value: float
    """Percent."""
    images: int
    """Images evaluated."""
    seed: int | None
    """Seed of the evaluation's training; None where the evaluation has no randomness."""
    weights: str
    """What tells checkpoints apart (sha256 and branch); empty for none: random weights, raw pixels."""
    fixed: bool = False
    """Whether nothing about it is random but the choice of the images: raw pixels by k-NN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Trials of one method in one task under one protocol.

    Probe seeds on one checkpoint share its pretraining, so each checkpoint counts once, by the mean over its
    seeds. A run without a weights file draws everything anew and counts as it is.
    """

    trials: tuple[Trial, ...]
    proportion: bool
    """Whether the metric is a share of images classified right (top-1), so that a binomial error exists."""

    @property
    def means(self) -> list[float]:
        """Of each checkpoint, over its evaluation seeds."""
        found: dict[Any, list[float]] = {}
        for i, t in enumerate(self.trials):
            found.setdefault(t.weights or i, []).append(t.value)
        return [statistics.fmean(values) for values in found.values()]

    @property
    def replicates(self) -> list[float]:
        """What the spread is taken over: checkpoints, or the evaluation seeds of the only one."""
        return self.means if len(self.means) > 1 else [t.value for t in self.trials]

    @property
    def n(self) -> int:
        """Number of replicates."""
        return len(self.replicates)

    @property
    def mean(self) -> float:
        """Percent: the mean over checkpoints, each the mean over its evaluation seeds."""
        return statistics.fmean(self.means)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the replicates (n − 1); None for a single one."""
        return statistics.stdev(self.replicates) if self.n > 1 else None

    @property
    def complete(self) -> bool:
        """Whether the replicates differ in all that is random about the method, pretraining included."""
        return len(self.means) > 1 or all(t.fixed for t in self.trials)

    @property
    def over_pretrainings(self) -> bool:
        """Whether the replicates are several checkpoints, not evaluation seeds of one."""
        return len(self.means) > 1 and any(t.weights for t in self.trials)

    @property
    def repeated(self) -> str:
        """`3 pretrainings`, `2 seeds` or `1 run`."""
        if self.n == 1:
            return "1 run"
        return f"{self.n} {'pretrainings' if self.over_pretrainings else 'seeds'}"

    @property
    def variance(self) -> tuple[float, float] | None:
        """Of the mean, over the replicates, with its degrees of freedom; None where it is unknown."""
        if self.std is not None:
            return self.std**2 / self.n, self.n - 1
        return (0.0, math.inf) if self.trials[0].seed is None else None

    @property
    def binomial_error(self) -> float | None:
        """Of a share of images, from their number alone: 100 √(p (1 − p) / images)."""
        return binomial_error(self.mean, self.trials[0].images) if self.proportion else None

    @property
    def over(self) -> str:
        """What differs between the replicates."""
        if len(self.trials) == 1:
            return "deterministic" if self.trials[0].seed is None else "one seed"
        if len(self.means) == 1 or not any(t.weights for t in self.trials):
            return "evaluation seeds"
        nested = len(self.trials) > self.n
        return "pretraining seeds" + (", each the mean of its evaluation seeds" if nested else "")

    @property
    def count(self) -> str:
        """`n 3`, or `n 2, of 6 runs` where checkpoints have several runs each."""
        more = f", of {len(self.trials)} runs" if len(self.trials) > self.n else ""
        return f"n {self.n}{more}"

    @property
    def seeds(self) -> str:
        """The evaluation seeds, `-` where there is no randomness."""
        known = sorted({t.seed for t in self.trials if t.seed is not None})
        return ", ".join(str(s) for s in known) or "-"


def binomial_error(percent: float, images: int) -> float | None:
    """Standard error in percent points of a share `percent` of `images` independent images."""
    p = percent / 100
    return 100 * math.sqrt(p * (1 - p) / images) if images > 0 and 0 <= p <= 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """a − b in percent points, with what can be said about it."""

    points: float
    spread: str
    """A 95 % confidence interval, for this comparison alone."""
    p: float | None
    """Of no difference, two-sided; corrected among several of a task. None where there is no test."""
    noise: str
    """What the test knows of: `noise` where pretraining is a part of it, else `the noise of …`."""
    reason: str
    """The test's numbers, or why there is no test."""

    @property
    def verdict(self) -> str:
        """`beyond noise`, `within the noise of …` or `cannot be told`."""
        if self.p is None:
            return CANNOT
        return f"{'beyond' if self.beyond else 'within'} {self.noise}"

    @property
    def beyond(self) -> bool:
        """Whether p, corrected or not, is below SIGNIFICANCE; False without a test."""
        return self.p is not None and self.p < SIGNIFICANCE


def compare(a: Summary, b: Summary, names: tuple[str, str] = ("the first", "the second")) -> Difference:
    """Test a − b over checkpoints where both sides have several; else say what is left out.

    Two kinds of noise meet. Over replicates: Welch's variance s_a²/n_a + s_b²/n_b with the degrees of freedom
    of Welch and Satterthwaite (Welch 1947, https://doi.org/10.1093/biomet/34.1-2.28), or that of the paired
    differences where one checkpoint a side was evaluated with the same evaluation seeds. Of the test images,
    for a top-1: the binomial variance, as if each side had test images of its own (they share them, which
    makes the true one smaller). `margin` adds them.
    """
    points = a.mean - b.mean
    complete = a.complete and b.complete
    pairs = [] if complete else _pairs(a, b)
    sides = (a.variance, b.variance)
    known = [s for s in sides if s is not None]
    image = None
    if a.binomial_error is not None and b.binomial_error is not None:
        image = a.binomial_error**2 + b.binomial_error**2
    if len(set(pairs)) > 1:
        known = [(statistics.variance(pairs) / len(pairs), len(pairs) - 1)]
        test = f"paired t test over {len(pairs)} evaluation seeds"
    else:
        test = f"{'Welch t' if min(a.n, b.n) > 1 else 't'} test over {a.repeated} and {b.repeated}"
    variance = sum(v for v, _ in known)
    df = 1 / sum((v / variance) ** 2 / d for v, d in known) if variance else math.inf
    if image is None and (variance == 0 or None in sides):
        why = f"n = {a.n} against {b.n}, at least two runs of each are needed"
        return Difference(
            points=points, spread="unknown", p=None, noise="noise",
            reason=f"no test: {f'no spread among {a.n} and {b.n} runs' if None not in sides else why}",
        )  # fmt: skip
    half = float(margin(variance, df, image or 0.0))
    found = float(p_values(points, variance, df, image or 0.0))
    told = [_test_text(test, points, variance, df)] if variance else []
    if image is not None:
        told.append(f"binomial standard error of the test images {math.sqrt(image):.2f}")
    if image is not None:
        told.append(("together " if variance else "") + spelt(found))
    told += _unknown(a, b, names)
    heard = ["the test images"] * (image is not None)
    heard += ["one side's pretrainings"] * any(s.over_pretrainings for s in (a, b))
    heard += ["the seeds"] * (None not in sides and any(s.n > 1 > s.over_pretrainings for s in (a, b)))
    return Difference(
        points=points, spread=f"95 % CI {points - half:+.2f} to {points + half:+.2f}", p=found,
        noise="noise" if complete else f"the noise of {' and '.join(heard)}",
        reason="; ".join(told),
    )  # fmt: skip


def _test_text(test: str, points: float, variance: float, df: float) -> str:
    t = points / math.sqrt(variance)
    return f"{test}: t = {t:.2f}, df = {df:.1f}, {spelt(2 * special.stdtr(df, -abs(t)))}"


def spelt(p: float) -> str:
    """`p = 0.0123`, or that it is below a millionth."""
    return "p < 1e-6" if p < 1e-6 else f"p = {p:.3g}"


def paired_seeds(s: Summary) -> dict[int, float]:
    """Values by evaluation seed of one checkpoint evaluated once by each of several; else empty."""
    found = {t.seed: t.value for t in s.trials if t.seed is not None}
    whole = len(found) == len(s.trials) > 1 and len({t.weights for t in s.trials}) == 1
    return found if whole else {}


def _pairs(a: Summary, b: Summary) -> list[float]:
    """a − b by evaluation seed, where both sides have the same."""
    first, second = paired_seeds(a), paired_seeds(b)
    if first.keys() != second.keys():
        return []
    return [round(first[seed] - second[seed], 9) for seed in first]  # rounding errors are no spread


def _unknown(a: Summary, b: Summary, names: tuple[str, str]) -> list[str]:
    """Which spread nothing is known of, and for whom."""
    pretraining = [n for s, n in zip((a, b), names) if not s.complete and any(t.weights for t in s.trials)]
    seeds = [n for s, n in zip((a, b), names) if s.variance is None]
    return [
        f"the spread over {what} is unknown for {' and '.join(who)}"
        for what, who in (("pretraining", pretraining), ("seeds", seeds))
        if who
    ]
