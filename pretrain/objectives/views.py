"""What every objective does first with its views: check them, and bring those of all ranks together.

Letters of shapes: V views, N images of the global batch, n of this rank, D features, d this rank's share, M
the smaller of N and D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.common.collectives import all_reduce, gather_rows, split_features
from pretrain.common.process_group import world_size
from pretrain.objectives.spectral import no_autocast, product, wide


class ObjectiveLoss(NamedTuple):
    """total = alignment + penalty, both with their weights. Scalars of float32 (float64 for float64)."""

    total: Tensor
    alignment: Tensor
    """What brings the views of an image together."""
    penalty: Tensor
    """What keeps the embeddings from collapsing; 0 where that is no term of its own."""


class JoinedViews(NamedTuple):
    """The embeddings of V views on all ranks: all N images with this rank's share of the features."""

    z_VNd: Tensor
    total: Callable[[Tensor], Tensor]
    """Sums over all features what was summed over this rank's; all ranks must call."""
    features: int
    """D."""

    def with_values(self, z_VNd: Tensor) -> JoinedViews:
        """Other values of the same images and features."""
        return JoinedViews(z_VNd, self.total, self.features)

    def gram(self) -> Tensor:
        """V x M x M on the smaller side: Z Zᵀ (N x N) where N < D, else Zᵀ Z (D x D); one spectrum."""
        z = self.z_VNd
        if z.shape[1] < self.features:
            return self.total(product(z, z.mT))
        return product(z.mT, z)


def check_views(embeddings: Sequence[Tensor]) -> None:
    """Raises ValueError for fewer than two views, other shapes than N x D, or views that differ in one."""
    if len(embeddings) < 2:
        raise ValueError(f"the loss compares at least 2 views, got {len(embeddings)}")
    dtypes = {z.dtype for z in embeddings}
    if len(dtypes) > 1:
        raise ValueError(f"all views must have one dtype, got {sorted(map(str, dtypes))}")
    shapes = {tuple(z.shape) for z in embeddings}
    if len(shapes) > 1 or embeddings[0].ndim != 2:
        raise ValueError(f"all views must be N x D embeddings of one shape, got {sorted(shapes)}")


def checked(embeddings: Sequence[Tensor]) -> torch.autocast:
    """A block outside autocast for views that are as `check_views` wants them."""
    check_views(embeddings)
    return no_autocast(embeddings[0])


def joined(embeddings: Sequence[Tensor], *, momentum_target: bool) -> JoinedViews:
    """The views of all ranks in float32 (float64 if given), view 0 a constant with a momentum target.

    Where N < D each rank gets a share of the features, else all of them. All ranks must call, forward and
    backward, outside autocast. Raises ValueError as `check_views` does, and for fewer than 2 images or
    features.
    """
    z_VnD = stacked(embeddings, momentum_target=momentum_target)
    _, n, d = z_VnD.shape
    if n * world_size() < d:
        return JoinedViews(*all_images(z_VnD), d)
    return JoinedViews(gather_rows(z_VnD), lambda value: value, d)


def stacked(embeddings: Sequence[Tensor], *, momentum_target: bool) -> Tensor:
    """The views of this rank as one V x n x D tensor; raises as `joined` does."""
    n, d = embeddings[0].shape[0] * world_size(), embeddings[0].shape[1]
    if min(n, d) < 2:
        raise ValueError(f"embeddings must be N x D with N, D >= 2, got N = {n}, D = {d}")
    first = embeddings[0].detach() if momentum_target else embeddings[0]
    return torch.stack([wide(z) for z in (first, *embeddings[1:])])


def all_images(z_VnD: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """All images with this rank's share of the features, and how to sum what is added up over features.

    Where D does not divide by the number of ranks every rank gets all features, and the sum is there already.
    """
    if z_VnD.shape[2] % world_size() == 0:
        return split_features(z_VnD), all_reduce
    return gather_rows(z_VnD), lambda total: total


def of_both(penalty_V: Tensor, *, momentum_target: bool) -> Tensor:
    """The penalty of view 0 and that of another view, meant over the others; without a constant view 0."""
    others = penalty_V[1:].mean()
    return others if momentum_target else penalty_V[0] + others
