"""Weights files of the field: what loads, what is new in the model, and what to do about the others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_model

from pretrain.common.errors import UserError
from tests.helpers import checkpoint_zoo as zoo
from tests.transfer.detection.test_config import CASCADE, KEYPOINTS, RETINANET, TINY
from transfer.__main__ import main
from transfer.conversion.layout import to_detectron2
from transfer.conversion.weights_file import write_pickle
from transfer.detection.checkpointer import StrictCheckpointer, record_of, run_of
from transfer.detection.config import load_config


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0)


def detector(*words: str) -> Any:
    return build_model(load_config("scenes_R18_FPN", [*TINY, *words]))


@pytest.mark.parametrize(
    "words", [[], KEYPOINTS, CASCADE, RETINANET], ids=["mask", "keypoint", "cascade", "retina"]
)
def test_a_backbone_starts_every_detector(backbone: Any, words: list[str], tmp_path: Path) -> None:
    write_pickle(tmp_path / "w.pkl", to_detectron2(backbone.state_dict()), {})
    model = detector(*words)
    StrictCheckpointer(model).load(str(tmp_path / "w.pkl"))
    assert torch.equal(model.backbone.bottom_up.res5[1].conv2.weight, backbone.layer4[1].conv2.weight)


def test_the_fields_own_converters_leave_the_projector_in(backbone: Any, tmp_path: Path) -> None:
    weights = to_detectron2(backbone.state_dict())
    weights["stem.fc.0.weight"] = np.zeros((8, 8), np.float32)  # MoCo v2's projector, renamed
    weights["stem.fc.2.bias"] = np.zeros(8, np.float32)
    write_pickle(tmp_path / "moco.pkl", weights, {})
    StrictCheckpointer(detector()).load(str(tmp_path / "moco.pkl"))
    weights["res9.conv.weight"] = np.zeros(1, np.float32)  # what no converter leaves is still refused
    write_pickle(tmp_path / "moco.pkl", weights, {})
    with pytest.raises(UserError, match=r"1 unknown to the model \(res9"):
        StrictCheckpointer(detector()).load(str(tmp_path / "moco.pkl"))


def test_a_detector_of_other_categories_starts_all_but_its_predictors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    coco = detector("MODEL.ROI_HEADS.NUM_CLASSES", "80")
    torch.save({"model": coco.state_dict()}, tmp_path / "coco.pth")
    model = detector()
    start = StrictCheckpointer(model, other_categories=True)
    start.load(str(tmp_path / "coco.pth"), checkpointables=[])
    assert sorted(start.anew) == [
        "roi_heads.box_predictor.bbox_pred.bias", "roi_heads.box_predictor.bbox_pred.weight",
        "roi_heads.box_predictor.cls_score.bias", "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.mask_head.predictor.bias", "roi_heads.mask_head.predictor.weight",
    ]  # fmt: skip
    assert torch.equal(model.roi_heads.box_head.fc1.weight, coco.roi_heads.box_head.fc1.weight)
    with pytest.raises(UserError, match="of another shape"):  # to be judged, it must be whole
        StrictCheckpointer(detector()).load(str(tmp_path / "coco.pth"))
    other = detector("MODEL.ROI_BOX_HEAD.FC_DIM", "4")
    with pytest.raises(UserError, match="of another shape"):
        StrictCheckpointer(other, other_categories=True).load(str(tmp_path / "coco.pth"))


@pytest.mark.parametrize("writer", ["MoCo v1, v2; PCL", "DINO", "torchvision or timm", "only a teacher",
                                    "under backbone.resnet.", "none", "arrays in a .pkl"])  # fmt: skip
def test_a_raw_checkpoint_is_to_be_converted_first(backbone: Any, tmp_path: Path, writer: str) -> None:
    """The command that the answer names works, and gives a file that loads."""
    state = backbone.state_dict()
    known = {name: build for name, (build, _) in zoo.ZOO.items()} | {
        "only a teacher": lambda a, b: {"teacher": zoo.pre("backbone.", a)},
        "under backbone.resnet.": lambda a, b: zoo.pre("backbone.resnet.", a) | zoo.head("neck."),
        "none": lambda a, b: {"model": zoo.pre("trunk.", {k: v for k, v in a.items() if "bn1" not in k})},
    }
    file = tmp_path / ("raw.pkl" if writer == "arrays in a .pkl" else "raw.pth")
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}))
        writer = "torchvision or timm"
    else:
        torch.save(known[writer](state, state), file)
    with pytest.raises(UserError) as told:
        record_of(str(file))
    said = str(told.value)
    assert "--random-init" not in said
    if writer == "none":
        assert "nor anything that `python -m transfer convert` can take" in said and "missing: bn1" in said
        return
    new = "raw_detectron2.pkl" if file.suffix == ".pkl" else "raw.pkl"
    words = ["--weights", str(file), "--output", str(tmp_path / new)]
    if writer == "only a teacher":
        assert said.endswith("take it with --branch ema")
        words += ["--branch", "ema"]
    elif writer == "under backbone.resnet.":
        assert said.endswith("Take it with --prefix backbone.resnet. --drop neck.")
        words += ["--prefix", "backbone.resnet.", "--drop", "neck."]
    else:
        assert f"is a {writer} checkpoint of a resnet18, not yet in detectron2's layout" in said
        assert f"run `python -m transfer convert --weights {file} --output {new}` first" in said
        assert ("DINO's own evaluation uses the teacher: --branch ema" in said) == (writer == "DINO")
    assert main(["convert", *words, "--no-verify"]) == 0
    model = detector()
    StrictCheckpointer(model).load(str(tmp_path / new))
    assert torch.equal(model.backbone.bottom_up.res5[1].conv2.weight, backbone.layer4[1].conv2.weight)


def test_a_file_of_neither_kind_is_named(tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no detector or backbone of detectron2"):
        record_of(str(tmp_path / "other.pth"))
    torch.save({"model": detector().state_dict()}, tmp_path / "model.pth")
    assert record_of(str(tmp_path / "model.pth")) is None and run_of(str(tmp_path / "model.pth")) == {}
