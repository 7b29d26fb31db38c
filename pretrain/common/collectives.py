"""Collectives, with and without gradient; each works with one process too.

Those with gradient: backward gives the gradient of the SUM of all ranks' losses with respect to this rank's
tensor. Where every rank computes the same global loss that is world_size times its gradient, and DDP, which
averages parameter gradients over ranks, turns it into exactly the loss's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.common.process_group import is_on, local_device, rank, world_size

ASK_RANKS_EVERY = {"cpu": 1, "cuda": 10}
"""By type of device: steps between two questions to all ranks, such as whether one was told to stop."""


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, without gradient, as a new tensor. All ranks must call."""
    total = value.detach().clone()
    if is_on():
        dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Whether `flag` is true on at least one rank. All ranks must call."""
    if not is_on():
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device or local_device())) > 0)


def gather_objects(value: Any) -> list[Any]:
    """What each rank holds, on all of them: small plain values. All ranks must call."""
    if not is_on():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_over_ranks(grad)


def all_reduce(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, with gradient. All ranks must call, forward and backward."""
    return _SumOverRanks.apply(value) if world_size() > 1 else value


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # gloo has no reduce-scatter: the whole sum, then this rank's rows.
        return sum_over_ranks(grad).chunk(world_size(), -2)[rank()].contiguous()


def gather_rows(value: Tensor) -> Tensor:
    """... x n x D of each rank to ... x N x D on all, N = world · n, with gradient. All ranks must call."""
    return _GatherRows.apply(value) if world_size() > 1 else value


class _SplitFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = torch.stack(value.chunk(world_size(), -1))  # W x V x n x D/W: part w goes to rank w
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return torch.cat(received.unbind(), -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = torch.stack(grad.chunk(world_size(), -2))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return torch.cat(received.unbind(), -1)


def split_features(value: Tensor) -> Tensor:
    """... x n x D of each rank to ... x N x D/world: all images, this rank's share of the features.

    One all-to-all, with gradient; D must divide by the number of ranks. All ranks must call.
    """
    return _SplitFeatures.apply(value) if world_size() > 1 else value
