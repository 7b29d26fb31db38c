"""Each export loads in the library it is named after and computes the same features."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.common.errors import UserError
from pretrain.common.files import append_jsonl, sha256_of
from pretrain.network.model import build_backbone
from tests.helpers import checkpoint_zoo as zoo
from transfer import export as exporting
from transfer.__main__ import main
from transfer.checkpoints.backbone import load_backbone

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def moco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foreign training checkpoint whose two branches compute different, sensible features."""
    branches = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_backbone("resnet18")
        model.train()(torch.randn(16, 3, 64, 64))  # BatchNorm statistics of its own
        branches.append(model.state_dict())
    path = tmp_path_factory.mktemp("moco") / "moco.pth.tar"
    torch.save(zoo.ZOO["MoCo v1, v2; PCL"][0](*branches), path)
    return path


@pytest.fixture(scope="module")
def features(moco: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_backbone(moco).model(IMAGES)


def run(*words: object) -> int:
    return main(["export", *map(str, words)])


def test_timm(moco: Path, features: torch.Tensor, tmp_path: Path):
    assert run("--weights", moco, "--output", tmp_path / "out", "--format", "timm") == 0
    path = tmp_path / "out" / "resnet18.safetensors"
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file(path), strict=True)
    torch.testing.assert_close(model.eval()(IMAGES), features)
    again = load_backbone(path)  # and it can be judged here, still saying where it came from
    assert again.metadata["origin_sha256"] == sha256_of(moco)
    assert again.metadata["source"] == "MoCo v1, v2; PCL"


def test_the_branch_asked_for_is_exported(moco: Path, features: torch.Tensor, tmp_path: Path):
    assert run("--weights", moco, "--output", tmp_path, "--format", "torchvision", "--branch", "ema") == 0
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "resnet18.pth", weights_only=True), strict=True)
    got = model.eval()(IMAGES)
    torch.testing.assert_close(got, load_backbone(moco, branch="ema").model(IMAGES))
    assert not torch.allclose(got, features)
    assert json.loads((tmp_path / "export.json").read_text())["branch"] == "ema"


def test_detectron2(moco: Path, features: torch.Tensor, tmp_path: Path):
    pytest.importorskip("detectron2")
    from transfer.conversion.layout import from_detectron2
    from transfer.conversion.weights_file import read_detectron2

    assert run("--weights", moco, "--output", tmp_path, "--format", "detectron2") == 0
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(from_detectron2(read_detectron2(tmp_path / "backbone.pkl")["model"]), strict=True)
    torch.testing.assert_close(model.eval()(IMAGES), features)


def test_huggingface_folder_with_results(moco: Path, features: torch.Tensor, tmp_path: Path):
    line = {
        "task": "knn", "dataset": "cifar10", "split": "test", "n": 10000, "metrics": {"top1_k20": 61.25},
        "label_percent": 100, "epoch": None, "selection": "last", "arch": "resnet18", "seed": None,
        "protocol": {"name": "solo_knn", "version": 1, "hash": "abc"}, "versions": {}, "commit": "",
        "device": "cpu",
        "weights": {"path": str(moco), "sha256": sha256_of(moco), "format": "MoCo", "branch": "online"},
        "seconds": 1.0, "started_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    other = {**line, "metrics": {"top1_k20": 11.5}, "weights": {**line["weights"], "branch": "ema"}}
    for each in (line, other):
        append_jsonl(tmp_path / "knn" / "results.jsonl", each)
    words = ["--weights", moco, "--output", tmp_path / "out", "--format", "huggingface"]
    assert run(*words, "--results", tmp_path / "knn") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(model(IMAGES), features)
    assert list(timm.data.resolve_model_data_config(model)["input_size"]) == [3, 224, 224]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm")
    assert "61.25" in card and "11.5" not in card and sha256_of(moco) in card
    assert run(*words) == 0  # an earlier export may be replaced


@pytest.mark.parametrize("target", ["timm", "huggingface"])
def test_a_vit_is_exported_with_its_heads(target: str, tmp_path: Path):
    """MoCo v3's, whose heads its keys do not tell: the exported files do."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, num_heads=12).eval()
    with torch.no_grad():
        model.pos_embed[:, 0] = 0
    state = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state | zoo.head("module.predictor.")}, tmp_path / "m.pth")
    out = tmp_path / "out"
    assert run("--weights", tmp_path / "m.pth", "--output", out, "--format", target) == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        asked = {"heads": 12} if target == "huggingface" else {}  # its metadata are "pt" alone
        again = load_backbone(next(out.glob("*.safetensors")), **asked)
        torch.testing.assert_close(again.network()(images), wanted)
        if target == "huggingface":
            torch.testing.assert_close(
                timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images), wanted
            )
    assert "12 heads" in again.weights["network"]


@pytest.mark.parametrize("target", ["torchvision", "detectron2"])
def test_a_vit_is_refused_where_only_resnets_go(target: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    torch.save(state, tmp_path / "m.pth")
    assert run("--weights", tmp_path / "m.pth", "--output", tmp_path / "out", "--format", target) == 2
    assert f"{target} gets ResNets alone" in capsys.readouterr().err
    if target == "detectron2":
        words = ["convert", "--weights", str(tmp_path / "m.pth"), "--output", str(tmp_path / "b.pkl")]
        assert main([*words, "--no-verify"]) == 2
        assert "only ResNets are converted for detectron2" in capsys.readouterr().err


def test_preprocessing_is_what_the_weights_say(tmp_path: Path):
    path = tmp_path / "backbone.safetensors"
    said = {
        "format": "intl-bench/1", "arch": "resnet18", "stem": "imagenet", "branch": "online",
        "image_size": "48", "mean": "0.1,0.2,0.3", "std": "0.4,0.5,0.6",
    }  # fmt: skip
    save_file(build_backbone("resnet18").state_dict(), path, said)
    assert run("--weights", path, "--output", tmp_path / "hub", "--format", "huggingface") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert list(config["mean"]) == [0.1, 0.2, 0.3] and list(config["std"]) == [0.4, 0.5, 0.6]
    assert list(config["input_size"]) == [3, 48, 48] and config["crop_pct"] == 1.0


@pytest.mark.parametrize("target", ["timm", "torchvision", "detectron2", "huggingface"])
def test_a_cifar_stem_is_refused_with_the_reason(target: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "backbone.safetensors"
    save_file(
        build_backbone("resnet18", stem="cifar").state_dict(),
        path,
        {"format": "intl-bench/1", "arch": "resnet18", "stem": "cifar", "branch": "online"},
    )
    assert run("--weights", path, "--output", tmp_path / "out", "--format", target) == 2
    said = capsys.readouterr().err
    assert "CIFAR stem" in said and target in said and "7x7" in said
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_the_target_lacks(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "m.pth"
    torch.save(zoo.backbone(arch="resnet26d"), path)
    assert run("--weights", path, "--output", tmp_path / "a", "--format", "torchvision") == 2
    assert "torchvision has no resnet26d" in capsys.readouterr().err
    assert run("--weights", path, "--output", tmp_path / "b", "--format", "detectron2") == 2
    assert "deep stem" in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_wrong_export_is_noticed_and_leaves_nothing(moco: Path, tmp_path: Path, monkeypatch):
    """The control of the proof: one BatchNorm's statistics exchanged."""

    def wrong(loaded):
        state = {k: v.clone() for k, v in loaded.model.state_dict().items()}
        state["layer2.0.bn1.running_mean"] += 0.5
        return state

    monkeypatch.setattr(exporting, "_state", wrong)
    settings = exporting.ExportSettings(weights=moco, output=tmp_path / "out", format="timm")
    with pytest.raises(RuntimeError, match="computes other features"):
        exporting.export(settings)
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_not_overwritten(moco: Path, tmp_path: Path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"would replace: README\.md"):
        exporting.export(exporting.ExportSettings(weights=moco, output=tmp_path, format="huggingface"))
    assert (tmp_path / "README.md").read_text() == "mine" and "timm" in sys.modules


def test_results_of_other_weights_are_refused(moco: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("--weights", moco, "--output", tmp_path / "out", "--format", "huggingface",
               "--results", tmp_path / "absent") == 2  # fmt: skip
    assert "no such folder" in capsys.readouterr().err
