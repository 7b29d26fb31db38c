"""Training crops for a classifier, drawn from (seed, epoch, index).

Boxes are distributed as torchvision's RandomResizedCrop draws them. Pixels are not those of its crop and
resize one after the other: a box is resized from the whole image, so that within about 4 px of its edges the
filter reads pixels outside it (up to 22 grey levels, 0.03 on average over the crop).
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.data.datasets import ImageDataset
from pretrain.views.augment import CROP_TRIES, Box, crop_box
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


@contextlib.contextmanager
def drawn_from(*numbers: int, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside from Python's, NumPy's and PyTorch's own generators hangs on these numbers alone,
    and what is drawn afterwards not on it."""
    seeds = np.random.SeedSequence(numbers).generate_state(3)
    devices = [device] if device is not None and device.type == "cuda" else []
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        random.seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        torch.manual_seed(int(seeds[2]))
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


_RAND_AUGMENT = re.compile(r"rand(-((p|mstd)[0-9]+(\.[0-9]+)?|(m|n|mmax|inc)[0-9]+))+")
_RANGES = {"m": (0, 30), "n": (1, 20), "p": (0, 1), "mstd": (0, 100), "mmax": (1, 30), "inc": (0, 1)}
"""Of timm's words: magnitude and its spread and limit, operations an image, their share, the rising ones."""


def rand_augment(words: str, size: int, mean: tuple[float, ...], interpolation: str) -> RandAugment:
    """timm's RandAugment with the options that its create_transform gives it for crops of `size` px."""
    filled = tuple(min(255, round(255 * x)) for x in mean)
    options = {"translate_const": int(size * 0.45), "img_mean": filled}
    return rand_augment_transform(words, {**options, "interpolation": PIL_MODES[interpolation]})


def check_auto_augment(words: str) -> None:
    """Raises ValueError unless `words` is empty or names a RandAugment of timm's."""
    if words and not _RAND_AUGMENT.fullmatch(words):  # timm passes over parts that it does not know
        raise ValueError(
            f"auto_augment: {words:.60}: wanted a RandAugment by timm's words, such as rand-m9-mstd0.5-inc1"
        )
    for name, number in re.findall(r"-([a-z]+)([\d.]+)", words):
        least, most = _RANGES[name]
        if not least <= float(number) <= most:
            raise ValueError(f"auto_augment: {words:.60}: {name} {number:.20}: wanted {least} to {most}")


class Mixing:
    """What happens to a batch of normalised training images: erased rectangles, Mixup or CutMix, soft labels,
    by timm's own functions, which draw from the global generators (see `drawn_from`)."""

    def __init__(
        self,
        classes: int,
        *,
        mixup: float,
        cutmix: float,
        smoothing: float,
        erasing: float,
        device: torch.device,
    ) -> None:
        self.classes, self.smoothing = classes, smoothing
        self.mixup = (
            Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes)
            if mixup or cutmix
            else None
        )
        self.erasing = RandomErasing(erasing, mode="pixel", device=str(device)) if erasing else None

    def __call__(self, images: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images B x 3 x H x W, changed in place, and labels: as they came, or shares of classes (B x C)."""
        if self.erasing is not None:
            images = self.erasing(images)
        if self.mixup is not None:
            return self.mixup(images, labels_B)
        if self.smoothing:
            return images, mixup_target(labels_B, self.classes, smoothing=self.smoothing)
        return images, labels_B


class Augmented(Dataset[Any]):
    """Cropped and flipped 8-bit pixels 3 x size x size by position, with the position."""

    def __init__(
        self,
        data: ImageDataset,
        *,
        size: int,
        seed: int,
        epoch: int,
        interpolation: str,
        changed: RandAugment | None = None,
    ) -> None:
        self.data, self.size, self.seed, self.epoch = data, size, seed, epoch
        self.interpolation, self.changed = interpolation, changed

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng([self.seed, self.epoch, int(index)])
        image = crop_and_flip(self.data.image(int(index)), self.size, self.interpolation, rng)
        if self.changed is not None:
            with drawn_from(self.seed, self.epoch, int(index)):
                image = self.changed(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(index)
