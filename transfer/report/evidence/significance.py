"""Levels of significance of differences, one or arrays of them, and Holm's correction of many."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

SIGNIFICANCE = 0.05
LEAST_P = 1e-300
MOST_Z = float(-special.ndtri(LEAST_P / 2))
STEPS = 60


def margin(variance: Any, df: Any, image: Any, level: float = SIGNIFICANCE) -> Any:
    """Half the width of the confidence interval of a difference at 1 − `level`, in percent points.

    √(t² · variance + z² · image): an estimated variance by Student's t, the known one of the images by the
    normal distribution, the two intervals joined in quadrature (Zou and Donner 2008, section 2,
    https://doi.org/10.1002/sim.3095). Arrays broadcast.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        student = np.where(np.asarray(variance) > 0, special.stdtrit(df, level / 2) ** 2 * variance, 0.0)
    return np.sqrt(student + special.ndtri(level / 2) ** 2 * image)


def p_values(points: Any, variance: Any, df: Any, image: Any) -> np.ndarray:
    """The level at which `margin` is |points|, not below LEAST_P. Arrays broadcast.

    In closed form where there is one variance alone. Else by Newton's method over z: margin² is convex in
    it, so that from the smaller of the two bounds that either variance alone gives it falls to the root.
    """
    x, variance, df, image = np.broadcast_arrays(
        *(np.asarray(v, np.float64) for v in (np.abs(points), variance, df, image))
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        by_images = np.where(x > 0, x / np.sqrt(image), 0.0)
        by_runs = np.where(variance > 0, -special.ndtri(special.stdtr(df, -x / np.sqrt(variance))), np.inf)
        z = np.minimum(np.minimum(by_images, by_runs), MOST_Z)
    joint = np.flatnonzero((variance > 0) & (image > 0) & (x > 0))
    found = z.ravel()  # a copy, or z itself, which is ours
    for _ in range(STEPS):
        if not joint.size:
            break
        at = (a.flat[joint] for a in (x, variance, df, image))
        step = _newton_step(found[joint], *at)
        found[joint] -= step
        joint = joint[step > 1e-12 * found[joint]]
    return np.maximum(2 * special.ndtr(-found), LEAST_P).reshape(x.shape)


def _newton_step(z: Any, x: Any, variance: Any, df: Any, image: Any) -> Any:
    """(t² · variance + z² · image − x²) over its derivative by z, with t of the same level as z."""
    t = -special.stdtrit(df, special.ndtr(-z))
    density = np.exp(special.gammaln((df + 1) / 2) - special.gammaln(df / 2)) / np.sqrt(np.pi * df)
    slope = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / (density * (1 + t**2 / df) ** (-(df + 1) / 2))
    return (t**2 * variance + z**2 * image - x**2) / (2 * (t * slope * variance + z * image))


def holm(p: np.ndarray) -> np.ndarray:
    """p values for as many comparisons as are tested at once (Holm 1979, www.jstor.org/stable/4615733).

    The i-th smallest of m, i from 0, is multiplied by m − i; none is below a smaller one's, none above 1. NaN
    is no test, and stays.
    """
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    corrected = np.full(len(p), np.nan)
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * factors))
    return corrected
