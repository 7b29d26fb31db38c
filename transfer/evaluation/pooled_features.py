"""The pooled outputs of several layers of a ResNet, side by side.

A set of features goes by the names of its stages: layer4 is the backbone's own output, layer3+layer4 both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
LAST = ("layer4",)


def stages_of(features: Sequence[str]) -> tuple[str, ...]:
    """The stages that sets of features are made of, in the network's order. Raises ValueError for others."""
    for name in features:
        parts = name.split("+")
        if parts != [s for s in STAGES if s in parts]:
            raise ValueError(f"features {name!r}: wanted one or more of {', '.join(STAGES)}, in order, by +")
    if not features or len(set(features)) < len(features):
        raise ValueError(f"features {list(features)}: wanted at least one set, and each once")
    return tuple(s for s in STAGES if any(s in name.split("+") for name in features))


def columns(features: str, widths: Mapping[str, int]) -> Tensor:
    """Where a set of features stands in the output of `Stages`, whose stages have these widths, in order."""
    found, start = [], 0
    for stage, width in widths.items():
        if stage in features.split("+"):
            found.append(torch.arange(start, start + width))
        start += width
    return torch.cat(found)


class Stages(nn.Module):
    """N x 3 x H x W -> N x D: the average-pooled outputs of `stages`, one after the other, in one pass."""

    def __init__(self, backbone: nn.Module, stages: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.stages = backbone, tuple(stages)

    def forward(self, images: Tensor) -> Tensor:
        b = cast(Any, self.backbone)
        x = b.maxpool(b.act1(b.bn1(b.conv1(images))))
        pooled = []
        for stage in STAGES:
            x = getattr(b, stage)(x)
            if stage in self.stages:
                pooled.append(b.global_pool(x))
        return torch.cat(pooled, 1)


def widths_of(backbone: nn.Module, stages: Sequence[str]) -> dict[str, int]:
    """Number of features of each stage."""
    channels = {info["module"]: int(info["num_chs"]) for info in cast(Any, backbone).feature_info}
    return {stage: channels[stage] for stage in stages}
