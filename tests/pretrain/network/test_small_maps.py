"""Convolutions as matrix products: the same values and gradients as nn.Conv2d's, and when they are taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pretrain.network.small_maps
from pretrain.network.model import build_backbone
from pretrain.network.small_maps import SmallMapConv2d, as_matrix, multiply_small_maps


def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the maps that become matrices, as it happens."""
    taken: list[tuple[int, int]] = []

    def noted(weight: torch.Tensor, h: int, w: int, stride: int = 1) -> torch.Tensor:
        taken.append((h, w))
        return as_matrix(weight, h, w, stride)

    monkeypatch.setattr(pretrain.network.small_maps, "as_matrix", noted)
    return taken


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "stride"),
    [((1, 1), 1), ((1, 1), 2), ((2, 2), 1), ((2, 2), 2), ((3, 3), 2), ((1, 2), 1), ((3, 1), 1), ((4, 2), 2)],
)
def test_values_and_gradients_are_the_convolutions(
    size: tuple[int, int], stride: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = products(monkeypatch)
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, stride, 1, bias=bias).double()
    ours = multiply_small_maps(copy.deepcopy(plain))
    x = torch.randn(16 * size[0] * size[1], 5, *size, dtype=torch.float64, requires_grad=True)
    wanted, got = plain(x), ours(x)
    assert taken == [size] and got.shape == wanted.shape
    seed = torch.randn_like(wanted)
    grads = [
        torch.autograd.grad(out, [x, *conv.parameters()], seed)
        for out, conv in ((wanted, plain), (got, ours))
    ]
    for a, b in zip((wanted, *grads[0]), (got, *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_resnet_keeps_its_keys_and_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = products(monkeypatch)
    torch.manual_seed(0)
    plain = build_backbone("resnet18").double()
    ours = multiply_small_maps(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-10, atol=1e-10)
    # layer3 has 2 x 2 maps (its first convolution sees 4 x 4, too many), layer4 1 x 1 but for its first
    assert taken == [(2, 2)] * 4 + [(1, 1)] * 3
    taken.clear()
    ours(x[:15])
    ours(torch.randn(16, 3, 96, 96, dtype=torch.float64))
    assert taken == []


def test_only_what_it_can_multiply_is_taken() -> None:
    others = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, stride=3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(4, 4, 3, padding=1),
    )  # fmt: skip
    assert not any(isinstance(m, SmallMapConv2d) for m in multiply_small_maps(others).modules())
