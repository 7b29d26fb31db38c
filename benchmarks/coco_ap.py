"""COCO AP on synthetic predictions: this project beside pycocotools, equal numbers, less time."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycocotools.mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.harness import Comparison, Step, interleave
from transfer.detection.evaluation import coco_evaluation

TITLE = "COCO average precision: pycocotools (reference) beside faster-coco-eval as this project calls it"
Task = Literal["bbox", "segm"]
TARGETS: dict[Task, float] = {"bbox": 3.0, "segm": 2.0}
SIDE, CATEGORIES, OBJECTS = 320, 80, 7  # as many objects an image as COCO has


def ellipse(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Centre and half axes, pixels; sizes spread as COCO's, from small to large."""
    a, b = np.exp(rng.uniform(np.log(6), np.log(90), 2))
    return float(rng.uniform(0, SIDE)), float(rng.uniform(0, SIDE)), float(a), float(b)


def encode(shape: tuple[float, float, float, float]) -> dict[str, Any]:
    """The ellipse as COCO's run lengths."""
    x, y, a, b = shape
    ys, xs = np.ogrid[0:SIDE, 0:SIDE]
    mask = ((xs - x) / a) ** 2 + ((ys - y) / b) ** 2 <= 1
    rle = mask_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def synthesise(images: int, detections: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO annotation file and predictions: most are objects moved a little, the rest elsewhere."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        objects = []
        for _ in range(rng.poisson(OBJECTS)):
            shape, category = ellipse(rng), int(rng.integers(1, CATEGORIES + 1))
            rle = encode(shape)
            if mask_codec.area(rle) < 4:
                continue
            objects.append((shape, category))
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": category, "segmentation": rle,
                "iscrowd": 0, "area": float(mask_codec.area(rle)), "bbox": mask_codec.toBbox(rle).tolist(),
            })  # fmt: skip
        for _ in range(detections):
            shape, category = ellipse(rng), int(rng.integers(1, CATEGORIES + 1))
            if objects and rng.random() < 0.7:
                (x, y, a, b), category = objects[rng.integers(len(objects))]
                x, y = rng.normal((x, y), (0.15 * a, 0.15 * b)).tolist()
                shape = (x, y, a * rng.uniform(0.8, 1.2), b * rng.uniform(0.8, 1.2))
            rle = encode(shape)
            if mask_codec.area(rle) > 0:
                results.append({
                    "image_id": image, "category_id": category, "score": float(rng.random()),
                    "segmentation": rle, "bbox": mask_codec.toBbox(rle).tolist(),
                })  # fmt: skip
    truth = {
        "info": {},
        "annotations": annotations,
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, CATEGORIES + 1)],
    }
    return truth, results


def by_pycocotools(annotations: Path, results: list[dict[str, Any]], task: Task) -> np.ndarray:
    """The plain reference."""
    drop = "bbox" if task == "segm" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(
            truth, truth.loadRes([{k: v for k, v in r.items() if k != drop} for r in results]), task
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def measure(quick: bool) -> list[Comparison]:
    """Each from files to the twelve numbers, which must be equal to 1e-6."""
    truth, results = synthesise(200 if quick else 5000, detections=20)
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(truth))
        for task, target in TARGETS.items():
            ours = np.array(coco_evaluation(file, results, task).all_stats[:12])
            difference = float(np.abs(ours - by_pycocotools(file, results, task)).max())
            assert difference <= 1e-6, f"{task}: a number differs by {difference}"
            steps: dict[str, Step] = {
                "reference": partial(by_pycocotools, file, results, task),
                "ours": partial(coco_evaluation, file, results, task),
            }
            times = interleave(steps, repeats=3 if quick else 2, warm_up=0)
            comparisons.append(
                Comparison(
                    case=f"{task}, {len(truth['images'])} images, {len(results)} predictions",
                    reference=times["reference"],
                    ours=times["ours"],
                    target_speedup=target,
                    note=f"AP {100 * ours[0]:.2f}, the twelve numbers differ by at most {difference:.0e}",
                )
            )
    return comparisons
