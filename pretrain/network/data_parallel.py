"""Networks of several ranks."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.common.process_group import world_size


def parallel(model: nn.Module, device: torch.device, *, broadcast_buffers: bool = False) -> nn.Module:
    """The model as it is called in training: in DDP where there are several ranks."""
    if world_size() > 1:
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=broadcast_buffers,
        )  # fmt: skip
    return model
