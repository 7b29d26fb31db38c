"""This rank's images of one step: what the loader makes, and what is finished on the device.

Letters of shapes: N images, S side of a view in px.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.views.colours import Colours


class Place(NamedTuple):
    """Crops that are still to be taken, from images that lie together in memory."""

    image_N: Tensor
    """Which images."""
    box_N4: Tensor
    """Left, top, width and height, px."""


class Batch(NamedTuple):
    """This rank's views of one step."""

    views: list[Tensor]
    """N x S x S x 3 uint8 crops with `colours`, or N x 3 x S x S float32 finished ones without."""
    places: list[Place]
    """Where images lie on the device: the crops in place of `views`."""
    colours: list[Colours]
    broken: list[str]
    """Files that could not be read; the next readable image took their place."""


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed, in lists and named tuples however deep."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [each_tensor(v, change) for v in value]
    if isinstance(value, tuple):
        return type(value)(*(each_tensor(v, change) for v in value))
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All of them, in the order in which `each_tensor` meets them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each_tensor(value, note)
    return found


def moved(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`; from pinned memory the host does not wait for them."""
    return each_tensor(value, lambda tensor: tensor.to(device, non_blocking=True))
