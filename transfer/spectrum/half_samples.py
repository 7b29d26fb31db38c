"""Intervals of metrics over images, from random halves of them.

Drawing with replacement, the usual bootstrap, repeats images, and a rank over repeated images is too small
by construction. The variance of a mean over half of N images, drawn without replacement, around that over
all is that of the mean itself: half-sampling gives the bootstrap's standard error without repetition
(Politis, Romano and Wolf, "Subsampling", 1999).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from pretrain.common.machine import cores
from transfer.correlation import Z

MOST = 8  # halves at once: each has its features in float64, twice, and what is as large as D x D


def intervals(
    metrics: Callable[[np.ndarray], Mapping[str, float]],
    n: int,
    *,
    repeats: int,
    seed: int = 0,
    told: Callable[[], object] = lambda: None,
    ratios: Collection[str] = (),
    at_once: int = MOST,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics of n images, and their 95 % intervals: value ± 1.96 standard deviations over random halves.

    `metrics` gives them of some images by position, `at_once` times on as many cores; `told` is called after
    each time. The interval of a metric named in `ratios`, which spans magnitudes, is that of its logarithm.
    No interval for what is not finite in all halves.
    """
    generator = np.random.default_rng(seed)
    halves = [np.sort(generator.permutation(n)[: n // 2]) for _ in range(repeats)]
    found = []
    with _one_core_each(at_once) as pool:
        for values in pool.map(metrics, [np.arange(n), *halves]):
            found.append(values)
            told()
    whole, *of_halves = found
    values_of = {name: [half.get(name, math.nan) for half in of_halves] for name in whole}
    return dict(whole), {
        name: _around(whole[name], values, ratio=name in ratios)
        for name, values in values_of.items()
        if np.isfinite([whole[name], *values]).all()
    }


def _around(value: float, halves: list[float], *, ratio: bool) -> tuple[float, float]:
    if ratio and min(value, *halves) > 0:
        low, high = _around(math.log(value), [math.log(half) for half in halves], ratio=False)
        return math.exp(low), math.exp(min(high, 700.0))  # 1e304
    margin = Z * float(np.std(halves, ddof=1))
    return value - margin, value + margin


@contextlib.contextmanager
def _one_core_each(at_once: int) -> Iterator[ThreadPoolExecutor]:
    """Workers that share no operation: the metrics are many small ones, and threads that work together on
    each would wait at its end for one that another process has put off."""
    before = torch.get_num_threads()
    try:
        with threadpool_limits(1), ThreadPoolExecutor(min(cores(), at_once), initializer=_alone) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _alone() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)  # of this worker: scikit-learn has an OpenMP of its own
