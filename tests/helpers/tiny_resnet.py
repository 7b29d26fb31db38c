"""A ResNet that costs a test little: four blocks of at most 64 channels, by name as any other of timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models.resnet import BasicBlock, ResNet

from pretrain.checkpoint import save_backbone
from pretrain.network.model import build_backbone

__all__: list[str] = []
ARCH = "resnet_tiny"
default_cfgs = {
    ARCH: {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 32, 32),
        "first_conv": "conv1",
        "classifier": "fc",
    }
}


@register_model
def resnet_tiny(pretrained: bool = False, **options: Any) -> ResNet:
    """106,000 weights, where a ResNet-18 has 11 million."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 24, 32, 64)}
    return build_model_with_cfg(ResNet, ARCH, pretrained, **shape, **options)


def save_tiny(path: Path, *, image_size: int = 16) -> Path:
    """An untrained one whose BatchNorm has seen random images, so that it is not taken for untrained."""
    torch.manual_seed(0)
    model = build_backbone(ARCH, zero_init_last=False).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 32, 32))
    metadata = {
        "arch": ARCH, "stem": "imagenet", "branch": "online", "image_size": image_size,
        "source": "random initialisation",
    }  # fmt: skip
    save_backbone(path, model.state_dict(), metadata)
    return path
