"""Means and spreads of trials, and whether a difference is more than noise."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy import stats

SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One trained and judged model."""

    value: float
    """Percent."""
    images: int
    """Images judged."""
    seed: int | None
    """Seed of the evaluation's training; None where the evaluation has no randomness."""
    sha256: str
    """Of the weights; empty for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Trials of one method in one task under one protocol."""

    trials: tuple[Trial, ...]
    proportion: bool
    """Whether the metric is a share of images judged right (top-1), so that a binomial error exists."""

    @property
    def n(self) -> int:
        return len(self.trials)

    @property
    def values(self) -> list[float]:
        return [t.value for t in self.trials]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over trials (n − 1); None for a single one."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def binomial_error(self) -> float | None:
        """Of a share of images, from their number alone: 100 √(p (1 − p) / images)."""
        return binomial_error(self.mean, self.trials[0].images) if self.proportion else None

    @property
    def over(self) -> str:
        """What differs between the trials."""
        weights = len({t.sha256 for t in self.trials}) > 1
        seeds = len({t.seed for t in self.trials}) > 1
        if self.n == 1:
            return "deterministic" if self.trials[0].seed is None else "one seed"
        if weights and seeds:
            return "pretraining and evaluation seeds"
        return "pretraining seeds" if weights else "evaluation seeds"

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
    """Its spread, and how it was found."""
    verdict: str
    """'beyond noise', 'within noise' or 'cannot be told'."""
    reason: str
    """The test's numbers, or why there is no test."""


def compare(a: Summary, b: Summary) -> Difference:
    """Welch's t test where both have two trials or more; else binomial errors, or the reason why neither.

    Trials share their test images, so a spread over seeds leaves out the images' own: of a top-1, a
    difference must also exceed twice its binomial error. (Both sides judge the same images, which makes the
    true error of the difference smaller than this one.)

    Welch (1947): t = (x̄ − ȳ) / √(s_x²/n_x + s_y²/n_y), degrees of freedom by Welch-Satterthwaite.
    """
    points = a.mean - b.mean
    if a.n > 1 and b.n > 1:
        return _welch(a, b, points)
    which = f"n = {a.n} against {b.n}"
    ratio = _binomial_ratio(a, b)
    if ratio is not None:
        error = math.hypot(a.binomial_error or 0, b.binomial_error or 0)
        return Difference(
            points=points,
            spread=f"SE {error:.2f} (binomial)",
            verdict="beyond noise" if ratio > 2 else "within noise",
            reason=f"{ratio:.1f} binomial standard errors; no Welch test: {which}, "
            "so the spread over training seeds is unknown",
        )
    return Difference(
        points=points, spread="unknown", verdict="cannot be told",
        reason=f"no test: {which}, at least two trials of each are needed" + _by_seed(a, b),
    )  # fmt: skip


def _welch(a: Summary, b: Summary, points: float) -> Difference:
    assert a.std is not None and b.std is not None
    variances = a.std**2 / a.n, b.std**2 / b.n
    error = math.sqrt(sum(variances))
    if error == 0:
        return Difference(
            points=points, spread="0", verdict="cannot be told",
            reason=f"no test: no spread among {a.n} and {b.n} trials" + _by_seed(a, b),
        )  # fmt: skip
    t = points / error
    df = sum(variances) ** 2 / (variances[0] ** 2 / (a.n - 1) + variances[1] ** 2 / (b.n - 1))
    p = 2 * float(stats.t.sf(abs(t), df))
    margin = error * float(stats.t.ppf(1 - SIGNIFICANCE / 2, df))
    ratio = _binomial_ratio(a, b)
    clear = p < SIGNIFICANCE and (ratio is None or ratio > 2)
    reason = f"Welch t = {t:.2f}, df = {df:.1f}, p = {p:.3g}, n = {a.n} and {b.n}"
    reason += "" if ratio is None else f"; {ratio:.1f} binomial standard errors"
    if "evaluation seeds" in (a.over, b.over):
        reason += "; over evaluation seeds: pretraining again may differ more"
    return Difference(
        points=points,
        spread=f"95 % CI {points - margin:+.2f} to {points + margin:+.2f}",
        verdict="beyond noise" if clear else "within noise",
        reason=reason + _by_seed(a, b),
    )


def _binomial_ratio(a: Summary, b: Summary) -> float | None:
    """|a − b| in binomial standard errors of the difference; None where the metric is no share of images."""
    if a.binomial_error is None or b.binomial_error is None:
        return None
    error = math.hypot(a.binomial_error, b.binomial_error)
    return abs(a.mean - b.mean) / error if error else math.inf


def _by_seed(a: Summary, b: Summary) -> str:
    """How often `a` is higher where both ran the same evaluation seeds once each."""
    first, second = _seed_values(a.trials), _seed_values(b.trials)
    if not first or not second or set(first) != set(second):
        return ""
    higher = sum(first[s] > second[s] for s in first)
    return f"; higher in {higher} of {len(first)} seed{'s' if len(first) > 1 else ''}"


def _seed_values(trials: Sequence[Trial]) -> dict[int, float]:
    """Value by seed; empty where a seed is missing or occurs twice."""
    values = {t.seed: t.value for t in trials if t.seed is not None}
    return values if len(values) == len(trials) else {}  # type: ignore[return-value]
