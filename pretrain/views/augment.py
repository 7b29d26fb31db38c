"""Random crops of images, drawn from (seed, epoch, image index): where they lie, and how they are resized.

The published recipe (https://github.com/winci-ai/INTL, src/transform.py) in two parts: per image decoding and
resized crops kept as uint8 (here); per batch, wherever it lies, colour, blur, solarisation, flip and
normalisation (`pretrain.views.colours`). Every random number is a hash of (seed, epoch, image index, view,
slot): neither the number of workers or ranks nor an interruption changes any of them.

Letters of shapes: N images, H x W their size, S side of the view in px.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
SLOTS = 2 * CROP_TRIES + 14

Box = tuple[int, int, int, int]
"""Left, top, width and height of a crop, px."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How one view is made: see the options of the same names in `pretrain.settings`."""

    size: int
    min_scale: float = 0.08
    max_scale: float = 1.0
    interpolation: str = "bicubic"
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, ...] = (0.1, 2.0)
    solarise_p: float = 0.1
    flip_p: float = 0.5


def uniforms(seed: int, epoch: int, images_N: np.ndarray, view: int, count: int = SLOTS) -> np.ndarray:
    """N x `count` numbers in [0, 1), a function of the arguments alone (SplitMix64, Steele et al. 2014)."""
    state = np.zeros((len(images_N), 1), np.uint64)
    for part in (seed, epoch, np.asarray(images_N)[:, None], view, np.arange(count)[None, :]):
        state = _mix(state ^ np.asarray(part, np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def crop_box(
    width: int,
    height: int,
    tries: Iterable[tuple[float, float]],
    place: Callable[[int, int], tuple[int, int]],
    *,
    min_scale: float = 0.08,
    max_scale: float = 1.0,
) -> Box:
    """torchvision's RandomResizedCrop.get_params: left, top, width and height in px.

    `tries` are pairs of numbers in [0, 1), which choose share of the area and aspect ratio; of the first box
    that fits `place(n, m)` chooses left below n and top below m. Where none fits: the largest middle part.
    """
    for share, u in tries:
        area = width * height * (min_scale + (max_scale - min_scale) * share)
        ratio = math.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * u)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return *place(width - w + 1, height - h + 1), w, h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def box_of(u: np.ndarray, width: int, height: int, view: View) -> Box:
    """A view's crop from its first 22 uniform numbers: ten tries, then the place."""
    *numbers, x, y = u[: 2 * CROP_TRIES + 2].tolist()
    tries = zip(numbers[::2], numbers[1::2])
    return crop_box(
        width, height, tries, lambda n, m: (int(x * n), int(y * m)), min_scale=view.min_scale,
        max_scale=view.max_scale,
    )  # fmt: skip


def boxes_of(u: np.ndarray, sizes_N2: np.ndarray, view: View) -> np.ndarray:
    """N x 4 int64: the crops of many images, of widths and heights `sizes_N2`, as `box_of` places each."""
    tries, (x, y) = u[:, : 2 * CROP_TRIES], u[:, 2 * CROP_TRIES : 2 * CROP_TRIES + 2].T
    width, height = sizes_N2.T.astype(np.int64)
    area = (width * height)[:, None] * (view.min_scale + (view.max_scale - view.min_scale) * tries[:, ::2])
    ratio = np.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * tries[:, 1::2])
    w_NT, h_NT = (np.rint(np.sqrt(a)).astype(np.int64) for a in (area * ratio, area / ratio))
    fits_NT = (w_NT > 0) & (w_NT <= width[:, None]) & (h_NT > 0) & (h_NT <= height[:, None])
    first = np.arange(len(u)), fits_NT.argmax(1)
    w, h = w_NT[first], h_NT[first]
    boxes = np.stack([(x * (width - w + 1)).astype(int), (y * (height - h + 1)).astype(int), w, h], 1)
    for n in np.flatnonzero(~fits_NT.any(1)):
        boxes[n] = box_of(u[n], int(width[n]), int(height[n]), view)
    return boxes


def resized_crop(pixels: Tensor, box: Box, view: View) -> Tensor:
    """S x S x 3 uint8: the part (left, top, width, height) of an H x W x 3 image, antialiased.

    torch's uint8 kernel, four times as fast as Pillow's: within one level of it, but for a pixel in thousands
    where a bicubic pass overshoots and is clipped before the other (`python -m benchmarks augment` has them).
    """
    left, top, w, h = box
    part = pixels[top : top + h, left : left + w].permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(
        part, (view.size, view.size), mode=view.interpolation, antialias=True, align_corners=False
    )
    return out[0].permute(1, 2, 0)


def shrunk_crop(image: Image.Image, box: Box, shrunk: int, view: View) -> Tensor:
    """S x S x 3 uint8: the same part of an image that was decoded `shrunk` times smaller.

    The box, given in px of the full size, falls between decoded pixels; Pillow takes it there, where rounding
    it would move the crop by up to half of `shrunk` px (1.7 levels at 2, 2.8 at 4; exact 0.3 and 0.9).
    """
    left, top, w, h = (x / shrunk for x in box)
    right, bottom = min(left + w, image.width), min(top + h, image.height)
    method = Image.Resampling.BICUBIC if view.interpolation == "bicubic" else Image.Resampling.BILINEAR
    made = image.resize((view.size, view.size), method, box=(left, top, right, bottom))
    return torch.from_numpy(np.array(made))


def resized_crops(pixels: Tensor, boxes_N4: Tensor, view: View) -> Tensor:
    """N x S x S x 3 uint8: `resized_crop` of each of N x H x W x 3 uint8 images, within one level of it.

    As two products, with the weights of every column and every row of a view; for devices where many small
    kernels cost more than the arithmetic. Rounded between the two, halves up, as PyTorch's and Pillow's are.
    """
    left, top, w, h = boxes_N4.unbind(1)
    _, height, width, _ = pixels.shape
    columns_NSW = _resizing(left, w, width, view)
    rows_NSH = _resizing(top, h, height, view)
    x = _levels(torch.einsum("nsw,nhwc->nhsc", columns_NSW, pixels.to(torch.float32)))
    return _levels(torch.einsum("nth,nhsc->ntsc", rows_NSH, x)).to(torch.uint8)


def _levels(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _resizing(start_N: Tensor, length_N: Tensor, full: int, view: View) -> Tensor:
    """N x S x `full` weights that resize the pixels [start, start + length), antialiased."""
    scale = (length_N / view.size)[:, None, None]  # in float32, as PyTorch has it
    stretch = scale.clamp_min(1)
    out = torch.arange(view.size, device=start_N.device)[:, None]
    at = torch.arange(full, device=start_N.device) - start_N[:, None, None]
    x = ((at + 0.5 - scale * (out + 0.5)) / stretch).abs()
    if (
        view.interpolation == "bicubic"
    ):  # Keys's kernel at a = -0.5, as Pillow's and PyTorch's antialiased ones
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weights = (1 - x).clamp_min(0)
    weights = weights * ((at >= 0) & (at < length_N[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)
