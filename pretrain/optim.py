"""The optimizer, and the schedules of learning rate and EMA momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


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
    model: nn.Module, *, name: str, momentum: float, weight_decay: float, decay_1d: bool = False
) -> torch.optim.Optimizer:
    """ "sgd" (fused) or "lars", its learning rate set before each step."""
    groups = parameter_groups(model, weight_decay=weight_decay, decay_1d=decay_1d)
    if name == "lars":
        return LARS(groups, lr=0.0, momentum=momentum)
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates, https://arxiv.org/abs/1708.03888, in the form of Barlow Twins and VICReg.

    For a weight w (2 or more dimensions) with gradient g + weight_decay · w, the update is scaled by
    eta · ‖w‖ / ‖g + weight_decay · w‖, then goes through momentum; 1-d parameters take plain SGD.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad.add(p, alpha=group["weight_decay"])
                if p.ndim > 1:
                    w_norm, u_norm = p.norm(), update.norm()
                    ratio = group["eta"] * w_norm / u_norm
                    update = update * torch.where((w_norm > 0) & (u_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.sub_(state["momentum_buffer"], alpha=group["lr"])
