"""Colour, blur, solarisation, flip and normalisation of a batch of crops, each image by numbers of its own.

Each operation equals torchvision's tensor functional of the same parameters on float images. Choices: the
order of brightness, contrast, saturation and hue is random per image, as in torchvision; the blur is
torchvision's with a kernel of 13 px (3 standard deviations at 2 px), for Pillow's in the published code.

Letters of shapes: N images, S side of the view in px.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from pretrain.views.augment import View

BLUR_KERNEL = 13
GREY = (0.2989, 0.587, 0.114)  # torchvision.transforms.functional.rgb_to_grayscale
CACHE_BYTES = 1 << 20  # of float32 images that one pass of `finish` holds on a CPU
ORDERS = np.array(list(itertools.permutations(range(3))))  # of brightness, contrast, saturation


class Colours(NamedTuple):
    """What `finish` does to each of N images: flags and numbers; None for what a view never does."""

    blend_3N: Tensor | None
    """Factors of the three blending operations, in the order they are applied; 1 does nothing."""
    grey_share_3N: Tensor | None
    """1 where that operation blends with the greyscale image (saturation), else 0."""
    mean_share_3N: Tensor | None
    """1 where it blends with the mean of the greyscale image (contrast); both 0: black (brightness)."""
    hue_4N: Tensor | None
    """Whose hue is shifted before blending operation 0, 1, 2 and after the last."""
    turns_N: Tensor | None
    """By how much, in turns."""
    grey_N: Tensor | None
    """Who is made grey, and so on."""
    blur_N: Tensor | None
    sigma_N: Tensor | None
    solarise_N: Tensor | None
    flip_N: Tensor | None

    def part(self, first: int, last: int) -> Colours:
        """Those of images `first` to `last` - 1."""
        return Colours(*(t if t is None else t[..., first:last] for t in self))


def draw_colours(u: np.ndarray, view: View) -> Colours:
    """Parameters from N x 14 uniform numbers, distributed as in torchvision's ColorJitter and the rest."""
    jittered = u[:, 0] < view.jitter_p
    strength = np.array(view.jitter[:3])
    low = np.maximum(0, 1 - strength)
    factors = low + (1 + strength - low) * u[:, 1:4]
    order = ORDERS[np.minimum((u[:, 5] * 6).astype(int), 5)]
    blends, shifts = (view.jitter_p > 0 and reach > 0 for reach in (strength.max(), view.jitter[3]))
    blend = np.where(jittered[:, None], np.take_along_axis(factors, order, 1), 1.0)
    hue_4N = jittered & ((u[:, 6] * 4).astype(int) == np.arange(4)[:, None])
    sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * u[:, 9]

    def flags(p: float, column: int) -> Tensor | None:
        return torch.from_numpy(u[:, column] < p) if p > 0 else None

    return Colours(
        blend_3N=_float(blend.T) if blends else None,
        grey_share_3N=_float(order.T == 2) if blends else None,
        mean_share_3N=_float(order.T == 1) if blends else None,
        hue_4N=torch.from_numpy(hue_4N) if shifts else None,
        turns_N=_float(view.jitter[3] * (2 * u[:, 4] - 1)) if shifts else None,
        grey_N=flags(view.grey_p, 7), blur_N=flags(view.blur_p, 8),
        sigma_N=_float(sigma) if view.blur_p > 0 else None,
        solarise_N=flags(view.solarise_p, 10), flip_N=flags(view.flip_p, 11),
    )  # fmt: skip


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


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
        if colours.hue_4N is not None:
            x = _where(colours.hue_4N[k], x, shift_hue, colours.turns_N)
        if k < 3 and colours.blend_3N is not None:
            assert colours.grey_share_3N is not None and colours.mean_share_3N is not None
            blend(x, colours.blend_3N[k], colours.grey_share_3N[k], colours.mean_share_3N[k])
    x = _where(colours.grey_N, x, lambda part: greyscale(part).expand_as(part))
    x = _where(colours.blur_N, x, gaussian_blur, colours.sigma_N)
    x = _where(colours.solarise_N, x, solarise)
    return _where(colours.flip_N, x, lambda part: part.flip(-1))


def _where(
    flags_N: Tensor | None, x: Tensor, operation: Callable[..., Tensor], *values_N: Tensor | None
) -> Tensor:
    """x with the images whose flag is set changed, on a CPU in place.

    A GPU changes all and keeps some: asking it which there are would make the host wait, and no graph of a
    step could be captured.
    """
    if flags_N is None:
        return x
    if x.is_cuda:
        return torch.where(flags_N[:, None, None, None], operation(x, *values_N), x)
    if flags_N.any():
        x[flags_N] = operation(x[flags_N], *(v[flags_N] for v in values_N if v is not None))
    return x


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
    out = x.new_empty(3, *high.shape)  # channels first: where they lie apart a compiler would stop at `out=`
    for channel, offset in enumerate((5, 3, 1)):
        k = torch.remainder(hue6 + offset, 6)
        torch.sub(high, torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma), out=out[channel])
    return out.transpose(0, 1)


def gaussian_blur(x: Tensor, sigma_N: Tensor) -> Tensor:
    """N x 3 x H x W blurred with a standard deviation per image in px, reflected at the borders.

    On a CPU by OpenCV, which is many times faster there and equal to 1e-6.
    """
    half = min(BLUR_KERNEL // 2, x.shape[-2] - 1, x.shape[-1] - 1)
    return (_blur_by_opencv if x.device.type == "cpu" else _blur_by_sums)(x, sigma_N, half)


def _blur_by_opencv(x: Tensor, sigma_N: Tensor, half: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for planes_in, planes_out, sigma in zip(x.numpy(), out.numpy(), sigma_N.tolist()):
        for plane, blurred in zip(planes_in, planes_out):
            cv2.GaussianBlur(
                plane, (2 * half + 1,) * 2, sigma, dst=blurred, borderType=cv2.BORDER_REFLECT_101
            )
    return out


def _blur_by_sums(x: Tensor, sigma_N: Tensor, half: int) -> Tensor:
    """One pass along the rows, one along the columns, each the weighted sum of shifted images."""
    at = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (at / sigma_N[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True))[..., None, None, None]
    for axis, border in ((3, [half, half, 0, 0]), (2, [0, 0, half, half])):
        padded, side = torch.nn.functional.pad(x, border, mode="reflect"), x.shape[axis]
        x = padded.narrow(axis, 0, side) * weights[:, 0]
        for k in range(1, 2 * half + 1):
            x = x.addcmul(padded.narrow(axis, k, side), weights[:, k])
    return x


def solarise(x: Tensor) -> Tensor:
    """Invert what is at least 128 / 255 bright."""
    return torch.where(x >= 128 / 255, 1 - x, x)
