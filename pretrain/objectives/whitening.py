"""Objectives that compare whitened or otherwise transformed views, without a penalty of their own.

Letters of shapes: V views, n images of this rank, N of all ranks, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pretrain.common.collectives import gather_rows
from pretrain.objectives.spectral import (
    SpectralFunction,
    Whitening,
    spectral_transform,
    whiten,
    wide,
)
from pretrain.objectives.views import ObjectiveLoss, checked, stacked


def spectral_loss(
    embeddings: Sequence[Tensor],
    g: SpectralFunction,
    *,
    whitening: Whitening = "channel",
    momentum_target: bool = False,
) -> Tensor:
    """2 − 2·mean cos of views i >= 1 with view 0 after the transformation g, without a penalty.

    What Section 3 of the paper compares: g = λ^-1/2 is hard whitening. Shapes and ranks as in `intl_loss`;
    every rank transforms the embeddings of all. Raises ValueError as `intl_loss` and `spectral_transform` do.
    """
    with checked(embeddings):
        if momentum_target:
            embeddings = [embeddings[0].detach(), *embeddings[1:]]
        whole = [gather_rows(wide(z_nD)) for z_nD in embeddings]
        target_ND, *others = (spectral_transform(z_ND, g, whitening=whitening) for z_ND in whole)
        return torch.stack([2 - 2 * cosine_similarity(z, target_ND, dim=1).mean() for z in others]).mean()


def w_mse_loss(
    embeddings: Sequence[Tensor], *, sub_batch: int | None = None, momentum_target: bool = False
) -> ObjectiveLoss:
    """The W-MSE loss: the mean over pairs of views of 2 − 2·mean cos after whitening by Cholesky.

    Each view's sub-batches of `sub_batch` consecutive images (2·D unless given, N if that is less) are
    whitened by themselves: ẑ = L⁻¹ (z − mean), L Lᵀ the covariance. Ermolov et al., "Whitening for
    Self-Supervised Representation Learning", ICML 2021, https://arxiv.org/abs/2007.06346;
    their code (https://github.com/htdt/self-supervised, `methods/w_mse.py`) shuffles the batch first: here
    it is for the loader to shuffle. In float64 whatever is given; shapes and ranks as in `spectral_loss`.
    Raises ValueError for sub-batches that do not divide N or hold no more than D images, and for a
    covariance that is not positive definite.
    """
    with checked(embeddings):
        z_VND = gather_rows(stacked(embeddings, momentum_target=momentum_target))
        v, n, d = z_VND.shape
        size = min(n, 2 * d) if sub_batch is None else sub_batch
        if size <= d or n % size:
            raise ValueError(
                f"W-MSE whitens sub-batches of more than D = {d} images whose size divides N = {n}, got "
                f"{size}: take fewer features, or another batch or sub-batch"
            )
        z_VND = torch.stack([
            torch.cat([whiten(part, method="cholesky", whitening="batch") for part in z_ND.split(size)])
            for z_ND in z_VND.double()
        ])  # fmt: skip
        pairs = list(itertools.combinations(range(v), 2))
        loss = sum(2 - 2 * cosine_similarity(z_VND[i], z_VND[j], dim=1).mean() for i, j in pairs)
        total = torch.as_tensor(loss / len(pairs)).to(wide(embeddings[0].new_empty(0)).dtype)
        return ObjectiveLoss(total, total, torch.zeros_like(total))
