"""FroSSL, MMCR and the coding rate: objectives that are a function of the spectrum and make it wide.

With λ the eigenvalues of a Gram matrix, on its smaller side (N x N or D x D, one spectrum but for zeros):
FroSSL has log Σ (λ/Σλ)², MMCR −Σ √λ, the coding rate −½ Σ log(1 + αλ).

Letters of shapes: V views, N images of the global batch, D features, d this rank's share of them, M the
smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.objectives.spectral import require_finite
from pretrain.objectives.views import JoinedViews, ObjectiveLoss, checked, joined

TINY = 1e-12
"""The least length that something is divided by, as in torch.nn.functional.normalize."""


def frossl_loss(
    embeddings: Sequence[Tensor], *, invariance: float = 1.0, momentum_target: bool = False
) -> ObjectiveLoss:
    """The FroSSL loss of V views.

        Σ_v log Σ_i (λ_vi / Σ_j λ_vj)² + V·D·Σ_v MSE(ẑ_v, mean of all ẑ),   ẑ: columns centred, of length 1

    λ_v are the eigenvalues of Ẑ_vᵀ Ẑ_v, and log Σ (λ/Σλ)² = 2 log ‖Ẑᵀ Ẑ‖_F − 2 log tr. Skean et al.,
    "FroSSL", ECCV 2024, https://arxiv.org/abs/2310.02903. For two views it is, but for a constant, the loss
    of https://github.com/OFSkean/FroSSL (`solo/losses/frossl.py`, linear kernel), whose columns have the
    length √D. Shapes, ranks and errors as in `pretrain.objectives.redundancy.vicreg_loss`; with
    `momentum_target` view 0 is a constant without entropy.
    """
    with checked(embeddings):
        views = joined(embeddings, momentum_target=momentum_target)
        v, n, _ = views.z_VNd.shape
        z_VNd = views.z_VNd - views.z_VNd.mean(1, keepdim=True)
        unit = views.with_values(z_VNd / z_VNd.norm(dim=1, keepdim=True).clamp_min(TINY))
        z_VNd = unit.z_VNd
        alignment = invariance * v / n * views.total((z_VNd - z_VNd.mean(0)).square().sum())
        gram_VMM = unit.gram()
        trace_V = gram_VMM.diagonal(dim1=1, dim2=2).sum(1)
        entropy_V = gram_VMM.square().sum((1, 2)).log() - 2 * trace_V.log()
        penalty = entropy_V[momentum_target:].sum()
        return ObjectiveLoss(alignment + penalty, alignment, penalty)


def mmcr_loss(
    embeddings: Sequence[Tensor], *, local: float = 0.0, momentum_target: bool = False
) -> ObjectiveLoss:
    """The MMCR loss of V views.

        −‖C‖_* + local·mean_n ‖Z_n‖_*,   C: the N x D means over views of embeddings of length 1,  Z_n: V x D

    Yerxa et al., "Learning Efficient Coding of Natural Images with Maximum Manifold Capacity
    Representations", NeurIPS 2023, https://arxiv.org/abs/2303.03307; `local` is 0 in their ImageNet runs
    (https://github.com/ThomasYerxa/mmcr, `pretrain_imagenet.py`). ‖C‖_* = Σ √λ of the smaller Gram matrix,
    in float64 whatever is given. Shapes, ranks and errors as in
    `pretrain.objectives.redundancy.vicreg_loss`; raises ValueError also where an embedding is not finite.
    The alignment is the local term: C alone aligns too.
    """
    with checked(embeddings):
        views = _unit_rows(joined(embeddings, momentum_target=momentum_target))
        z_VNd = views.z_VNd.double()
        penalty = -_nuclear_norm(views.with_values(z_VNd.mean(0, keepdim=True)).gram()).sum()
        alignment = torch.zeros_like(penalty)
        if local:
            gram_NVV = views.total(torch.einsum("vnd,wnd->nvw", z_VNd, z_VNd))
            alignment = local * _nuclear_norm(gram_NVV).mean()
        dtype = views.z_VNd.dtype
        return ObjectiveLoss(*(x.to(dtype) for x in (alignment + penalty, alignment, penalty)))


def coding_rate_loss(
    embeddings: Sequence[Tensor],
    *,
    epsilon: float = 0.2,
    invariance: float = 200.0,
    momentum_target: bool = False,
) -> ObjectiveLoss:
    """Minus the coding rate of V views, with their cosine to the mean view.

        −mean_v ½ Σ_i log(1 + α λ_vi) − 200·mean_vn cos(z_vn, mean_v z_vn),   α = D / (N·0.2),  ‖z‖ = 1

    λ_v are the eigenvalues of Z_vᵀ Z_v. Tong et al., "EMP-SSL", 2023, https://arxiv.org/abs/2304.03977,
    whose code (https://github.com/tsb0601/EMP-SSL, `loss.py`) has ε = 0.2 where the paper has ε². log det
    by Cholesky, in float64 whatever is given. Shapes, ranks and errors as in `mmcr_loss`; with
    `momentum_target` view 0 is a constant without a rate.
    """
    with checked(embeddings):
        views = _unit_rows(joined(embeddings, momentum_target=momentum_target))
        z_VNd, total, d = views
        n = z_VNd.shape[1]
        mean_Nd = z_VNd.mean(0)
        length_N = total(mean_Nd.square().sum(1)).clamp_min(TINY**2).sqrt()
        alignment = -invariance * (total((z_VNd * mean_Nd).sum(2)) / length_N).mean()
        gram_VMM = views.with_values(z_VNd.double()[int(momentum_target) :]).gram()
        require_finite(gram_VMM)
        eye = torch.eye(gram_VMM.shape[1], dtype=gram_VMM.dtype, device=gram_VMM.device)
        lower = torch.linalg.cholesky(eye + d / (n * epsilon) * gram_VMM)
        rate_V = lower.diagonal(dim1=1, dim2=2).log().sum(1)  # ½ log det = Σ log of Cholesky's diagonal
        penalty = -rate_V.mean().to(z_VNd.dtype)
        return ObjectiveLoss(alignment + penalty, alignment, penalty)


def _unit_rows(views: JoinedViews) -> JoinedViews:
    """Each embedding scaled to length 1."""
    squares_VN1 = views.total(views.z_VNd.square().sum(2, keepdim=True))
    return views.with_values(views.z_VNd / squares_VN1.clamp_min(TINY**2).sqrt())


def _nuclear_norm(gram_BMM: Tensor) -> Tensor:
    """Σ √λ of each Gram matrix (B); what rounding leaves of a zero eigenvalue counts as zero."""
    require_finite(gram_BMM)
    values_BM = torch.linalg.eigvalsh(gram_BMM)
    least_B1 = gram_BMM.shape[-1] * torch.finfo(gram_BMM.dtype).eps * values_BM[:, -1:]
    kept_BM = values_BM > least_B1.detach().clamp_min(0)
    return (torch.where(kept_BM, values_BM, 1.0).sqrt() * kept_BM).sum(1)
