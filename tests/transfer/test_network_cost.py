"""Parameters and multiply-adds, by hand and beside published figures."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from transfer.evaluation.tokens import at_size
from transfer.network_cost import network_cost


def cost(model: nn.Module, size: int) -> dict[str, int]:
    return network_cost(
        model, size, key=id(model), fitted=lambda hollow: at_size(hollow, size, "bicubic antialias")
    )


def test_a_vit_by_hand_at_its_own_size_and_another() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, img_size=32)
    d = 192
    for size, patches in ((32, 4), (64, 16)):
        n = patches + 1  # the class token
        # patch embedding; a block's qkv (3), projection (1) and MLP (8); queries by keys, weights by values
        by_hand = patches * d * 3 * 16 * 16 + 2 * (12 * n * d * d + 2 * n * n * d)
        assert cost(model, size)["multiply_adds"] == by_hand
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    embedding = 3 * 16 * 16 * d + d + d + 5 * d  # kernel, bias, class token, positions
    assert cost(model, 32)["parameters"] == embedding + 2 * block + 2 * d
    assert model.pos_embed.shape == (1, 5, d) and model.pos_embed.device.type == "cpu"  # itself unchanged


def test_a_resnet_50_has_the_published_count() -> None:
    # torchvision/models/resnet.py, ResNet50_Weights: num_params 25557032 and _ops 4.089 with the classifier
    with torch.device("meta"):
        model = timm.create_model("resnet50", num_classes=0)
    found = cost(model, 224)
    assert found["parameters"] == 25557032 - (2048 * 1000 + 1000)
    assert (found["multiply_adds"] + 2048 * 1000) / 1e9 == pytest.approx(4.089, abs=5e-4)


class Odd(nn.Module):
    """A network that looks at its numbers, which a copy without numbers has none of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = images.mean((2, 3))
        return self.layer(pooled) if float(pooled.sum()) > 0 else self.layer(-pooled)


def test_a_network_that_cannot_be_followed_has_its_parameters_alone() -> None:
    assert cost(Odd(), 8) == {"parameters": 8}
