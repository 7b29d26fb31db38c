"""Augmentation: random views of an image, drawn from (seed, epoch, image index).

The published recipe (https://github.com/winci-ai/INTL, src/transform.py) in two parts: per image, on the CPU,
decoding and resized crops kept as uint8 (`box_of`, `resized_crop`); per batch, wherever the batch lies,
colour jitter, greyscale, blur, solarisation, flip and normalisation (`finish`), each image with parameters of
its own. Every random number is a hash of (seed, epoch, image index, view, slot): neither the number of
workers or ranks nor an interruption changes any of them.

Each operation after the crop equals torchvision's tensor functional of the same parameters on float images.
The crop is resized from the whole image: within about 4 px of its edges the filter reads pixels outside the
box, which torchvision's crop and resize do not (up to 22 grey levels, 0.03 on average). Choices: the order
of brightness, contrast, saturation and hue is random per image, as in torchvision; the blur is torchvision's
with a kernel of 13 px (3 standard deviations at 2 px), for Pillow's in the published code.

Letters of shapes: N images, S side of the view in px.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
BLUR_KERNEL = 13
GREY = (0.2989, 0.587, 0.114)  # torchvision.transforms.functional.rgb_to_grayscale
SLOTS = 2 * CROP_TRIES + 14
CACHE_BYTES = 1 << 20  # of float32 images that one pass of `finish` holds on a CPU
ORDERS = np.array(list(itertools.permutations(range(3))))  # of brightness, contrast, saturation


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


@dataclass(frozen=True, kw_only=True)
class Colours:
    """What `finish` does to each of N images; index lists, not flags, so that a GPU need not be asked."""

    blend_3N: Tensor
    """Factors of the three blending operations, in the order they are applied; 1 does nothing."""
    grey_share_3N: Tensor
    """1 where that operation blends with the greyscale image (saturation), else 0."""
    mean_share_3N: Tensor
    """1 where it blends with the mean of the greyscale image (contrast); both 0: black (brightness)."""
    hue_N: Tensor
    """Shift of the hue, in turns."""
    hue_at: tuple[Tensor, ...]
    """Indices of the images whose hue is shifted before blending operation 0, 1, 2 and after the last."""
    grey: Tensor
    """Indices of the images made grey, and so on."""
    blur: Tensor
    sigma_N: Tensor
    solarise: Tensor
    flip: Tensor

    def to(self, device: torch.device) -> Colours:
        """A copy on `device`; from pinned memory the host does not wait for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Colours:
        """A copy in pinned memory."""
        return self._each(Tensor.pin_memory)

    def part(self, first: int, last: int) -> Colours:
        """Those of images `first` to `last` - 1."""
        return self._each(
            lambda t: t[..., first:last] if t.is_floating_point() else t[(t >= first) & (t < last)] - first
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Colours:
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = tuple(map(change, value)) if isinstance(value, tuple) else change(value)
        return Colours(**values)


def draw_colours(u: np.ndarray, view: View) -> Colours:
    """Parameters from N x 14 uniform numbers, distributed as in torchvision's ColorJitter and the rest."""
    jittered = u[:, 0] < view.jitter_p
    strength = np.array(view.jitter[:3])
    low = np.maximum(0, 1 - strength)
    factors = low + (1 + strength - low) * u[:, 1:4]
    order = ORDERS[np.minimum((u[:, 5] * 6).astype(int), 5)]
    hue_place = np.where(jittered & (view.jitter[3] > 0), (u[:, 6] * 4).astype(int), -1)
    blend = np.where(jittered[:, None], np.take_along_axis(factors, order, 1), 1.0)
    sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * u[:, 9]
    return Colours(
        blend_3N=_float(blend.T), mean_share_3N=_float(order.T == 1), grey_share_3N=_float(order.T == 2),
        hue_N=_float(view.jitter[3] * (2 * u[:, 4] - 1)),
        hue_at=tuple(_where(hue_place == k) for k in range(4)),
        grey=_where(u[:, 7] < view.grey_p), blur=_where(u[:, 8] < view.blur_p), sigma_N=_float(sigma),
        solarise=_where(u[:, 10] < view.solarise_p), flip=_where(u[:, 11] < view.flip_p),
    )  # fmt: skip


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _where(flags: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(flags))


@torch.no_grad()
def finish(crops: Tensor, colours: Colours, *, mean: Tensor, std: Tensor) -> Tensor:
    """N x S x S x 3 uint8 crops -> N x 3 x S x S float32 normalised, channels_last, on the crops' device."""
    n, side = crops.shape[:2]
    out = torch.empty((n, 3, side, side), device=crops.device, memory_format=torch.channels_last)
    at_once = n if crops.is_cuda else max(1, CACHE_BYTES // (12 * side * side))  # a CPU's cache is the limit
    for first in range(0, n, at_once):
        last = min(first + at_once, n)
        part = colours if at_once >= n else colours.part(first, last)
        x = _coloured(crops[first:last], part)
        out[first:last] = x.sub_(mean[:, None, None]).div_(std[:, None, None])
    return out


def _coloured(crops: Tensor, colours: Colours) -> Tensor:
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for k in range(4):
        turns = colours.hue_N[colours.hue_at[k]]
        _subset(x, colours.hue_at[k], functools.partial(shift_hue, turns_N=turns))
        if k < 3:
            blend(x, colours.blend_3N[k], colours.grey_share_3N[k], colours.mean_share_3N[k])
    _subset(x, colours.grey, lambda part: greyscale(part).expand_as(part))
    _subset(x, colours.blur, lambda part: gaussian_blur(part, colours.sigma_N[colours.blur]))
    _subset(x, colours.solarise, solarise)
    _subset(x, colours.flip, lambda part: part.flip(-1))
    return x


def _subset(x: Tensor, indices: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    if len(indices):
        x[indices] = operation(x[indices])


def greyscale(x: Tensor) -> Tensor:
    """N x 3 x H x W -> N x 1 x H x W."""
    return (x[:, :1] * GREY[0]).add_(x[:, 1:2], alpha=GREY[1]).add_(x[:, 2:], alpha=GREY[2])


def blend(x: Tensor, factor_N: Tensor, grey_share_N: Tensor, mean_share_N: Tensor) -> None:
    """In place: x <- clamp(factor · x + (1 - factor) · base), base black, grey or mean grey, per image."""
    grey = greyscale(x)
    rest = (1 - factor_N)[:, None, None, None]
    # Row by row first: the sum of one whole image torch shares among its threads, and so in an order of their
    # number, which a loader's worker has one of.
    mean = grey.mean(3, keepdim=True).mean(2, keepdim=True)
    base = mean.mul_(rest * mean_share_N[:, None, None, None])
    base = grey.mul_(rest * grey_share_N[:, None, None, None]).add_(base)
    x.mul_(factor_N[:, None, None, None]).add_(base).clamp_(0, 1)


def shift_hue(x: Tensor, turns_N: Tensor) -> Tensor:
    """Rotate the hue of N x 3 x H x W images in [0, 1] by `turns_N`, value and saturation kept (HSV)."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    per_chroma = 1 / chroma.clamp_min(1e-12)
    hue6 = torch.where(
        high == r, (g - b) * per_chroma,
        torch.where(high == g, (b - r) * per_chroma + 2, (r - g) * per_chroma + 4),
    )  # fmt: skip
    hue6 = hue6 + 6 * turns_N[:, None, None]
    # HSV to RGB without cases: value - chroma · clamp(min(k, 4 - k), 0, 1), k = (5, 3, 1) + 6 hue mod 6.
    out = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):
        k = torch.remainder(hue6 + offset, 6)
        torch.sub(high, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma), out=out[:, channel])
    return out


def gaussian_blur(x: Tensor, sigma_N: Tensor) -> Tensor:
    """N x 3 x H x W blurred with a standard deviation per image in px, reflected at the borders.

    On a CPU by OpenCV, which is many times faster there and equal to 1e-6.
    """
    half = min(BLUR_KERNEL // 2, x.shape[-2] - 1, x.shape[-1] - 1)
    return (_blur_by_opencv if x.device.type == "cpu" else _blur_by_convolution)(x, sigma_N, half)


def _blur_by_opencv(x: Tensor, sigma_N: Tensor, half: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for planes_in, planes_out, sigma in zip(x.numpy(), out.numpy(), sigma_N.tolist()):
        for plane, blurred in zip(planes_in, planes_out):
            cv2.GaussianBlur(
                plane, (2 * half + 1,) * 2, sigma, dst=blurred, borderType=cv2.BORDER_REFLECT_101
            )
    return out


def _blur_by_convolution(x: Tensor, sigma_N: Tensor, half: int) -> Tensor:
    n, c, height, _ = x.shape
    at = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (at / sigma_N[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(c, 0)
    padded = torch.nn.functional.pad(x, [half] * 4, mode="reflect").reshape(1, n * c, height + 2 * half, -1)
    padded = torch.nn.functional.conv2d(padded, weights[:, None, None, :], groups=n * c)
    return torch.nn.functional.conv2d(padded, weights[:, None, :, None], groups=n * c).reshape(x.shape)


def solarise(x: Tensor) -> Tensor:
    """Invert what is at least 128 / 255 bright."""
    return torch.where(x >= 128 / 255, 1 - x, x)
