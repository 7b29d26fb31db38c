"""The random control: an untrained backbone whose BatchNorm statistics are estimated on the images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from pretrain.data.datasets import ImageDataset
from pretrain.views.loader import epoch_order

STATISTICS_IMAGES, BATCH = 8192, 256


@torch.no_grad()
def estimate_bn(
    backbone: nn.Module,
    images: ImageDataset,
    *,
    size: int,
    mean: list[float],
    std: list[float],
    seed: int,
    device: torch.device,
) -> None:
    """Set all BN statistics of `backbone` to their means over batches of up to 8192 training images.

    The images are those of the evaluation transform: scaled to size x size where the set is small, else the
    centre of the image after scaling its short side to 256 / 224 · size.
    """
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    backbone.train()
    mean_3, std_3 = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
    order = epoch_order(len(images), seed, 0)[:STATISTICS_IMAGES]
    for first in range(0, len(order) - min(BATCH, len(order)) + 1, BATCH):
        pixels = np.stack([_evaluation_view(images, int(i), size) for i in order[first : first + BATCH]])
        x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(255)
        backbone(((x - mean_3) / std_3).contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    backbone.eval()


def _evaluation_view(images: ImageDataset, index: int, size: int) -> np.ndarray:
    image = images.image(index)
    if images.native_size is None:
        short = round(size * 256 / 224)
        scale = short / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
