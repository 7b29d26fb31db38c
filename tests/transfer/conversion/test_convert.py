"""Conversion to detectron2 and back: exact for every depth, refused with a reason, proved on the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from pretrain.network.model import build_backbone
from transfer.conversion import convert, layout
from transfer.conversion.proof import prove, prove_state
from transfer.conversion.weights_file import read_pickle


def lively(model: nn.Module, seed: int = 0) -> Any:
    """BatchNorm statistics and weights that are not those of initialisation, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5), (module.bias.data, -0.2, 0.2),
            ):  # fmt: skip
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


@pytest.fixture(scope="module")
def resnet18() -> Any:
    torch.manual_seed(0)
    return lively(timm.create_model("resnet18", num_classes=0))


def written(model: nn.Module, path: Path, weights: dict[str, Any] | None = None) -> Path:
    weights = weights or convert.to_detectron2(model.state_dict())
    convert.write_pickle(path, weights, {"options": convert.shape_of(weights).options()})
    return path


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_features_are_equal_to_the_last_bit(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(timm.create_model(arch, num_classes=0))
    assert prove(model, written(model, tmp_path / "w.pkl")) == 0.0
    weights = convert.to_detectron2(model.state_dict())
    assert convert.shape_of(weights).timm_arch() == arch
    back = convert.from_detectron2(weights)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet101", "resnet152", "resnext101_32x8d"])
def test_deep_ones_are_named_and_shaped_right(arch: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=0)
    zeros = {k: torch.empty(v.shape, device="meta") for k, v in model.state_dict().items()}
    renamed = layout._rename(zeros, to_timm=False)
    assert convert.shape_of(renamed).timm_arch() == arch


def test_the_proof_catches_a_broken_conversion(resnet18: Any, tmp_path: Path) -> None:
    good = convert.to_detectron2(resnet18.state_dict())
    swapped = dict(good)
    a, b = "res3.0.conv1.norm.bias", "res3.0.conv2.norm.bias"
    swapped[a], swapped[b] = good[b], good[a]
    with pytest.raises(UserError, match="res3: detectron2's features differ"):
        prove(resnet18, written(resnet18, tmp_path / "a.pkl", swapped))
    lacking = {k: v for k, v in good.items() if k != "res5.1.conv2.norm.running_var"}
    with pytest.raises(UserError, match=r"res5\.1\.conv2\.norm\.running_var"):
        prove(resnet18, written(resnet18, tmp_path / "b.pkl", lacking))
    surplus = {**good, "res5.1.conv9.weight": good["stem.conv1.weight"]}
    with pytest.raises(UserError, match=r"res5\.1\.conv9\.weight"):
        prove(resnet18, written(resnet18, tmp_path / "c.pkl", surplus))
    assert prove_state(resnet18, {k: torch.from_numpy(v) for k, v in good.items()}) == 0.0


def test_the_command_writes_a_proved_file_with_its_origin(resnet18: Any, tmp_path: Path, capsys: Any) -> None:
    torch.save(resnet18.state_dict(), tmp_path / "plain.pth")
    out = tmp_path / "intl.pkl"
    assert run(convert.main, ["--weights", str(tmp_path / "plain.pth"), "--output", str(out)]) == 0
    assert "proved equal" in capsys.readouterr().out
    origin = read_pickle(out)["origin"]
    assert origin["arch"] == "resnet18" and origin["branch"] == "online" and origin["verified"] is True
    assert len(origin["sha256"]) == 64 and origin["options"]["MODEL.RESNETS.DEPTH"] == 18
    assert prove(resnet18, out) == 0.0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    back = tmp_path / "back.safetensors"
    words = ["--weights", str(out), "--output", str(back), "--reverse"]
    assert run(convert.main, words) == 0
    from safetensors.torch import load_file

    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file(back))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), resnet18(x))


def test_a_failed_proof_writes_nothing(resnet18: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    torch.save(resnet18.state_dict(), tmp_path / "plain.pth")
    honest = convert.to_detectron2
    out = tmp_path / "intl.pkl"
    words = ["--weights", str(tmp_path / "plain.pth"), "--output", str(out)]
    assert run(convert.main, [*words, "--no-verify"]) == 0
    earlier = out.read_bytes()

    def broken(state: Any) -> Any:
        weights = honest(state)
        weights["res4.1.conv2.weight"] = weights["res4.1.conv2.weight"][:, :, ::-1].copy()
        return weights

    monkeypatch.setattr(convert, "to_detectron2", broken)
    assert run(convert.main, words) == 2
    assert "res4: detectron2's features differ" in capsys.readouterr().err
    assert out.read_bytes() == earlier
    out.write_bytes(b"theirs")
    assert run(convert.main, words) == 2
    assert "exists and no earlier run wrote it" in capsys.readouterr().err
    assert out.read_bytes() == b"theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["intl.pkl", "plain.pth"]


def test_what_detectron2_cannot_represent_is_refused_with_the_reason() -> None:
    cifar = build_backbone("resnet18", stem="cifar")
    with pytest.raises(UserError, match=r"3x3 convolution .* \(a CIFAR stem\)"):
        convert.to_detectron2(cifar.state_dict())
    with torch.device("meta"):
        deep = timm.create_model("resnet50d", num_classes=0).state_dict()
        squeeze = timm.create_model("seresnet50", num_classes=0).state_dict()
        short = timm.create_model("resnet26", num_classes=0).state_dict()
    with pytest.raises(UserError, match="deep stem"):
        convert.to_detectron2(deep)
    with pytest.raises(UserError, match=r"no counterpart of layer1\.0\.se"):
        convert.to_detectron2(squeeze)
    with pytest.raises(UserError, match="ResNet-18, 34, 50, 101 and 152 only"):
        convert.to_detectron2(short)


def bottlenecks_with_stride_in_1x1() -> Any:
    """A ResNet-50 as Caffe's and MSRA's are: the stride lies in the first 1x1 convolution."""
    torch.manual_seed(0)
    model = lively(timm.create_model("resnet50", num_classes=0))
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return model


def test_reverse_asks_where_the_stride_lies_and_which_colours(tmp_path: Path, capsys: Any) -> None:
    model = bottlenecks_with_stride_in_1x1()
    weights = {k: torch.from_numpy(v) for k, v in convert.to_detectron2(model.state_dict()).items()}
    torch.save({"model": weights}, tmp_path / "detector.pth")
    back = tmp_path / "b.safetensors"
    words = ["--weights", str(tmp_path / "detector.pth"), "--output", str(back), "--reverse"]
    assert run(convert.main, words) == 2
    assert "say --stride-in-1x1 true or false" in capsys.readouterr().err
    assert run(convert.main, [*words, "--stride-in-1x1", "true"]) == 2
    assert "say --channels bgr or --channels rgb" in capsys.readouterr().err
    assert run(convert.main, [*words, "--stride-in-1x1", "true", "--channels", "bgr"]) == 0
    from transfer.checkpoints.backbone import load_backbone

    loaded = load_backbone(tmp_path / "b.safetensors")  # its metadata say where the stride lies
    image = torch.rand(1, 3, 64, 64).double()
    torch.testing.assert_close(loaded.model.double()(image), model.double()(image.flip(1)))
    again = tmp_path / "again.pkl"
    assert run(convert.main, ["--weights", str(tmp_path / "b.safetensors"), "--output", str(again)]) == 0
    assert read_pickle(again)["origin"]["options"]["MODEL.RESNETS.STRIDE_IN_1X1"] is True


def test_reverse_reads_what_a_run_recorded(tmp_path: Path) -> None:
    recorded = {
        "INPUT.FORMAT": "BGR", "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    }  # fmt: skip
    said = convert._recorded({"run": {"settings": recorded, "origin": {}}})
    assert (said["stride_in_1x1"], said["channels"]) == (True, "bgr")
    assert said["mean"] == "0.485,0.456,0.406"  # of red, green and blue, pixels from 0 to 1
    assert said["std"] == "0.00392157,0.00392157,0.00392157"
    assert convert._recorded({}) == {}


def test_reverse_reads_a_whole_detector(resnet18: Any, tmp_path: Path) -> None:
    weights = convert.to_detectron2(resnet18.state_dict())
    detector = {f"backbone.bottom_up.{k}": torch.from_numpy(v) for k, v in weights.items()}
    detector["backbone.fpn_lateral2.weight"] = torch.zeros(3)
    detector["roi_heads.box_head.fc1.weight"] = torch.zeros(3)
    back = convert.from_detectron2({k: v for k, v in detector.items() if "num_batches" not in k})
    assert back.keys() == resnet18.state_dict().keys()
    with pytest.raises(UserError, match="no detectron2 ResNet"):
        convert.from_detectron2({"conv1_w": torch.zeros(1)})


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    file = tmp_path / "evil.pkl"
    file.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(UserError, match="could run code"):
        read_pickle(file)
    assert not (tmp_path / "ran").exists()
