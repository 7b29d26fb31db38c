"""A ResNet's tensors under timm's names and under detectron2's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.common.errors import UserError

BLOCKS_OF_DEPTH = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}  # fmt: skip

_NAMES = (
    ("conv1.weight", "stem.conv1.weight"),
    ("bn1.{leaf}", "stem.conv1.norm.{leaf}"),
    ("layer{stage}.{block}.conv{i}.weight", "res{stage}.{block}.conv{i}.weight"),
    ("layer{stage}.{block}.bn{i}.{leaf}", "res{stage}.{block}.conv{i}.norm.{leaf}"),
    ("layer{stage}.{block}.downsample.0.weight", "res{stage}.{block}.shortcut.weight"),
    ("layer{stage}.{block}.downsample.1.{leaf}", "res{stage}.{block}.shortcut.norm.{leaf}"),
)
"""timm's name and detectron2's of every tensor; detectron2 counts its stages from 2, timm from 1."""
_PARTS = {
    "block": r"\d+", "i": "[1-3]", "leaf": "weight|bias|running_mean|running_var|num_batches_tracked",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What detectron2's config must say of a ResNet."""

    depth: int
    num_groups: int
    width_per_group: int
    res2_out_channels: int

    def options(self, *, stride_in_1x1: bool = False) -> dict[str, Any]:
        """The keys and values of detectron2's config."""
        return {
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.NUM_GROUPS": self.num_groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self.width_per_group,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.res2_out_channels,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
            "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1,
        }

    def timm_arch(self) -> str:
        """timm's name of it."""
        names = {
            (1, 64): f"resnet{self.depth}",
            (1, 128): f"wide_resnet{self.depth}_2",
            (32, 4): f"resnext{self.depth}_32x4d",
            (32, 8): f"resnext{self.depth}_32x8d",
            (64, 4): f"resnext{self.depth}_64x4d",
        }
        kind = (self.num_groups, self.width_per_group)
        if kind not in names:
            raise UserError(f"timm has no ResNet-{self.depth} of {kind[0]} groups {kind[1]} wide")
        return names[kind]


def to_detectron2(state_dict: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A timm ResNet's tensors under detectron2's names, the classifier left out.

    Raises UserError with the reason where detectron2's ResNet cannot represent the network.
    """
    backbone = {k: v for k, v in state_dict.items() if not k.startswith("fc.")}
    _refuse_other_stems(backbone)
    renamed = _rename(backbone, to_timm=False)
    shape_of(renamed)
    return {k: v.detach().cpu().numpy() for k, v in renamed.items()}


def from_detectron2(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The backbone in a detectron2 state dict (bare, or inside a C4 or FPN detector) under timm's names.

    A frozen BatchNorm has no batch counter: it gets 0.
    """
    bare: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = re.sub(r"^(backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5\.\d))", "", key)
        if re.match(r"(stem|res[2-5])\.", name):
            bare[name] = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    if not bare:
        raise UserError(
            "no tensor is named stem.* or res2.* to res5.*: this is no detectron2 ResNet "
            "(files of Detectron1 and Caffe2 are not read)"
        )
    renamed = _rename(bare, to_timm=True)
    for key in [k for k in renamed if k.endswith("running_mean")]:
        renamed.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return renamed


def shape_of(backbone: Mapping[str, Tensor | np.ndarray]) -> Shape:
    """Depth, groups and width from detectron2-named tensors."""
    counts = tuple(len({k.split(".")[1] for k in backbone if k.startswith(f"res{i}.")}) for i in (2, 3, 4, 5))
    bottleneck = "res2.0.conv3.weight" in backbone
    depths = [d for d, blocks in BLOCKS_OF_DEPTH.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depths or "stem.conv1.weight" not in backbone:
        raise UserError(
            f"stages of {counts} {'bottleneck' if bottleneck else 'basic'} blocks: detectron2 builds "
            "ResNet-18, 34, 50, 101 and 152 only; convert a backbone of one of these depths, complete"
        )
    out, inner = backbone["res2.0.conv1.weight"].shape[0], backbone["res2.0.conv2.weight"].shape
    return Shape(
        depth=depths[0],
        num_groups=out // inner[1] if bottleneck else 1,
        width_per_group=int(inner[1]),
        res2_out_channels=int(backbone["res2.0.conv3.weight"].shape[0]) if bottleneck else int(inner[0]),
    )


def _refuse_other_stems(backbone: Mapping[str, Tensor]) -> None:
    if any(k.startswith("conv1.0.") for k in backbone):
        raise UserError(
            "a deep stem (three 3x3 convolutions, timm's -d variants): detectron2's ResNet has one 7x7 "
            "convolution; evaluate this backbone with knn or linear instead"
        )
    first = backbone.get("conv1.weight")
    if first is not None and tuple(first.shape[1:]) != (3, 7, 7):
        size = "x".join(map(str, first.shape[2:]))
        raise UserError(
            f"a stem with a {size} convolution of {first.shape[1]} channels (a CIFAR stem): detectron2's "
            "ResNet has one 7x7 convolution of 3; pretrain with the ImageNet stem to go on to detection"
        )


def _rename(state: Mapping[str, Tensor], *, to_timm: bool) -> dict[str, Tensor]:
    """`state` under the other library's names. Raises UserError for a key that has no counterpart."""
    stages, shift = ("[2-5]", -1) if to_timm else ("[1-4]", 1)
    parts = {name: f"(?P<{name}>{values})" for name, values in {"stage": stages, **_PARTS}.items()}
    pairs = [pair[::-1] if to_timm else pair for pair in _NAMES]
    rules = [(re.compile(old.replace(".", r"\.").format(**parts)), new) for old, new in pairs]
    renamed: dict[str, Tensor] = {}
    foreign = []
    for key, value in state.items():
        for pattern, new in rules:
            if match := pattern.fullmatch(key):
                found = match.groupdict()
                stage = int(found.pop("stage", 0)) + shift
                renamed[new.format(stage=stage, **found)] = value
                break
        else:
            foreign.append(key)
    if foreign:
        raise UserError(
            f"{'timm' if to_timm else 'detectron2'}'s ResNet has no counterpart of {', '.join(foreign[:3])}"
            f"{' ...' if len(foreign) > 3 else ''} ({len(foreign)} tensors)"
        )
    return renamed
