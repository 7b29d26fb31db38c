"""Backbones, projector and the EMA branch: shapes, stems, strict loading elsewhere, and averages by hand."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from pretrain.common.errors import UserError
from pretrain.network.model import Encoder, build_backbone, build_projector, ema_update, target_encoder_of
from pretrain.schedules import ema_momentum_at


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_imagenet_stem_keys_load_strictly_in_timm_and_torchvision(arch: str) -> None:
    with torch.device("meta"):  # keys and shapes alone are compared
        state = build_backbone(arch).state_dict()
        timm.create_model(arch, num_classes=0).load_state_dict(state, strict=True)
        missing, unexpected = getattr(torchvision.models, arch)().load_state_dict(state, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected


def test_cifar_stem_has_effective_padding_two_and_no_pool() -> None:
    model = build_backbone("resnet18", stem="cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model.maxpool(model.act1(model.bn1(model.conv1(x)))).shape == (2, 64, 34, 34)
        assert model(x).shape == (2, 512)
        # The released code pads by 1 before a convolution that pads by 1 itself.
        twice = torch.nn.functional.conv2d(torch.nn.functional.pad(x, [1] * 4), model.conv1.weight, padding=1)
        assert torch.allclose(twice, model.conv1(x), atol=1e-5)


def test_last_bn_is_zeroed_except_in_shallow_networks() -> None:
    def last(model: torch.nn.Module) -> float:
        block = model.layer1[0]
        return float(getattr(block, "bn3", block.bn2).weight[0])

    assert last(build_backbone("resnet18")) == 1 and last(build_backbone("resnet34")) == 1
    assert last(build_backbone("resnet50")) == 0
    assert last(build_backbone("resnet18", zero_init_last=True)) == 0
    assert last(build_backbone("resnet50", zero_init_last=False)) == 1


def test_seed_fixes_the_backbone_whatever_comes_after_it() -> None:
    torch.manual_seed(3)
    a = build_backbone("resnet18")
    torch.manual_seed(3)
    b = build_backbone("resnet18")
    build_projector(512, hidden=8, output=8, layers=2)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("resnet19", "resnet18"),
        ("vit_small_patch16_224", "not a timm ResNet"),
        ("resnet50d", "not a timm ResNet"),
        ("", "timm"),
    ],
)
def test_other_architectures_are_refused(arch: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_backbone(arch)
    with pytest.raises(UserError, match="unknown stem 'big'"):
        build_backbone("resnet18", stem="big")


def test_projector_has_the_published_form() -> None:
    names = [type(m).__name__ for m in build_projector(512, hidden=16, output=8, layers=3)]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    first, last = build_projector(512, hidden=16, output=8, layers=3)[0::6]
    assert first.bias is None and last.bias is not None and last.out_features == 8
    assert len(build_projector(512, hidden=16, output=8, layers=1)) == 1


def test_views_of_different_sizes_share_the_encoder() -> None:
    encoder = Encoder(build_backbone("resnet18"), build_projector(512, hidden=16, output=8, layers=2))
    assert [z.shape for z in encoder([torch.randn(4, 3, s, s) for s in (32, 48)])] == [(4, 8)] * 2


def test_ema_by_hand() -> None:
    fast = Encoder(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    target = target_encoder_of(fast)
    for module, value in ((fast, 10.0), (target, 2.0)):
        torch.nn.init.constant_(module.backbone.weight, value)
    fast.projector.running_mean.fill_(5.0)
    ema_update(target, fast, 0.25)
    assert target.backbone.weight.item() == 0.75 * 2 + 0.25 * 10 == 4.0
    assert target.projector.running_mean.item() == 0  # statistics are each branch's own
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in fast.parameters())


def test_ema_momentum_rises_to_one() -> None:
    values = [ema_momentum_at(s, base=0.996, total=100) for s in (0, 50, 100)]
    assert values[0] == pytest.approx(0.996) and values[1] == pytest.approx(0.998) and values[2] == 1.0
