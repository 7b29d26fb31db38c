"""Numbers that describe an embedding's spectrum, and whether it has collapsed.

Letters of shapes: N images, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLLAPSED_SPREAD = 1e-3
COLLAPSED_RANK_SHARE = 0.02


@torch.no_grad()
def diagnose(z_ND: Tensor) -> dict[str, float]:
    """How the spectrum of one embedding looks; float64, one Gram matrix and one eigh of min(N, D) each.

    For collapse, from the covariance of the column-centred embeddings (a feature minus its mean over the
    batch), whose min(N − 1, D) largest eigenvalues λ are the ones that can differ from zero:

    - condition_number: λ_max / λ_min over them, at most 1 / epsilon of float64 (4.5e15), so always finite;
    - stable_rank: Σ λ / λ_max, between 1 and min(N − 1, D);
    - largest_share: λ_max / Σ λ;
    - rankme: exp(−Σ p log p) with p = σ / Σ σ + 1e-7, σ the singular values of Z as it is, uncentred:
      Eq. 1 and 2 of Garrido et al., "RankMe", ICML 2023, https://arxiv.org/abs/2210.02885;
    - spread: 1 − ‖mean of the embeddings scaled to length 1‖², 0 when all point the same way.

    For modulation, from the N x N covariance of the row-centred embeddings (an embedding minus its features'
    mean), the one that channel whitening and so INTL acts on, over its min(N, D − 1) largest eigenvalues:

    - row_condition_number: as above;
    - row_entropy_rank: exp of the entropy of λ / Σ λ; it is min(N, D − 1) when all are equal.

    An embedding of zeros has condition numbers at their limit, ranks of 1, a share of 1 and no spread.
    """
    if z_ND.ndim != 2 or min(z_ND.shape) < 2:
        raise ValueError(f"embeddings must be N x D with N, D >= 2, got shape {tuple(z_ND.shape)}")
    z = z_ND.detach().double()
    n, d = z.shape
    columns = squared_singular_values(z - z.mean(0))[: min(n - 1, d)]
    rows = squared_singular_values(z - z.mean(1, keepdim=True))[: min(n, d - 1)]
    unit = torch.nn.functional.normalize(z, dim=1)
    return {
        "condition_number": condition_number(columns),
        "stable_rank": _ratio(columns.sum(), columns[0], empty=1.0),
        "largest_share": _ratio(columns[0], columns.sum(), empty=1.0),
        "rankme": entropy_rank(squared_singular_values(z).sqrt(), epsilon=1e-7),
        "spread": 1 - float(unit.mean(0).square().sum()) if bool(z.any()) else 0.0,
        "row_condition_number": condition_number(rows),
        "row_entropy_rank": entropy_rank(rows),
    }


def collapse(diagnosis: dict[str, float], *, n: int, d: int) -> str | None:
    """One sentence when the N x D embedding so diagnosed has collapsed, fully or in dimension; else None.

    Fully: all point the same way (spread under 0.001). In dimension: RankMe under 2 or 2 % of min(N, D).
    """
    if not all(math.isfinite(v) for v in diagnosis.values()):
        return "the embedding is not finite"
    if diagnosis["spread"] < COLLAPSED_SPREAD:
        return f"full collapse: all embeddings point the same way (spread {diagnosis['spread']:.2g})"
    least = max(2.0, COLLAPSED_RANK_SHARE * min(n, d))
    if diagnosis["rankme"] < least:
        return f"dimensional collapse: RankMe {diagnosis['rankme']:.1f}, less than {least:.1f} of {min(n, d)}"
    return None


def squared_singular_values(z: Tensor) -> Tensor:
    """min(N, D) of N x D values, the largest first, from the smaller Gram matrix.

    What rounding makes negative is 0; all are NaN where a value is not finite.
    """
    gram = z @ z.mT if z.shape[0] <= z.shape[1] else z.mT @ z
    if not torch.isfinite(gram).all():
        return torch.full(gram.shape[:1], torch.nan, dtype=z.dtype, device=z.device)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def condition_number(eigenvalues: Tensor) -> float:
    """λ_max / λ_min of eigenvalues, the largest first, at most 1 / epsilon of their dtype."""
    eps = torch.finfo(eigenvalues.dtype).eps
    return _ratio(eigenvalues[0], torch.maximum(eigenvalues[-1], eps * eigenvalues[0]), empty=1 / eps)


def entropy_rank(values: Tensor, *, epsilon: float = 0.0) -> float:
    """exp of the entropy of λ / Σ λ + epsilon, between 1 and their number.

    The effective rank of Roy and Vetterli, EUSIPCO 2007, of eigenvalues in place of singular values.
    """
    total = values.sum()
    if total == 0:
        return 1.0
    share = values / total + epsilon
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def _ratio(above: Tensor, below: Tensor, *, empty: float) -> float:
    return float(above / below) if below != 0 else empty
