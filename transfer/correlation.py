"""Kendall's τ with an interval: whether one figure orders checkpoints as another does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import kendalltau

FEWEST = 5
"""Of 4 pairs in perfect order the two-sided p is 2 / 4! = 0.083: no τ of fewer than 5 says anything."""
Z = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


def kendall(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float, float]:
    """Kendall's τ-b with a 95 % interval; None of fewer than FEWEST, or without an order.

    arctanh τ has the variance 0.437 / (n − 4) (Fieller, Hartley and Pearson 1957, Biometrika 44, 470–481). A
    τ of ±1, whose arctanh is infinite, is taken for that of half a discordant pair.
    """
    n = len(x)
    if n < FEWEST:
        return None, math.nan, math.nan
    tau = float(kendalltau(x, y).statistic)
    if math.isnan(tau):
        return None, math.nan, math.nan
    most = 1 - 2 / (n * (n - 1))
    z, margin = math.atanh(max(-most, min(most, tau))), Z * math.sqrt(0.437 / (n - 4))
    return tau, min(math.tanh(z - margin), tau), max(math.tanh(z + margin), tau)
