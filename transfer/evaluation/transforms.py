"""The transform of evaluated images, from PIL image to normalised tensor, without randomness.

Two forms. `crop`: ImageNet's Resize(shorter side) and CenterCrop, by PIL, one image at a time. `square`, for
sets of small images: Resize((size, size)) with antialiasing on 8-bit pixels, a whole batch at once; equal to
PIL's resize of each image but for rounding: one grey level, two where bicubic.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from pretrain.data.normalization import IMAGENET_MEAN, IMAGENET_STD

PIL_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TORCH_MODES = {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Resize, crop and normalisation of evaluated images."""

    size: int
    """Side of the result, px."""
    resize: int | None = None
    """Shorter side before the centre crop, px; None: the whole image to size x size."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def decode(self, image: Image.Image) -> Tensor:
        """The 8-bit pixels, 3 x H x W: cropped already, or whole where `batch` is to resize."""
        if self.resize is not None:
            image = center_crop(resize_shorter(image, self.resize, self.interpolation), self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def square(self, images: Sequence[Tensor]) -> Tensor:
        """8-bit pixels of several images as one B x 3 x size x size tensor."""
        if self.resize is None:
            if len({i.shape for i in images}) > 1:
                return torch.cat([self._resize(i[None]) for i in images])
            return self._resize(torch.stack(list(images)))
        return torch.stack(list(images))

    def _resize(self, pixels_B3HW: Tensor) -> Tensor:
        if pixels_B3HW.shape[-2:] == (self.size, self.size):
            return pixels_B3HW
        mode = TORCH_MODES[self.interpolation]
        return F.resize(pixels_B3HW, [self.size, self.size], interpolation=mode, antialias=True)

    def normalise(self, pixels_B3HW: Tensor) -> Tensor:
        """8-bit pixels to float32 with the mean and standard deviation taken out."""
        mean, std = (_levels(values, pixels_B3HW.device) for values in (self.mean, self.std))
        return (pixels_B3HW.float() - mean) / std

    def as_dict(self) -> dict[str, Any]:
        """Plain values: part of the key of cached features."""
        return dataclasses.asdict(self)


@functools.cache
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Of a channel each, in grey levels; made once, for a GPU would be waited for."""
    return torch.tensor(values, device=device)[:, None, None] * 255


def resize_shorter(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    """Scale so that the shorter side has `side` px; the longer is cut to whole px, as in torchvision."""
    width, height = image.size
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    return image if size == image.size else image.resize(size, PIL_MODES[interpolation])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size px, rounding as torchvision's CenterCrop does."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def eval_transform(
    *,
    native_size: int | None,
    image_size: int | None,
    metadata: dict[str, str],
    resize: int = 256,
    crop: int = 224,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    std: tuple[float, ...] = IMAGENET_STD,
) -> EvalTransform:
    """The transform for a data set: cropped for ImageNet-like ones, square for those of small images.

    Small images go to `image_size`, else to the size in the weights' metadata, else stay as they are; for
    ImageNet-like sets `image_size` replaces `crop` and scales `resize` with it. Mean and standard deviation
    are those in the weights' metadata, else ImageNet's (or the protocol's `std`).
    """
    mean = _numbers(metadata.get("mean"), IMAGENET_MEAN)
    std = _numbers(metadata.get("std"), std)
    if native_size is None:
        size = image_size or crop
        return EvalTransform(
            size=size, resize=round(resize * size / crop), interpolation=interpolation, mean=mean, std=std
        )
    recorded = metadata.get("image_size")
    size = image_size or (int(recorded) if recorded else native_size)
    return EvalTransform(size=size, interpolation=interpolation, mean=mean, std=std)


def _numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(",")) if text else default
