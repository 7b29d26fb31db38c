"""SIGReg: embeddings whose projections on random directions are standard normal.

Letters of shapes: V views, n images of this rank, N of all, D features, K directions, T knots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.common.collectives import all_reduce
from pretrain.common.process_group import world_size
from pretrain.objectives.spectral import product
from pretrain.objectives.views import ObjectiveLoss, checked, stacked


def sigreg_loss(
    embeddings: Sequence[Tensor],
    *,
    weight: float = 0.05,
    directions: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    global_views: int | None = None,
    step: int = 0,
    momentum_target: bool = False,
) -> ObjectiveLoss:
    """The LeJEPA loss: SIGReg of each view, and the distance to the mean of the first `global_views` (all).

        0.05·mean_v SIGReg(z_v) + 0.95·MSE(z_v, mean of the global views)
        SIGReg(z) = mean_k N ∫_{−3}^{3} |φ̂_k(t) − e^{−t²/2}|² e^{−t²/2} dt
        φ̂_k(t) = mean_n exp(i t ⟨z_n, a_k⟩)

    a_k: 1,024 random directions of length 1, drawn anew for each `step` and alike on all ranks; the
    integral by the trapezoidal rule at 17 knots of [0, 3], twice. Balestriero and LeCun, "LeJEPA", 2025,
    https://arxiv.org/abs/2511.08544; https://github.com/rbalestr-lab/lejepa (`univariate/epps_pulley.py`,
    `multivariate/slicing.py`). Shapes, ranks and errors as in `pretrain.objectives.redundancy.vicreg_loss`;
    with `momentum_target` view 0 is a constant without SIGReg. Raises ValueError for `global_views` out of
    range.
    """
    with checked(embeddings):
        z_VnD = stacked(embeddings, momentum_target=momentum_target)
        v, n, d = z_VnD.shape
        if global_views is not None and not 1 <= global_views <= v:
            raise ValueError(f"global_views must lie between 1 and {v} views, got {global_views}")
        n *= world_size()
        centre_nD = z_VnD[:global_views].mean(0)
        alignment = (1 - weight) * all_reduce((z_VnD - centre_nD).square().sum()) / (v * n * d)
        a_DK = random_directions(d, directions, step=step, like=z_VnD)
        x_VnK = product(z_VnD[int(momentum_target) :].flatten(0, 1), a_DK).unflatten(0, (-1, len(centre_nD)))
        t_T = torch.linspace(0, t_max, knots, dtype=x_VnK.dtype, device=x_VnK.device)
        normal_T = (-t_T.square() / 2).exp()
        weights_T = torch.full_like(t_T, 2 * t_max / (knots - 1))  # of both signs of t
        weights_T[[0, -1]] /= 2
        angle = x_VnK[..., None] * t_T
        real_VKT, imaginary_VKT = all_reduce(torch.stack([angle.cos().sum(1), angle.sin().sum(1)])) / n
        error_VKT = (real_VKT - normal_T).square() + imaginary_VKT.square()
        penalty = weight * n * (error_VKT * (weights_T * normal_T)).sum(-1).mean()
        return ObjectiveLoss(alignment + penalty, alignment, penalty)


def random_directions(features: int, count: int, *, step: int, like: Tensor) -> Tensor:
    """D x K directions of length 1, the same for one step on every rank, of dtype and device of `like`."""
    generator = torch.Generator(device=like.device).manual_seed(step)
    a_DK = torch.randn(features, count, generator=generator, device=like.device).to(like.dtype)
    return a_DK / a_DK.norm(dim=0)
