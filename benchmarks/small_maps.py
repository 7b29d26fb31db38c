"""Training a ResNet's last convolutions on the small maps of small images: oneDNN beside matrix products."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Comparison, interleave
from pretrain.network.small_maps import multiply_small_maps

TITLE = "3x3 convolutions of small maps, forward and backward on the CPU: oneDNN (reference), matrix products"
SHAPES = ((512, 512, 1, 1), (512, 512, 2, 1), (256, 512, 3, 2), (256, 256, 2, 1))


def measure(quick: bool) -> list[Comparison]:
    comparisons = []
    for channels, outputs, side, stride in SHAPES[:1] if quick else SHAPES:
        for images in (64,) if quick else (256, 512):
            conv = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False).to(
                memory_format=torch.channels_last
            )
            ours = multiply_small_maps(copy.deepcopy(conv))
            x = torch.randn(images, side, side, channels).permute(0, 3, 1, 2).requires_grad_()
            times = interleave(
                {"reference": partial(_step, conv, x), "ours": partial(_step, ours, x)}, repeats=5, warm_up=1
            )
            case = f"{images} images, {channels} to {outputs} channels, {side} x {side}, stride {stride}"
            comparisons.append(Comparison(case=case, reference=times["reference"], ours=times["ours"]))
    return comparisons


def _step(conv: nn.Module, x: Tensor) -> None:
    conv(x).sum().backward()
