"""A step that takes a known amount of memory, in a module that a fresh process imports at once."""

from __future__ import annotations

from collections.abc import Callable

import torch


def hold(mib: int) -> Callable[[], torch.Tensor]:
    """A function that fills `mib` MiB."""
    return lambda: torch.ones(mib * 2**18).sum()
