"""Intervals of metrics over images, from random halves of them.

Drawing with replacement, the usual bootstrap, repeats images, and a rank over repeated images is too small
by construction. The variance of a mean over half of N images, drawn without replacement, around that over
all is that of the mean itself: half-sampling gives the bootstrap's standard error without repetition
(Politis, Romano and Wolf, "Subsampling", 1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from transfer.correlation import Z


def intervals(
    metrics: Callable[[np.ndarray], Mapping[str, float]],
    n: int,
    *,
    repeats: int,
    seed: int = 0,
    told: Callable[[], object] = lambda: None,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics of n images, and their 95 % intervals: value ± 1.96 standard deviations over random halves.

    `metrics` gives them of some images by position; `told` is called after each time. No interval for what
    is not finite in all halves.
    """
    generator = np.random.default_rng(seed)
    whole = dict(metrics(np.arange(n)))
    told()
    halves = []
    for _ in range(repeats):
        halves.append(metrics(np.sort(generator.permutation(n)[: n // 2])))
        told()
    found = {}
    for name, value in whole.items():
        values = [half.get(name, math.nan) for half in halves]
        if np.isfinite([value, *values]).all():
            margin = Z * float(np.std(values, ddof=1))
            found[name] = (value - margin, value + margin)
    return whole, found
