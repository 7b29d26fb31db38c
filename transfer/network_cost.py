"""How large a network is, and how much it computes for one image."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

logger = logging.getLogger(__name__)

_COUNTED: dict[tuple[Hashable, int], dict[str, int]] = {}


def network_cost(
    model: nn.Module, size: int, *, key: Hashable, fitted: Callable[[nn.Module], nn.Module]
) -> dict[str, int]:
    """`parameters` of a network, and `multiply_adds` of its forward pass over one image of `size` px.

    Multiply-adds are those of convolutions and matrix products, attention's among them: a product and its sum
    are one, where PyTorch's counter has two operations. They are left out where the network cannot be
    followed. Nothing is computed: `fitted` gets a copy without numbers, and returns it made for the size.
    Networks of one `key` are counted once.
    """
    if (key, size) not in _COUNTED:
        found = {"parameters": sum(p.numel() for p in model.parameters())}
        try:
            hollow = fitted(_hollow(model))
            with FlopCounterMode(display=False) as counter:
                hollow(torch.zeros(1, 3, size, size, device="meta"))
            found["multiply_adds"] = counter.get_total_flops() // 2
        except Exception as error:  # a user's own network may do anything: no figure is lost for a count
            logger.debug("multiply-adds of %s: %s", type(model).__name__, error)
        _COUNTED[key, size] = found
    return _COUNTED[key, size]


def _hollow(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters and buffers have shapes and no memory."""
    instead: dict[int, torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        wants = tensor.requires_grad
        instead[id(tensor)] = nn.Parameter(empty, wants) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, instead).eval()  # type: ignore[arg-type]
