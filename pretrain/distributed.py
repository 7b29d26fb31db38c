"""Process groups: every helper answers with one process too.

Ranks come from the environment that torchrun, a job of this project or a test sets (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT); NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def is_on() -> bool:
    """Whether a process group is there."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    return dist.get_world_size() if is_on() else 1


def is_main() -> bool:
    return rank() == 0


def local_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(timeout_min: float = 30) -> Iterator[torch.device]:
    """Join the group that the environment names, if any, and leave it at the end; yields the device.

    A group that is already there (a job made it) is used and left in place.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own = not is_on() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_min))
    try:
        yield device
    finally:
        if own:
            dist.destroy_process_group()


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array as a tensor on `device`, or on its way there: the host does not wait for the GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def barrier() -> None:
    """Wait for every rank. All ranks must call."""
    if is_on():
        dist.barrier()


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


# Collectives with gradient. Convention: backward gives the gradient of the SUM of all ranks' losses with
# respect to this rank's tensor. Where every rank computes the same global loss that is world_size times its
# gradient, and DDP, which averages parameter gradients over ranks, turns it into exactly the loss's own.


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


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the joined batch of all ranks on CPU, where torch's SyncBatchNorm refuses to run.

    Same parameters, buffers and running statistics as `nn.BatchNorm*d`; evaluation, and training with one
    process, are nn.BatchNorm's own. Ranks may hold batches of different sizes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected N x C x ..., got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)
        over = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = torch.full((1,), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        sums = all_reduce(torch.cat([x.sum(over), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / total
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * total / (total - 1)).to(self.running_var), share)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm of `model` by one over all ranks: torch's on a GPU, ours on a CPU.

    Parameters and buffers are the same objects under the same names. Convert before DDP wraps the model.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if isinstance(model, _BatchNorm) and not isinstance(model, (SyncBatchNorm, nn.SyncBatchNorm)):
        new = SyncBatchNorm(
            model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats
        )
        new.__dict__.update(model.__dict__)
        return new
    for name, child in model.named_children():
        converted = convert_sync_batchnorm(child, device)
        if converted is not child:
            setattr(model, name, converted)
    return model
