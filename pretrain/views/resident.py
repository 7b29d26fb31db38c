"""Whole data sets in a device's memory, as uint8, and crops taken there: no files, no loader processes.

Letters of shapes: N images of a batch, A all images, H x W the size they are padded to.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.data.datasets import ImageDataset
from pretrain.data.images import BrokenImage
from pretrain.data.workers import load
from pretrain.views.loader import MOST_BROKEN_IN_A_ROW, as_it_is

logger = logging.getLogger(__name__)

SHARE = 0.25  # of a GPU's memory that images may take
LOOKED_AT = 256  # images whose size is asked before all are decoded
AT_ONCE_BYTES = 1 << 26  # of images that a process decodes before they are moved
MOST_AT_ONCE = 256
STEP_BYTES = 15  # a pixel and image: what a step holds of whole images, as bytes and as floats


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
    def of(
        images: ImageDataset, device: torch.device, *, batch: int, workers: int = 0
    ) -> ResidentImages | None:
        """The set, decoded by so many processes, on `device`; None where it and what a step of `batch` images
        takes of it are beyond their share of the memory.

        Raises BrokenImage when MOST_BROKEN_IN_A_ROW images in a row cannot be read.
        """
        budget, (height, width) = memory_of(device) * SHARE, largest_of_some(images)
        a_pixel = 3 * len(images) + STEP_BYTES * batch
        if a_pixel * height * width > budget:
            return None
        at_once = max(1, min(MOST_AT_ONCE, AT_ONCE_BYTES // (3 * height * width)))
        logger.info("decoding %d images into the memory of the %s", len(images), device.type)
        sizes_A2 = np.zeros((len(images), 2), np.int64)
        pixels = torch.zeros((len(images), height, width, 3), dtype=torch.uint8, device=device)
        broken: dict[int, str] = {}
        blocks = [list(range(s, min(s + at_once, len(images)))) for s in range(0, len(images), at_once)]
        decoded = load(
            _Decoding(images), blocks, workers=min(workers, len(blocks)), collate=as_it_is,
            batch_bytes=at_once * height * width * 3,
        )  # fmt: skip
        for rows, (block, sizes, unreadable) in zip(blocks, decoded, strict=True):
            height, width = (max(a, b) for a, b in zip(pixels.shape[1:3], block.shape[1:3]))
            if a_pixel * height * width > budget:
                return None
            if (height, width) != pixels.shape[1:3]:
                grown = pixels.new_zeros((len(images), height, width, 3))
                grown[:, : pixels.shape[1], : pixels.shape[2]] = pixels
                pixels = grown
            pixels[rows[0] : rows[-1] + 1, : block.shape[1], : block.shape[2]] = block.to(device)
            sizes_A2[rows] = sizes
            broken |= unreadable
        _stand_in(pixels, sizes_A2, set(broken))
        return ResidentImages(pixels=pixels, sizes_A2=sizes_A2, broken=list(broken.values()))

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


class _Decoding(Dataset[Any]):
    """Indices -> N x H x W x 3 images, N x 2 widths and heights, messages of broken ones by index."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, np.ndarray, dict[int, str]]:
        arrays, broken = [], {}
        for i in indices:
            try:
                arrays.append(np.asarray(self.images.image(i)))
            except BrokenImage as error:
                arrays.append(np.zeros((1, 1, 3), np.uint8))
                broken[i] = str(error)
        height, width = (max(a.shape[k] for a in arrays) for k in range(2))
        block = torch.zeros((len(arrays), height, width, 3), dtype=torch.uint8)
        for out, array in zip(block.numpy(), arrays):
            out[: array.shape[0], : array.shape[1]] = array
        return block, np.array([(a.shape[1], a.shape[0]) for a in arrays]), broken


def _stand_in(pixels: Tensor, sizes_A2: np.ndarray, broken: set[int]) -> None:
    """Put the next readable image in the place of each broken one, as the loader does."""
    for i in broken:
        following = (k % len(pixels) for k in range(i + 1, i + MOST_BROKEN_IN_A_ROW))
        after = next((k for k in following if k not in broken), None)
        if after is None:
            raise BrokenImage(f"{MOST_BROKEN_IN_A_ROW} images in a row cannot be read, from image {i} on")
        pixels[i], sizes_A2[i] = pixels[after], sizes_A2[after]
