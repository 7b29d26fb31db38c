"""The pooled outputs of several layers of a ResNet, or several tokens of a ViT, side by side.

A set of features goes by the names of its stages: layer4 is the backbone's own output (of any network), and
layer3+layer4 both; those of a ViT's tokens are in `transfer.evaluation.tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from pretrain.common.errors import UserError
from transfer.evaluation.tokens import Tokens, atoms, is_tokens, token_width

WINDOW = 6
STAGES = ("layer1", "layer2", "layer3", "layer4")
LAST = ("layer4",)
WINDOWS = ("layer4 6x6",)
"""The last stage's map averaged over windows of 6 x 6 px, stride 1: of a 7 x 7 map four numbers a channel."""


def stages_of(features: Sequence[str]) -> tuple[str, ...]:
    """The stages that sets of features are made of, in the network's order. Raises ValueError for others."""
    if features and all(map(is_tokens, features)) and len(set(features)) == len(features):
        return tuple(dict.fromkeys(atom for name in features for atom in atoms(name)))
    for name in features:
        parts = name.split("+")
        if parts != [s for s in STAGES if s in parts]:
            raise ValueError(
                f"features {name!r}: wanted one or more of {', '.join(STAGES)}, in order, by +, or a ViT's "
                "tokens alone (cls, patches, last4.cls, cls.unnormed ...)"
            )
    if not features or len(set(features)) < len(features):
        raise ValueError(f"features {list(features)}: wanted at least one set, and each once")
    return tuple(s for s in STAGES if any(s in name.split("+") for name in features))


def columns(features: str, widths: Mapping[str, int]) -> Tensor:
    """Where a set of features stands in the output of `Stages`, whose stages have these widths, in order."""
    starts, start = {}, 0
    for stage, width in widths.items():
        starts[stage] = torch.arange(start, start + width)
        start += width
    return torch.cat([starts[stage] for stage in (atoms if is_tokens(features) else _stages)(features)])


def _stages(features: str) -> tuple[str, ...]:
    return tuple(features.split("+"))


def network_of(backbone: nn.Module, stages: tuple[str, ...]) -> nn.Module:
    """The network that gives these stages side by side; for LAST the backbone itself."""
    if stages == LAST:
        return backbone
    return Tokens(backbone, stages) if stages[0].startswith("block-") else Stages(backbone, stages)


class Stages(nn.Module):
    """N x 3 x H x W -> N x D: the average-pooled outputs of `stages`, one after the other, in one pass.

    WINDOWS are flattened as N x C x 2 x 2 is. Raises UserError for images too small for them.
    """

    def __init__(self, backbone: nn.Module, stages: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.stages = backbone, tuple(stages)

    def forward(self, images: Tensor) -> Tensor:
        """N x 3 x H x W normalised -> N x D. Raises UserError for images too small for WINDOWS."""
        b = cast(Any, self.backbone)
        x = b.maxpool(b.act1(b.bn1(b.conv1(images))))
        pooled = []
        for stage in STAGES:
            x = getattr(b, stage)(x)
            if stage in self.stages:
                pooled.append(b.global_pool(x))
        if self.stages == WINDOWS:
            if min(x.shape[-2:]) < WINDOW:
                raise UserError(
                    f"windows of {WINDOW} x {WINDOW} do not fit the last map, {x.shape[-2]} x {x.shape[-1]}: "
                    "wanted larger images (--image-size 224)"
                )
            pooled.append(avg_pool2d(x, WINDOW, stride=1).flatten(1))
        return torch.cat(pooled, 1)


@torch.no_grad()
def widths_of(backbone: nn.Module, stages: Sequence[str], size: int) -> dict[str, int]:
    """Number of features of each stage, from images of `size` px.

    Raises UserError for stages of a network that is none of timm's.
    """
    if stages[0].startswith("block-"):
        Tokens(backbone, stages)  # refuses what has no such tokens
        return dict.fromkeys(stages, token_width(backbone))
    if not hasattr(backbone, "layer4") or not hasattr(backbone, "feature_info"):
        if tuple(stages) != LAST:
            raise UserError("this protocol reads layers of a timm ResNet; the network given is not one")
        image = next(backbone.parameters()).new_zeros(1, 3, size, size)
        return {LAST[0]: copy.deepcopy(backbone).eval()(image).shape[1]}
    image = next(backbone.parameters()).new_zeros(1, 3, size, size)
    if tuple(stages) == WINDOWS:
        return {WINDOWS[0]: Stages(copy.deepcopy(backbone).eval(), stages)(image).shape[1]}
    channels = {info["module"]: int(info["num_chs"]) for info in cast(Any, backbone).feature_info}
    return {stage: channels[stage] for stage in stages}
