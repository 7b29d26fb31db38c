"""COCO's numbers: all 24 equal to pycocotools', and right where they can be said by hand."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycocotools.mask as mask_codec
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta, register_lvis_instances
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transfer.detection.evaluation import (
    KEYPOINT_METRICS,
    METRICS,
    CityscapesAP,
    LvisAP,
    category_precisions,
    coco_evaluation,
    named_stats,
)


def by_pycocotools(annotations: Path, results: list[dict[str, Any]], task: str) -> np.ndarray:
    drop = "bbox" if task == "segm" else "segmentation"  # keypoints have neither
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = truth.loadRes([{k: v for k, v in r.items() if k != drop} for r in results])
        evaluation = COCOeval(truth, found, task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def perturbed(annotations: Path, seed: int) -> list[dict[str, Any]]:
    """Detections as a middling detector makes them: shifted, some doubled, some of another category, with
    the scores quantised so that ties occur."""
    rng = np.random.default_rng(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    categories = truth.getCatIds()
    results = []
    for annotation in truth.loadAnns(truth.getAnnIds()):
        mask = truth.annToMask(annotation)
        for _ in range(rng.integers(0, 3)):
            shift = rng.normal(0, 0.06 * np.sqrt(mask.sum()), 2).round().astype(int)
            moved = np.asfortranarray(np.roll(mask, shift, (0, 1)))
            rle = mask_codec.encode(moved)
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
            results.append({
                "image_id": annotation["image_id"], "category_id": category,
                "score": round(float(rng.random()), 2),
                "bbox": [float(v) for v in mask_codec.toBbox(rle)],
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            })  # fmt: skip
    return results


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_all_numbers_equal_pycocotools(coco_mini: Path, task: Literal["bbox", "segm"], seed: int) -> None:
    results = perturbed(coco_mini / "instances.json", seed)
    ours = list(named_stats(coco_evaluation(coco_mini / "instances.json", results, task)).values())
    theirs = by_pycocotools(coco_mini / "instances.json", results, task)
    assert len(ours) == len(METRICS) == 12
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert 0.05 < ours[0] < 0.95  # neither nothing nor everything was found


def two_squares(folder: Path) -> Path:
    """Two images, one category, one box of 50 x 50 in each: both medium (32² to 96² pixels)."""
    file = folder / "truth.json"
    file.write_text(json.dumps({
        "info": {}, "categories": [{"id": 7, "name": "square"}],
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "iscrowd": 0, "bbox": [10, 10, 50, 50], "area": 2500,
             "segmentation": [[10, 10, 60, 10, 60, 60, 10, 60]]}
            for i in (1, 2)
        ],
    }))  # fmt: skip
    return file


def test_numbers_by_hand(tmp_path: Path) -> None:
    truth = two_squares(tmp_path)

    def box(image: int, x: float, score: float) -> dict[str, Any]:
        return {"image_id": image, "category_id": 7, "bbox": [x, 10, 50, 50], "score": score}

    def stats(results: list[dict[str, Any]]) -> dict[str, float]:
        return named_stats(coco_evaluation(truth, results, "bbox"))

    both = stats([box(1, 10, 0.9), box(2, 10, 0.8)])
    assert both["AP"] == both["AP75"] == both["APm"] == both["AR1"] == 1
    assert both["APs"] == both["APl"] == -1  # no object of that size
    # One of two found: precision 1 up to recall 0.5, that is at 51 of the 101 recall levels.
    half = stats([box(1, 10, 0.9)])
    assert half["AP"] == pytest.approx(51 / 101) and half["AR100"] == pytest.approx(0.5)
    # Shifted by 10 of 50 px: IoU = 40/60 = 0.67, a hit at 0.50, 0.55, 0.60, 0.65, not at the other six.
    shifted = stats([box(1, 20, 0.9), box(2, 20, 0.8)])
    assert shifted["AP50"] == 1 and shifted["AP75"] == 0 and shifted["AP"] == pytest.approx(0.4)
    # No detection at all is AP 0, not an error.
    assert stats([])["AP"] == 0


def test_categories_have_their_own_precision(tmp_path: Path) -> None:
    file = two_squares(tmp_path)
    truth = json.loads(file.read_text())
    truth["categories"].append({"id": 9, "name": "other"})
    truth["categories"].append({"id": 11, "name": "absent"})
    truth["annotations"][1]["category_id"] = 9
    file.write_text(json.dumps(truth))
    found = [{"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "score": 0.9}]  # one of the two
    aps = category_precisions(coco_evaluation(file, found, "bbox"))
    np.testing.assert_equal(aps, [1, 0, np.nan])


def test_keypoints_equal_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    people, found = [], []
    for number in range(1, 21):
        points = np.c_[rng.uniform(20, 80, (17, 2)), np.full(17, 2)]
        people.append({
            "id": number, "image_id": 1 + number % 2, "category_id": 1, "iscrowd": 0, "area": 3600,
            "bbox": [20, 20, 60, 60], "num_keypoints": 17, "keypoints": points.ravel().tolist(),
        })  # fmt: skip
        points[:, :2] += rng.normal(0, 4, (17, 2))
        found.append({"image_id": 1 + number % 2, "category_id": 1, "score": round(float(rng.random()), 2),
                      "keypoints": points.ravel().tolist()})  # fmt: skip
    file = tmp_path / "people.json"
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2)]
    file.write_text(json.dumps({
        "info": {}, "images": images, "annotations": people, "categories": [{"id": 1, "name": "person"}],
    }))  # fmt: skip
    ours = list(named_stats(coco_evaluation(file, found, "keypoints")).values())
    theirs = by_pycocotools(file, found, "keypoints")
    assert len(ours) == len(KEYPOINT_METRICS) == len(theirs) == 10
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert 0.05 < ours[0] < 0.95


def test_lvis_runs_with_todays_numpy(tmp_path: Path) -> None:
    """A found object, and one of another category that is missed: AP 100 and 0, together 50."""
    pytest.importorskip("lvis")
    box = {"bbox": [10, 10, 40, 40], "area": 1600, "segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]]}
    image = {"id": 1, "height": 64, "width": 64, "neg_category_ids": [], "not_exhaustive_category_ids": [],
             "coco_url": "http://images.cocodataset.org/val2017/000000000001.jpg"}  # fmt: skip
    content = {
        "images": [image], "categories": [{"id": c, "name": str(c), "frequency": "f"} for c in (1, 2)],
        "annotations": [{"id": c, "image_id": 1, "category_id": c, **box} for c in (1, 2)],
    }  # fmt: skip
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    register_lvis_instances("lvis_tiny", get_lvis_instances_meta("lvis_v1"), str(tmp_path / "lvis.json"), ".")
    evaluator = LvisAP("lvis_tiny", tasks=("bbox",), distributed=False, output_dir=str(tmp_path))
    evaluator.reset()
    found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[10.0, 10, 50, 50]])),
                      scores=torch.tensor([0.9]), pred_classes=torch.tensor([0]))  # fmt: skip
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    outcome = evaluator.evaluate()
    assert outcome is not None and outcome["bbox"]["AP"] == pytest.approx(50)
    assert outcome["bbox"].keys() == {"AP", "AP50", "AP75", "APm", "APf"}  # all of medium size and frequent
    assert "float" not in vars(np)


def test_cityscapes_runs_with_todays_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cars one is found, whole: a precision of 1 up to a recall of 1 / 2. Nothing is left here."""
    pytest.importorskip("cityscapesscripts")
    pytest.importorskip("pyquaternion")
    monkeypatch.chdir(tmp_path)
    instances = np.zeros((64, 128), np.uint16)
    instances[5:30, 5:60], instances[35:60, 60:120] = 26001, 26002  # a car is 26
    (tmp_path / "gt" / "a").mkdir(parents=True)
    Image.fromarray(instances).save(tmp_path / "gt" / "a" / "a_000000_000000_gtFine_instanceIds.png")
    MetadataCatalog.get("cityscapes_tiny").set(thing_classes=["person", "car"], gt_dir=str(tmp_path / "gt"))
    evaluator = CityscapesAP("cityscapes_tiny")
    evaluator.reset()
    found = Instances((64, 128), pred_masks=torch.from_numpy(instances == 26001)[None],
                      scores=torch.tensor([0.9]), pred_classes=torch.tensor([1]))  # fmt: skip
    evaluator.process([{"file_name": "a_000000_000000_leftImg8bit.png"}], [{"instances": found}])
    outcome = evaluator.evaluate()
    assert outcome is not None and outcome["segm"]["AP50"] == pytest.approx(50, abs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["gt"] and "in1d" not in vars(np)
