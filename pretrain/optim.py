"""The optimizer, and the schedules of learning rate and EMA momentum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def lr_at(step: int, *, base: float, warmup: int, total: int, final_ratio: float = 0.001) -> float:
    """Linear warm-up to `base` over `warmup` steps, then a cosine to `final_ratio · base` at the last step.

    As in the released INTL code (main.py): step 0 has base / warmup, the last step the final value.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(total - warmup, 1)))
    return base * (cosine + final_ratio * (1 - cosine))


def ema_momentum_at(step: int, *, base: float, total: int) -> float:
    """From `base` at step 0 to 1 at `total`, by a cosine."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total))


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_1d: bool = False
) -> list[dict[str, Any]]:
    """Weights, and the 1-d parameters (biases, BN), which decay only with `decay_1d`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": weight_decay * decay_1d},
    ]


def build_optimizer(
    model: nn.Module, *, momentum: float, weight_decay: float, decay_1d: bool = False
) -> torch.optim.Optimizer:
    """SGD, fused; its learning rate is set before each step."""
    groups = parameter_groups(model, weight_decay=weight_decay, decay_1d=decay_1d)
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)
