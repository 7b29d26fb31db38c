"""Whole data sets in a device's memory, as uint8, and crops taken there: no files, no loader processes.

Letters of shapes: N images of a batch, A all images, H x W the size they are padded to.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.datasets import ImageDataset
from pretrain.data.images import BrokenImage
from pretrain.views.augment import View, resized_crops
from pretrain.views.batch import Place
from pretrain.views.loader import MOST_BROKEN_IN_A_ROW

logger = logging.getLogger(__name__)

SHARE = 0.25  # of a GPU's memory that images may take
LOOKED_AT = 256  # images whose size is asked before all are decoded
AT_ONCE = 1024  # images decoded before they are moved


@dataclass(frozen=True, kw_only=True)
class ResidentImages:
    """All images of a set on a device."""

    pixels: Tensor
    """A x H x W x 3 uint8, smaller images in the upper left corner."""
    sizes_A2: np.ndarray
    """Width and height of each image, px."""
    broken: list[str]
    """Images that cannot be read; the next readable one stands in their place."""

    @staticmethod
    def of(images: ImageDataset, device: torch.device) -> ResidentImages | None:
        """The set decoded on `device`; None where it takes more than its share of the memory.

        Raises BrokenImage when MOST_BROKEN_IN_A_ROW images in a row cannot be read.
        """
        budget, (height, width) = memory_of(device) * SHARE, largest_of_some(images)
        if len(images) * height * width * 3 > budget:
            return None
        sizes_A2 = np.zeros((len(images), 2), np.int64)
        pixels = torch.zeros((len(images), height, width, 3), dtype=torch.uint8, device=device)
        broken: list[tuple[int, str]] = []
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            for first in range(0, len(images), AT_ONCE):
                part = range(first, min(first + AT_ONCE, len(images)))
                decoded = list(threads.map(lambda i: _decoded(images, i), part))
                broken += [(i, made) for i, made in zip(part, decoded) if isinstance(made, str)]
                arrays = [np.zeros((1, 1, 3), np.uint8) if isinstance(a, str) else a for a in decoded]
                height, width = (max(s, *(a.shape[k] for a in arrays)) for k, s in enumerate((height, width)))
                if len(images) * height * width * 3 > budget:
                    return None
                if (height, width) != pixels.shape[1:3]:
                    grown = pixels.new_zeros((len(images), height, width, 3))
                    grown[:, : pixels.shape[1], : pixels.shape[2]] = pixels
                    pixels = grown
                block = np.zeros((len(part), height, width, 3), np.uint8)
                for n, array in enumerate(arrays):
                    block[n, : array.shape[0], : array.shape[1]] = array
                    sizes_A2[part[n]] = array.shape[1], array.shape[0]
                pixels[first : first + len(part)] = torch.from_numpy(block).to(device)
        _stand_in(pixels, sizes_A2, [i for i, _ in broken])
        return ResidentImages(pixels=pixels, sizes_A2=sizes_A2, broken=[said for _, said in broken])

    def crops(self, place: Place, view: View) -> Tensor:
        """N x S x S x 3 uint8."""
        return resized_crops(self.pixels[place.image_N], place.box_N4, view)

    def __str__(self) -> str:
        count, height, width, _ = self.pixels.shape
        return f"{count:,} images of at most {width} x {height} px, {self.pixels.numel() / 1e9:.2f} GB"


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device, or the machine, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest_of_some(images: ImageDataset) -> tuple[int, int]:
    """Height and width that images spread over the set do not exceed; unreadable ones are left out."""
    if images.pixels is not None:
        height, width = images.pixels.shape[1:3]
        return height, width
    height = width = 1
    for i in range(0, len(images), max(1, len(images) // LOOKED_AT)):
        try:
            with images.open(i) as image:
                width, height = max(width, image.size[0]), max(height, image.size[1])
        except BrokenImage:
            continue
    return height, width


def _decoded(images: ImageDataset, i: int) -> np.ndarray | str:
    try:
        return np.asarray(images.image(i))
    except BrokenImage as error:
        return str(error)


def _stand_in(pixels: Tensor, sizes_A2: np.ndarray, broken: list[int]) -> None:
    """Put the next readable image in the place of each broken one, as the loader does."""
    unreadable = set(broken)
    for i in broken:
        after = next(
            (k for k in range(1, MOST_BROKEN_IN_A_ROW) if (i + k) % len(pixels) not in unreadable), None
        )
        if after is None:
            raise BrokenImage(f"{MOST_BROKEN_IN_A_ROW} images in a row cannot be read, from image {i} on")
        pixels[i], sizes_A2[i] = pixels[(i + after) % len(pixels)], sizes_A2[(i + after) % len(pixels)]
