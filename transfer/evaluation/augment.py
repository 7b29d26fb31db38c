"""Training crops for a classifier, drawn from (seed, epoch, index).

Boxes are distributed as torchvision's RandomResizedCrop draws them. Pixels are not those of its crop and
resize one after the other: a box is resized from the whole image, so that within about 4 px of its edges the
filter reads pixels outside it (up to 22 grey levels, 0.03 on average over the crop).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.data.datasets import ImageDataset
from transfer.evaluation.transforms import PIL_MODES

SCALE = (0.08, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width : height


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a RandomResizedCrop: ten tries, then the largest middle part that fits."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_and_flip(image: Image.Image, size: int, interpolation: str, rng: np.random.Generator) -> Image.Image:
    """RandomResizedCrop(size) with scale 0.08-1, then a flip with probability 1/2."""
    image = image.resize((size, size), PIL_MODES[interpolation], box=crop_box(*image.size, rng))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


class Augmented(Dataset[Any]):
    """Cropped and flipped 8-bit pixels 3 x size x size by position, with the position."""

    def __init__(self, data: ImageDataset, *, size: int, seed: int, epoch: int, interpolation: str) -> None:
        self.data, self.size, self.seed, self.epoch = data, size, seed, epoch
        self.interpolation = interpolation

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng([self.seed, self.epoch, int(index)])
        image = crop_and_flip(self.data.image(int(index)), self.size, self.interpolation, rng)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(index)
