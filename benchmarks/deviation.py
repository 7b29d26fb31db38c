"""How far our augmentation lies from the published code's Pillow operations, in grey levels.

Both get the same parameters, spread over the recipe's ranges. Pillow answers in whole levels of 255, ours in
float: rounding alone makes 0.25 levels of the mean, and cutting off, as Pillow's blending does, 0.5.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode

from benchmarks.harness import Table
from benchmarks.images import photographs
from pretrain.data.datasets import ImageDataset
from pretrain.views.augment import View, box_of, resized_crop, shrunk_crop, uniforms
from pretrain.views.colours import (
    Colours,
    blend,
    draw_colours,
    finish,
    gaussian_blur,
    greyscale,
    shift_hue,
    solarise,
)
from pretrain.views.loader import FIRST_COLOUR_SLOT

SIZE, SMALL_SIZE = 224, 48  # px of a crop; of one whose image is decoded at 1/2 and 1/4
JITTER = (0.4, 0.4, 0.2, 0.1)
SIGMA = (0.1, 2.0)
Pair = tuple[np.ndarray, np.ndarray]
"""Ours and Pillow's of the same image, levels of 255."""


def deviations(quick: bool) -> Table:
    """Mean, 99.9th percentile and maximum of |ours - Pillow's| of each operation."""
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(folder), 8 if quick else 128)
        rows: list[list[str | float]] = []
        for name, pairs in operations(images).items():
            differences = np.concatenate([np.abs(ours - theirs).ravel() for ours, theirs in pairs])
            worst = np.quantile(differences, 0.999)
            rows.append([name, float(differences.mean()), float(worst), float(differences.max())])
    return Table(
        title=f"Deviation from Pillow and torchvision on Pillow images, levels of 255, on {len(images)} of "
        f"{images.name}",
        columns=("operation", "mean", "99.9 %", "maximum"), rows=rows,
        note="Pillow rounds to whole levels after each operation, and cuts off after brightness, contrast "
        "and saturation; ours keeps fractions: 0.25 and 0.5 of those means. A bicubic pass that overshoots "
        "is clipped before the second pass, and which of the two comes first differs. Pillow's hue has 256 "
        "steps, its blur is three box blurs.",
    )  # fmt: skip


def operations(images: ImageDataset) -> dict[str, Iterator[Pair]]:
    """Each operation's pairs, image by image."""
    crops = [_pillow_crop(images.image(i), _box(images.image(i), i, SIZE), SIZE) for i in range(len(images))]
    n = len(crops)
    zeros, ones = torch.zeros(1), torch.ones(1)
    cubic, linear = (f"resized crop to {SIZE} px, {k}" for k in ("bicubic", "bilinear"))

    def colour(
        ours: Callable[[Tensor, float], Tensor], theirs: Callable[[Image.Image, float], Image.Image],
        low: float, high: float,
    ) -> Iterator[Pair]:  # fmt: skip
        for crop, value in zip(crops, np.linspace(low, high, n)):
            yield _levels(ours(_tensor(crop), float(value))), np.asarray(theirs(crop, float(value)), float)

    def mixed(mean: Tensor, grey: Tensor) -> Callable[[Tensor, float], Tensor]:
        def ours(x: Tensor, factor: float) -> Tensor:
            blend(x, torch.tensor([factor]), grey, mean)
            return x

        return ours

    (b, c, s, h) = JITTER
    return {
        cubic: _crops(images, "bicubic"),
        linear: _crops(images, "bilinear"),
        f"crop to {SMALL_SIZE} px of a JPEG decoded at 1/2": _shrunk(images, 2),
        f"crop to {SMALL_SIZE} px of a JPEG decoded at 1/4": _shrunk(images, 4),
        "brightness": colour(mixed(zeros, zeros), F.adjust_brightness, 1 - b, 1 + b),
        "contrast": colour(mixed(ones, zeros), F.adjust_contrast, 1 - c, 1 + c),
        "saturation": colour(mixed(zeros, ones), F.adjust_saturation, 1 - s, 1 + s),
        "hue": colour(lambda x, turns: shift_hue(x, torch.tensor([turns])), F.adjust_hue, -h, h),
        "greyscale": colour(
            lambda x, _: greyscale(x).expand_as(x), lambda i, _: F.rgb_to_grayscale(i, 3), 0, 0
        ),
        "blur": colour(
            lambda x, sigma: gaussian_blur(x, torch.tensor([sigma])),
            lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)), *SIGMA,
        ),
        "solarisation": colour(lambda x, _: solarise(x), lambda image, _: ImageOps.solarize(image), 0, 0),
        "all colour in the order drawn": _whole(crops, View(size=SIZE, solarise_p=0)),
        "all colour and solarisation": _whole(crops, View(size=SIZE, solarise_p=1)),
    }  # fmt: skip


def _box(image: Image.Image, i: int, size: int, min_scale: float = 0.08) -> tuple[int, int, int, int]:
    return box_of(uniforms(0, 0, np.array([i]), 0)[0], *image.size, View(size=size, min_scale=min_scale))


def _pillow_crop(
    image: Image.Image, box: tuple[int, int, int, int], size: int, mode: str = "bicubic"
) -> Image.Image:
    left, top, w, h = box
    return F.resized_crop(image, top, left, h, w, [size, size], InterpolationMode(mode))


def _crops(images: ImageDataset, mode: str) -> Iterator[Pair]:
    for i in range(len(images)):
        image = images.image(i)
        box = _box(image, i, SIZE)
        ours = resized_crop(torch.from_numpy(np.array(image)), box, View(size=SIZE, interpolation=mode))
        yield ours.numpy().astype(float), np.asarray(_pillow_crop(image, box, SIZE, mode), float)


def _shrunk(images: ImageDataset, by: int) -> Iterator[Pair]:
    for i in range(len(images)):
        full = images.image(i)
        box = _box(full, i, SMALL_SIZE, min_scale=0.5)
        with images.open(i) as opened:
            small = opened.decode((full.width // by, full.height // by))
        shrunk = round(full.width / small.width)
        if shrunk != by or min(box[2:]) < by * SMALL_SIZE:
            continue  # not a JPEG, or too small for that
        ours = shrunk_crop(small, box, shrunk, View(size=SMALL_SIZE))
        yield ours.numpy().astype(float), np.asarray(_pillow_crop(full, box, SMALL_SIZE), float)


def _whole(crops: list[Image.Image], view: View) -> Iterator[Pair]:
    """Jitter, greyscale, blur and solarisation with the parameters that training would draw."""
    colours = draw_colours(uniforms(0, 0, np.arange(len(crops)), 0)[:, FIRST_COLOUR_SLOT:], view)
    for i, crop in enumerate(crops):
        part = colours.part(i, i + 1)
        pixels = torch.from_numpy(np.array(crop))[None]
        ours = finish(pixels, part, mean=torch.zeros(3), std=torch.ones(3))
        yield _levels(ours), np.asarray(by_pillow(crop, part), float)


def by_pillow(image: Image.Image, colours: Colours) -> Image.Image:
    """What `finish` does to one image (`colours` of one), by Pillow."""
    for k in range(4):
        if colours.hue_4N is not None and colours.turns_N is not None and colours.hue_4N[k, 0]:
            image = F.adjust_hue(image, float(colours.turns_N[0]))
        if k < 3 and colours.blend_3N is not None:
            assert colours.grey_share_3N is not None and colours.mean_share_3N is not None
            factor = float(colours.blend_3N[k, 0])
            change = F.adjust_saturation if colours.grey_share_3N[k, 0] else F.adjust_brightness
            image = (F.adjust_contrast if colours.mean_share_3N[k, 0] else change)(image, factor)
    if _is_set(colours.grey_N):
        image = F.rgb_to_grayscale(image, 3)
    if _is_set(colours.blur_N) and colours.sigma_N is not None:
        image = image.filter(ImageFilter.GaussianBlur(float(colours.sigma_N[0])))
    if _is_set(colours.solarise_N):
        image = ImageOps.solarize(image)
    return ImageOps.mirror(image) if _is_set(colours.flip_N) else image


def _is_set(flag_N: Tensor | None) -> bool:
    return flag_N is not None and bool(flag_N[0])


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _levels(x: Tensor) -> np.ndarray:
    return 255 * x[0].permute(1, 2, 0).numpy().astype(float)
