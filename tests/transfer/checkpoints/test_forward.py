"""The same keys fit several forward passes: what the file says is read, the rest is asked for or noted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from pretrain.common.errors import UserError
from tests.helpers import checkpoint_zoo as zoo
from transfer.checkpoints.backbone import find, load_backbone
from transfer.checkpoints.formats import Format
from transfer.checkpoints.forward import forward_of
from transfer.checkpoints.safe_load import load_file
from transfer.options.weights import WeightsOptions

A, B = zoo.backbone(0), zoo.backbone(1)
CIFAR = zoo.backbone(cifar=True)
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()


def save(value: Any, tmp_path: Path) -> Path:
    torch.save(value, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def padding(value: Any, tmp_path: Path, **options: Any) -> int:
    path = save(value, tmp_path)
    return find(load_file(path), path, WeightsOptions(**options)).forward.stem_padding


def test_the_padding_of_a_3x3_stem_is_known_or_asked_for(tmp_path: Path):
    lightning = zoo.lightning(zoo.pre("backbone.", CIFAR) | zoo.head("head."))
    mm = {"meta": {"epoch": 3}, "state_dict": zoo.pre("backbone.", CIFAR) | zoo.linear("head.fc.")}
    assert padding(mm, tmp_path) == 1
    assert padding(lightning, tmp_path) == 1  # without solo-learn's online classifier no writer has 2
    simclr = zoo.lightning(zoo.pre("encoder.", CIFAR) | zoo.head("projector."))
    assert padding(simclr, tmp_path) == 1
    solo = zoo.lightning(zoo.pre("backbone.", CIFAR) | zoo.head("projector.") | zoo.linear("classifier."))
    assert padding(solo, tmp_path) == 2
    assert padding(solo, tmp_path, stem_padding=1) == 1
    with pytest.raises(UserError, match="no 3x3 stem"):
        padding({"state_dict": A}, tmp_path, stem_padding=1)


def test_writers_that_disagree_on_the_padding_are_not_chosen_from(tmp_path: Path):
    path = save(zoo.lightning(zoo.pre("backbone.", CIFAR) | zoo.head("head.")), tmp_path)
    raw = load_file(path)
    reading = find(raw, path, WeightsOptions()).reading
    other = Format(name="another writer", online=reading.format.online, cifar_padding=2)
    both = [reading, dataclasses.replace(reading, format=other)]
    with pytest.raises(
        UserError, match=r"fits .*another writer \(2\)\. Say --stem-padding 1 or --stem-padding 2"
    ):
        forward_of(reading, both, raw, WeightsOptions(), {}, path)
    said = forward_of(reading, both, raw, WeightsOptions(stem_padding=2), {}, path)
    assert said.stem_padding == 2
    marked = dataclasses.replace(reading, marked=True)  # the file's top names the writer
    assert forward_of(marked, [marked, both[1]], raw, WeightsOptions(), {}, path).stem_padding == 1


def reference(state: dict[str, Any], change: Any) -> torch.Tensor:
    """torchvision's own ResNet with the weights, changed by hand."""
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    change(model)
    model.load_state_dict(state)
    return model.eval().double()(IMAGES)


@pytest.mark.parametrize(
    ("stem", "stride", "pool"),
    [
        ("cifar", 1, False),
        ("cifar-pool", 1, True),
        ("cifar-stride2", 2, False),
        ("cifar-stride2-pool", 2, True),
    ],
)
def test_stems_of_3x3(stem: str, stride: int, pool: bool, tmp_path: Path):
    def change(model: Any) -> None:
        model.conv1 = nn.Conv2d(3, 64, 3, stride, 1, bias=False)
        model.maxpool = model.maxpool if pool else nn.Identity()

    loaded = load_backbone(save(CIFAR, tmp_path), stem=stem)
    torch.testing.assert_close(loaded.model.double()(IMAGES), reference(CIFAR, change))
    assert loaded.stem == stem and f"--stem {stem}" in loaded.key
    assert any("does yours pool" in note for note in load_backbone(save(CIFAR, tmp_path)).notes)
    with pytest.raises(UserError, match=r"first convolution of .* is 3x3"):
        load_backbone(save(CIFAR, tmp_path), stem="imagenet")


def test_stem_without_pooling_last_stride_and_colours(tmp_path: Path):
    path = save(A, tmp_path)
    for options, change in (
        ({"stem": "imagenet-nopool"}, lambda m: setattr(m, "maxpool", nn.Identity())),
        ({"last_stride": 1}, lambda m: [setattr(c, "stride", (1, 1))
                                        for c in (m.layer4[0].conv1, m.layer4[0].downsample[0])]),
    ):  # fmt: skip
        torch.testing.assert_close(
            load_backbone(path, **options).model.double()(IMAGES), reference(A, change)
        )
    turned = load_backbone(path, channels="bgr").model.double()(IMAGES.flip(1))
    torch.testing.assert_close(turned, reference(A, lambda m: None))
    with pytest.raises(UserError, match="a resnet18 has no 1x1 convolutions"):
        load_backbone(path, stride_in_1x1=True)


def test_the_stride_that_the_file_names_is_taken(tmp_path: Path):
    """mmpretrain writes its settings as text beside the weights; style caffe has the stride in the 1x1."""
    state = {
        k: v * 0.2 if k.endswith("conv1.weight") else v for k, v in zoo.backbone(arch="resnet50").items()
    }
    config = (
        "model = dict(backbone=dict(type='ResNet', depth=50, style='caffe'))\ndata_preprocessor = dict("
        "mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"
    )
    value = {"meta": {"config": config}, "state_dict": zoo.pre("backbone.", state)}
    loaded = load_backbone(save(value, tmp_path))
    model = torchvision.models.resnet50()
    model.fc = nn.Identity()
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    model.load_state_dict(state)
    torch.testing.assert_close(loaded.model.double()(IMAGES), model.eval().double()(IMAGES.flip(1)))
    assert loaded.weights["read_with"] == "--stride-in-1x1 true --channels bgr"
    # in the order of RGB, of pixels from 0 to 1
    assert [float(v) for v in loaded.metadata["mean"].split(",")] == pytest.approx([0.485, 0.456, 0.406])
    assert [float(v) for v in loaded.metadata["std"].split(",")] == pytest.approx([1 / 255] * 3)
    plain = load_backbone(save(value, tmp_path), stride_in_1x1=False, channels="rgb")
    assert not torch.allclose(plain.model.double()(IMAGES), loaded.model.double()(IMAGES), rtol=1e-3)


def test_what_nobody_said_is_noted(tmp_path: Path):
    path = save(zoo.backbone(arch="resnet50"), tmp_path)
    [note] = [n for n in find(load_file(path), path, WeightsOptions()).notes if n.startswith("assumed")]
    for words in (
        "resnetaa50, resnetblur50",
        "--stride-in-1x1",
        "--last-stride",
        "--channels",
        "dilation",
        "epsilon",
    ):
        assert words in note
    said = WeightsOptions(arch="resnet50", stride_in_1x1=False, last_stride=2, channels="rgb")
    assert not any(n.startswith("assumed") for n in find(load_file(path), path, said).notes)
