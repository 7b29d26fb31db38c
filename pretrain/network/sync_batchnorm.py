"""BatchNorm over the joined batch of all ranks, on CPUs as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.common.collectives import all_reduce
from pretrain.common.process_group import world_size


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the joined batch of all ranks on CPU, where torch's SyncBatchNorm refuses to run.

    Same parameters, buffers and running statistics as `nn.BatchNorm*d`; evaluation, and training with one
    process, are nn.BatchNorm's own. Ranks may hold batches of different sizes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected N x C x ..., got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """N x C x ... normalised, computed in float32 or wider. In training all ranks must call."""
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
