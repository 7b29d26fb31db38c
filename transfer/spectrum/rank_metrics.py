"""Metrics of the eigenvalues of one set of features: how many directions it uses, and how evenly.

Letters of shapes: N images, D features, M eigenvalues.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.objectives.diagnostics import condition_number, entropy_rank, squared_singular_values

EPSILON = 1e-7
"""Added to each share by RankMe and LiDAR."""


def spectrum(x_ND: np.ndarray | Tensor) -> Tensor:
    """The min(N − 1, D) largest eigenvalues of the features' covariance (divisor N), the largest first.

    float64, from the smaller of the N x N and D x D matrices. Raises ValueError unless N and D are 2 or more.
    """
    x = as_matrix(x_ND)
    return squared_singular_values(x - x.mean(0))[: min(len(x) - 1, x.shape[1])] / len(x)


def as_matrix(x_ND: np.ndarray | Tensor) -> Tensor:
    """Features in float64. Raises ValueError for another shape than N x D with N, D >= 2."""
    x = torch.as_tensor(np.asarray(x_ND)).double()
    if x.ndim != 2 or min(x.shape) < 2:
        raise ValueError(f"features must be N x D with N, D >= 2, got shape {tuple(x.shape)}")
    return x


def rank_metrics(x_ND: np.ndarray | Tensor, *, decay_range: tuple[int, int] = (11, 100)) -> dict[str, float]:
    """Every metric of this module, of N x D features; those of a spectrum of zeros are at their limits."""
    x = as_matrix(x_ND)
    values_M = spectrum(x)
    return {
        "rankme": rankme(x), "decay": decay(values_M, decay_range), "stable_rank": stable_rank(values_M),
        "entropy_rank": entropy_rank(values_M), "condition_number": condition_number(values_M),
        "largest_share": float(values_M[0] / values_M.sum()) if values_M[0] > 0 else 1.0,
    }  # fmt: skip


def rankme(x_ND: np.ndarray | Tensor) -> float:
    """RankMe: exp(−Σ p log p) with p = σ / Σ σ + 1e-7, σ the singular values of Z as it is, uncentred.

    Eq. 1 and 2 of Garrido et al., "RankMe", ICML 2023, https://arxiv.org/abs/2210.02885. Between 1 and
    min(N, D); it grows with N until N is several times D.
    """
    return entropy_rank(squared_singular_values(as_matrix(x_ND)).sqrt(), epsilon=EPSILON)


def decay(values_M: Tensor, places: tuple[int, int] = (11, 100)) -> float:
    """α of λ_i ∝ i^−α, by least squares of log λ_i on log i with weights 1 / i, over the places given.

    α-ReQ, Agrawal et al., NeurIPS 2022; https://github.com/arnab39/reptrix (`alpha.py`)
    fits the 11th to the 100th eigenvalue. Where there are fewer the range ends at the last positive one; NaN
    with fewer than three in it.
    """
    positive = int((values_M > values_M[0] * torch.finfo(torch.float64).eps).sum())
    last = min(places[1], positive)
    if last - places[0] < 2:
        return float("nan")
    i = torch.arange(places[0], last + 1, dtype=torch.float64)
    x, y = i.log(), values_M[places[0] - 1 : places[0] - 1 + len(i)].log()
    weight = 1 / i / (1 / i).sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


def stable_rank(values_M: Tensor) -> float:
    """Σ λ / λ_max, between 1 and M: ‖Z‖_F² / ‖Z‖₂² (Rudelson and Vershynin 2007, https://arxiv.org/abs/math/0503442)."""
    return float(values_M.sum() / values_M[0]) if values_M[0] > 0 else 1.0
