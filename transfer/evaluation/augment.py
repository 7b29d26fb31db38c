"""Training crops for a classifier, drawn from (seed, epoch, index).

Boxes are distributed as torchvision's RandomResizedCrop draws them. Pixels are not those of its crop and
resize one after the other: a box is resized from the whole image, so that within about 4 px of its edges the
filter reads pixels outside it (up to 22 grey levels, 0.03 on average over the crop).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.data.augment import CROP_TRIES, Box, crop_box
from pretrain.data.datasets import ImageDataset
from transfer.evaluation.transforms import PIL_MODES


def drawn_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Left, top, width and height of a crop of 0.08 to 1 of the area, px."""
    tries = ((rng.random(), rng.random()) for _ in range(CROP_TRIES))
    return crop_box(width, height, tries, lambda n, m: (int(rng.integers(n)), int(rng.integers(m))))


def crop_and_flip(image: Image.Image, size: int, interpolation: str, rng: np.random.Generator) -> Image.Image:
    """RandomResizedCrop(size) with scale 0.08-1, then a flip with probability 1/2."""
    left, top, width, height = drawn_box(*image.size, rng)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), PIL_MODES[interpolation], box=box)
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
