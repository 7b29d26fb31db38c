"""The transform of evaluated images, from PIL image to normalised tensor, without randomness.

Three forms. `crop`: ImageNet's Resize(shorter side) and CenterCrop, by PIL, one image at a time. `squash`: to
size x size whatever the shape, by PIL, after a resize of the shorter side where there is one. `whole`, for
sets of small images: Resize((size, size)) with antialiasing on 8-bit pixels, a whole batch at once; equal to
PIL's resize of each image but for rounding: one grey level, two where bicubic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from pretrain.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from transfer.evaluation.pooled_features import LAST
from transfer.evaluation.protocol import want

PIL_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TORCH_MODES = {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC}


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """Resize, crop and normalisation of evaluated images."""

    size: int
    """Side of the result, px."""
    resize: int | None = None
    """Shorter side before the centre crop, px; None: the whole image to size x size."""
    squash: bool = False
    """Instead of the crop: to size x size, whatever the image's shape."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def fit(self) -> str:
        """How an image comes to be a square: squash, crop or, of small images, whole."""
        return "squash" if self.squash else "whole" if self.resize is None else "crop"

    def decode(self, image: Image.Image) -> Tensor:
        """The 8-bit pixels, 3 x H x W: cropped or squashed already, or whole where `square` is to resize."""
        if self.resize is not None:
            image = resize_shorter(image, self.resize, self.interpolation)
        if self.squash:
            image = image.resize((self.size, self.size), PIL_MODES[self.interpolation])
        elif self.resize is not None:
            image = center_crop(image, self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def square(self, images: Sequence[Tensor]) -> Tensor:
        """8-bit pixels of several images as one B x 3 x size x size tensor."""
        if self.fit == "whole":
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
    """In grey levels, one value a channel; cached to avoid a host-device synchronisation."""
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


@dataclass(frozen=True, kw_only=True)
class ImageValues:
    """What a protocol of any task says of the images it evaluates, and of the arithmetic."""

    resize: int | None = 256
    """Shorter side before the crop, px; None, with fit: squash: as it is."""
    crop: int = 224
    """Side of the images evaluated, px."""
    fit: Literal["crop", "squash"] = "crop"
    """crop: the middle of the resized image; squash: all of it, whatever its shape."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the resized images."""
    image_size: int | Literal["native"] | None = None
    """Side of sets of small images, px, whole and uncropped. native: their own, as the authors have it; None:
    likewise, though the authors resize and crop these as well, which results say. Before both comes the size
    that the weights' file records."""
    mean: tuple[float, ...] | None = None
    """Given: images are normalised with it and `std` whatever the weights' file records."""
    std: tuple[float, ...] = IMAGENET_STD
    """Without `mean`: where the weights' file records none."""
    features: tuple[str, ...] = LAST
    """What the features are: layer4 is the network's own output, of whatever kind; layers of a ResNet or
    tokens of a ViT, see `pooled_features` and `tokens`."""
    positions: Literal["bicubic", "bicubic offset", "bicubic antialias"] | None = None
    """How a ViT's positions are resampled for images of another size; None: as its writer does."""
    precision: Literal["auto", "float32"] = "auto"
    """Of the backbone. float32: as in the authors' code, which has no autocast."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no image can be looked at by."""
        want(self.crop >= 8, "crop", self.crop, "8 px or more")
        if self.resize is not None:
            want(self.resize >= 8, "resize", self.resize, "8 px or more")
        if self.fit == "crop":
            enough = self.resize is not None and self.resize >= self.crop
            want(enough, "resize", self.resize, f"at least crop, {self.crop} px, or fit: squash")
        if isinstance(self.image_size, int):
            want(self.image_size >= 8, "image_size", self.image_size, "8 px or more")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                three = len(values) == 3 and all(map(math.isfinite, values))
                want(three, key, values, "three numbers, such as [0.485, 0.456, 0.406]")
        want(min(self.std) > 0, "std", self.std, "three numbers above 0")


def eval_transform(
    values: ImageValues = ImageValues(),
    *,
    native_size: int | None,
    image_size: int | None,
    metadata: Mapping[str, str],
    given: Collection[str] = (),
) -> EvalTransform:
    """The transform for a data set: cropped for ImageNet-like ones, square for those of small images.

    Small images go to `image_size`, else to the protocol's, else to the size in the weights' metadata, else
    stay as they are; for ImageNet-like sets `image_size` replaces `crop` and scales `resize` with it. Mean
    and standard deviation are the protocol's where it fixes them, unless `metadata` has them from the user
    (`given` names which), else those in the weights' metadata, else ImageNet's (or the protocol's `std`).
    """
    fixed = () if values.mean is None else {"mean", "std"} - set(given)
    mean = _numbers(None if "mean" in fixed else metadata.get("mean"), values.mean or IMAGENET_MEAN)
    std = _numbers(None if "std" in fixed else metadata.get("std"), values.std)
    looks: dict[str, Any] = {"interpolation": values.interpolation, "mean": mean, "std": std}
    if native_size is None:
        size = image_size or values.crop
        resize = values.resize and round(values.resize * size / values.crop)
        return EvalTransform(size=size, resize=resize, squash=values.fit == "squash", **looks)
    recorded = metadata.get("image_size")
    fixed_size = values.image_size if isinstance(values.image_size, int) else None
    return EvalTransform(size=image_size or fixed_size or int(recorded or native_size), **looks)


def _numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(",")) if text else default
