"""VICReg and Barlow Twins: objectives that drive a correlation matrix towards the identity.

Both penalise the squares off the diagonal of a D x D matrix. Where N < D these come from N x N Gram matrices,
Σ_ij C_ij² = tr(Z_a Z_aᵀ Z_b Z_bᵀ), less the diagonal's: a rank of at most N − 1 keeps that difference large.

Letters of shapes: V views, N images of the global batch, D features, d this rank's share of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.objectives.spectral import product
from pretrain.objectives.views import JoinedViews, ObjectiveLoss, checked, joined, of_both


def vicreg_loss(
    embeddings: Sequence[Tensor],
    *,
    similarity: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    momentum_target: bool = False,
) -> ObjectiveLoss:
    """The VICReg loss of view 0 with each other view, meant over those.

        25·MSE(z, z') + 25·[v(z) + v(z')] / 2 + c(z) + c(z')
        v(z) = Σ_j max(0, 1 − √(C_jj + 1e-4)) / D,   c(z) = Σ_{i≠j} C_ij² / D,   C the covariance over N − 1

    Eq. 1 to 6 of Bardes et al., "VICReg", ICLR 2022, https://arxiv.org/abs/2105.04906; as
    https://github.com/facebookresearch/vicreg has it, which halves v and not c. embeddings: V tensors n x
    D. With several ranks the loss and, after DDP's mean, the gradient are those of the joined batch; all
    ranks must call, forward and backward. With `momentum_target` view 0 is a constant and has no v and c.
    Raises ValueError as `pretrain.objectives.views.joined` does.
    """
    with checked(embeddings):
        views = joined(embeddings, momentum_target=momentum_target)
        z_VNd, total, d = views
        n = z_VNd.shape[1]
        mse_V = total((z_VNd[1:] - z_VNd[0]).square().sum((1, 2))) / (n * d)
        centred = views.with_values(z_VNd - z_VNd.mean(1, keepdim=True))
        variances_Vd = centred.z_VNd.square().sum(1) / (n - 1)
        hinge_V = total((1 - (variances_Vd + 1e-4).sqrt()).clamp_min(0).sum(1)) / d
        off_V = _off_diagonal(centred) / (n - 1) ** 2 / d
        alignment = similarity * mse_V.mean()
        penalty_V = variance / 2 * hinge_V + covariance * off_V
        penalty = of_both(penalty_V, momentum_target=momentum_target)
        return ObjectiveLoss(alignment + penalty, alignment, penalty)


def barlow_twins_loss(
    embeddings: Sequence[Tensor], *, off_diagonal: float = 0.0051, momentum_target: bool = False
) -> ObjectiveLoss:
    """The Barlow Twins loss of view 0 with each other view, meant over those.

        Σ_i (1 − C_ii)² + 0.0051·Σ_{i≠j} C_ij²,   C = Ẑᵀ Ẑ' / N,   ẑ = (z − mean) / √(variance over N + 1e-5)

    Eq. 1 and 2 of Zbontar et al., "Barlow Twins", ICML 2021, https://arxiv.org/abs/2103.03230; the
    standardisation is that of the BatchNorm layer in https://github.com/facebookresearch/barlowtwins.
    Shapes, ranks and errors as in `vicreg_loss`.
    """
    with checked(embeddings):
        views = joined(embeddings, momentum_target=momentum_target)
        z_VNd = views.z_VNd - views.z_VNd.mean(1, keepdim=True)
        n = z_VNd.shape[1]
        unit = views.with_values(z_VNd / (z_VNd.square().mean(1, keepdim=True) + 1e-5).sqrt())
        diagonal_Vd = (unit.z_VNd[1:] * unit.z_VNd[0]).sum(1) / n
        alignment = views.total((1 - diagonal_Vd).square().sum(1)).mean()
        penalty = off_diagonal * (_off_diagonal_with_first(unit) / n**2).mean()
        return ObjectiveLoss(alignment + penalty, alignment, penalty)


def _off_diagonal(views: JoinedViews) -> Tensor:
    """Σ_{i≠j} (Zᵀ Z)_ij² of each view (V)."""
    gram_VMM = views.gram()
    if gram_VMM.shape[1] == views.features:
        return _squares_off_diagonal(gram_VMM)
    return gram_VMM.square().sum((1, 2)) - views.total(views.z_VNd.square().sum(1).square().sum(1))


def _off_diagonal_with_first(views: JoinedViews) -> Tensor:
    """Σ_{i≠j} (Z_0ᵀ Z_a)_ij² of each view a >= 1 (V − 1)."""
    z_VNd = views.z_VNd
    if z_VNd.shape[1] >= views.features:
        return _squares_off_diagonal(product(z_VNd[:1].mT.expand(len(z_VNd) - 1, -1, -1), z_VNd[1:]))
    gram_VNN = views.gram()
    diagonal_Vd = (z_VNd[1:] * z_VNd[0]).sum(1)
    return (gram_VNN[1:] * gram_VNN[0]).sum((1, 2)) - views.total(diagonal_Vd.square().sum(1))


def _squares_off_diagonal(c_VDD: Tensor) -> Tensor:
    off = ~torch.eye(c_VDD.shape[1], dtype=torch.bool, device=c_VDD.device)
    return (c_VDD * off).square().sum((1, 2))
