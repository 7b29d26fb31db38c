"""3x3 convolutions of very small feature maps as one matrix product, on a CPU.

The last stages of a ResNet have maps of 1 x 1 or 2 x 2 where images have 16 to 64 pixels a side. oneDNN then
trains at a tenth of the processor's speed or less, for most taps of a kernel lie on the padding. A map of so
few pixels is a short vector, and the convolution a matrix: its blocks are the taps that lie between an output
and an input pixel, and zero where none does. `python -m benchmarks small_maps` has figures.

Letters of shapes: B images, C channels in, D channels out, H x W pixels in, P x Q pixels out.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_IN, MOST_OUT = 9, 4  # pixels of a map: in larger ones the zeros cost more than oneDNN loses
IMAGES_A_PIXEL = 16  # of the input at least, to be worth writing the matrix

Module = TypeVar("Module", bound=nn.Module)


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution of padding 1, the same function of the same parameters whatever the map's size."""

    def forward(self, input: Tensor) -> Tensor:
        """B x C x H x W -> B x D x P x Q."""
        (b, _, h, w), stride = input.shape, self.stride[0]
        p, q = (h - 1) // stride + 1, (w - 1) // stride + 1
        if (
            input.device.type != "cpu" or b < IMAGES_A_PIXEL * h * w
            or h * w > MOST_IN or p * q > MOST_OUT
        ):  # fmt: skip
            return super().forward(input)
        x_BK = input.permute(0, 2, 3, 1).reshape(b, -1)
        bias_L = None if self.bias is None else self.bias.repeat(p * q)
        out_BL = linear(x_BK, as_matrix(self.weight, h, w, stride), bias_L)
        return out_BL.view(b, p, q, -1).permute(0, 3, 1, 2)


def as_matrix(weight_DC33: Tensor, h: int, w: int, stride: int = 1) -> Tensor:
    """The matrix P·Q·D x H·W·C that takes a flattened map, channels last, to its convolution of padding 1."""
    nothing_DC = torch.zeros_like(weight_DC33[:, :, 0, 0])

    def block(out_y: int, out_x: int, y: int, x: int) -> Tensor:
        tap_y, tap_x = y - out_y * stride + 1, x - out_x * stride + 1
        return weight_DC33[:, :, tap_y, tap_x] if 0 <= tap_y < 3 and 0 <= tap_x < 3 else nothing_DC

    return torch.cat([
        torch.cat([block(out_y, out_x, y, x) for y in range(h) for x in range(w)], dim=1)
        for out_y in range((h - 1) // stride + 1) for out_x in range((w - 1) // stride + 1)
    ])  # fmt: skip


def multiply_small_maps(module: Module) -> Module:
    """Let the 3x3 convolutions in `module` be matrix products where maps are small; returns it.

    Parameters, their names and, but for rounding, what is computed stay as they are.
    """
    for conv in module.modules():
        if (
            type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and conv.padding == (1, 1)
            and conv.padding_mode == "zeros" and conv.stride in ((1, 1), (2, 2))
            and conv.dilation == (1, 1) and conv.groups == 1
        ):  # fmt: skip
            conv.__class__ = SmallMapConv2d
    return module
