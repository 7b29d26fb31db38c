"""The optimizer with its gradient scaler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
    """SGD, fused; its learning rate is set before each step.

    Momentum begins as zeros: torch would make it at the first step, of memory as it was found, and leave it
    so where float16's scaler skips that step.
    """
    groups = parameter_groups(model, weight_decay=weight_decay, decay_1d=decay_1d)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)
    if momentum:
        for p in (p for group in groups for p in group["params"]):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class Stepper:
    """An optimizer and its gradient scaler: what takes a step, and is saved and restored as one."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype` is what the forward pass computes in: float16 alone needs its gradients scaled."""
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss` in place of earlier ones."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def update(self, *rates: float | Tensor) -> None:
        """One step with these gradients, at one learning rate for each parameter group or one for all."""
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, rates if len(rates) > 1 else rates * len(groups), strict=True):
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:  # a captured step has its learning rate on the device
            group["lr"] = float(group["lr"])
        return {"optimizer": state, "scaler": self.scaler.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, in a checkpoint that may hold more."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
