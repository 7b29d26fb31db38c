"""Scaling a matrix of features in place, with no second matrix of its size at any time.

N images, D features. Sums and products are in float64, a block of rows at a time; what is stored is of the
matrix's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK_BYTES = 1 << 24  # of one block in float64


def mean_and_std(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) standard deviation of each feature, float64, in two passes over the rows."""
    mean_D = sum((x.sum(0) for _, x in _blocks(x_ND)), np.zeros(x_ND.shape[1])) / len(x_ND)
    squares = (np.square(x - mean_D).sum(0) for _, x in _blocks(x_ND))
    return mean_D, np.sqrt(sum(squares, np.zeros(x_ND.shape[1])) / len(x_ND))


def standardise(x_ND: np.ndarray, mean_D: np.ndarray, std_D: np.ndarray) -> None:
    """(x - mean) / std in place; 0 for a feature that never changed: it says nothing, whatever it is here."""
    changes = std_D > 1e-6 * float(std_D.max())
    scale_D = np.divide(1.0, std_D, out=np.zeros_like(std_D), where=changes)
    for rows, x in _blocks(x_ND):
        x_ND[rows] = (x - mean_D) * scale_D


def to_unit_length(x_ND: np.ndarray, *, plus: float = 0.0) -> None:
    """Each row divided by its length + plus, in place; a row of zeros stays as it is."""
    for rows, x in _blocks(x_ND):
        length = np.linalg.norm(x, axis=1, keepdims=True) + plus
        x_ND[rows] = x / np.where(length > 0, length, 1.0)


def _blocks(x_ND: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Which rows, and these in float64."""
    step = max(1, BLOCK_BYTES // (8 * x_ND.shape[1]))
    for start in range(0, len(x_ND), step):
        rows = slice(start, start + step)
        yield rows, x_ND[rows].astype(np.float64)
