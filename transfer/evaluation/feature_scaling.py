"""Rows of a matrix of features, scaled as they are read: the matrix may be a mapped file larger than memory.

N images, D features, B rows of a batch or block. Sums and products are in float64; what is read is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24  # of one block in float64
Scaling = Literal["none", "standardise", "l2", "centred l2"]
Scaled = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ScaledRows:
    """The rows `rows_N` of `x_ND` through `scaled`; `x_ND` itself stays as it is."""

    x_ND: np.ndarray
    rows_N: np.ndarray
    scaled: Scaled

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def shape(self) -> tuple[int, int]:
        """N, D."""
        return len(self), self.x_ND.shape[1]

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        """B x D, float32, a copy."""
        return self.scaled(self.x_ND[self.rows_N[which]]).astype(np.float32, copy=False)

    def on(self, device: torch.device) -> Tensor:
        """All of them, N x D, on `device`."""
        whole_ND = torch.empty(self.shape, device=device)
        for rows in _blocks(*self.shape):
            whole_ND[rows] = torch.from_numpy(self[rows])
        return whole_ND


def scaling(kind: Scaling, x_ND: np.ndarray, rows_N: np.ndarray) -> Scaled:
    """What scales B x D features as a protocol says; mean and deviation are those of the rows given."""
    if kind == "standardise":
        mean_D, std_D = mean_and_std(x_ND, rows_N)
        # 0 for a feature that never changed: it says nothing, whatever it is elsewhere
        changes = std_D > 1e-6 * float(std_D.max())
        scale_D = np.divide(1.0, std_D, out=np.zeros_like(std_D), where=changes)
        return lambda x_BD: (x_BD - mean_D) * scale_D
    if kind == "centred l2":
        return lambda x_BD: of_unit_length(x_BD - x_BD.mean(1, keepdims=True, dtype=np.float64))
    return of_unit_length if kind == "l2" else unscaled


def unscaled(x_BD: np.ndarray) -> np.ndarray:
    """As they are."""
    return x_BD


def mean_and_std(x_ND: np.ndarray, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) standard deviation of each feature, float64, in two passes over the rows."""

    def blocks() -> Iterator[np.ndarray]:
        return (x_ND[rows_N[b]].astype(np.float64) for b in _blocks(len(rows_N), x_ND.shape[1]))

    zero_D = np.zeros(x_ND.shape[1])
    mean_D = sum((x.sum(0) for x in blocks()), zero_D) / len(rows_N)
    return mean_D, np.sqrt(sum((np.square(x - mean_D).sum(0) for x in blocks()), zero_D) / len(rows_N))


def of_unit_length(x_BD: np.ndarray, *, plus: float = 0.0) -> np.ndarray:
    """A copy in float64 with each row divided by its length + plus; a row of zeros stays as it is."""
    x_BD = x_BD.astype(np.float64)
    length = np.linalg.norm(x_BD, axis=1, keepdims=True) + plus
    x_BD /= np.where(length > 0, length, 1.0)
    return x_BD


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (8 * width))
    return (slice(start, start + step) for start in range(0, rows, step))
