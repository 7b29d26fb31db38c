"""The timm ResNet, the projector, and the EMA target encoder.

Letters of shapes: N images, D embedding features.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from pretrain.common.errors import UserError

STEMS = ("imagenet", "cifar")
SHALLOW = ("resnet18", "resnet34")  # the published runs leave their residual branches' last BN at 1


def build_backbone(
    arch: str, *, stem: str = "imagenet", zero_init_last: bool | None = None, num_classes: int = 0
) -> ResNet:
    """A randomly initialised timm ResNet, global average pooling on: N x 3 x H x W -> N x num_features.

    `stem="cifar"` puts a 3x3 convolution of stride 1 and padding 2 in place of the 7x7 one and drops the
    max-pool: the effective padding of the released INTL code (https://github.com/winci-ai/INTL), so 32 x 32
    images give 34 x 34 maps. `zero_init_last=None` zeroes the last BN of the residual branches except for
    resnet18 and resnet34. Raises UserError for a name that is no ResNet of timm's.
    """
    if stem not in STEMS:
        raise UserError(f"unknown stem {stem!r}; choose one of: {', '.join(STEMS)}")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models("*resnet*"), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; take for example resnet18 or resnet50"
        raise UserError(f"timm has no architecture {arch!r}{hint}")
    if zero_init_last is None:
        zero_init_last = arch not in SHALLOW
    try:
        model = timm.create_model(arch, num_classes=num_classes, zero_init_last=zero_init_last)
    except TypeError:
        model = None
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise UserError(
            f"{arch} is not a timm ResNet with a plain stem; take for example resnet18 or resnet50"
        )
    if stem == "cifar":
        width = model.conv1.out_channels
        conv = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.add_module("conv1", conv)
        model.add_module("maxpool", nn.Identity())
    return model


def build_projector(features: int, *, hidden: int, output: int, layers: int) -> nn.Sequential:
    """`layers` linear layers, the hidden ones without bias, with BN and ReLU, the last one with bias."""
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        features = hidden
    return nn.Sequential(*modules, nn.Linear(features, output))


class Encoder(nn.Module):
    """Backbone and projector: views of any sizes -> embeddings, each view with its own BN statistics."""

    backbone: nn.Module
    projector: nn.Module

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """views: N x 3 x H x W each -> N x D each."""
        return [self.embed(view) for view in views]

    def embed(self, view: Tensor) -> Tensor:
        """N x 3 x H x W -> N x D."""
        return self.projector(self.backbone(view))

    def use_compiler(self) -> None:
        """Embed by kernels that torch.compile makes for each size of views."""
        self.embed = torch.compile(self.embed, dynamic=False)  # type: ignore[method-assign]


def target_encoder_of(encoder: Encoder) -> Encoder:
    """The EMA branch at its start: the same weights, no gradient, BN statistics of its own."""
    target = copy.deepcopy(encoder)
    return target.requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, fast: nn.Module, share: float | Tensor) -> None:
    """target <- (1 - share) · target + share · fast; BN statistics stay those of each branch.

    `share` is 1 - momentum; as a tensor it lies on the device, where a captured step reads it.
    """
    slow, new = ([p.detach() for p in network.parameters()] for network in (target, fast))
    weights: Any = [share] * len(slow) if isinstance(share, Tensor) else share
    torch._foreach_lerp_(slow, new, weights)
