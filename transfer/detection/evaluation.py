"""COCO and VOC average precision of a detector, in percent.

COCO's numbers come from faster-coco-eval, a C++ implementation equal to pycocotools (tests compare all 24);
VOC's from detectron2's own evaluator.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, inference_on_dataset
from torch import nn

from pretrain.common.progress import Progress

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
REPORTED = METRICS[:6]


def coco_stats(
    annotations: str | Path, results: Sequence[dict[str, Any]], iou_type: Literal["bbox", "segm"]
) -> np.ndarray:
    """COCO's twelve numbers (`METRICS`, as fractions; -1 where no object is of that size).

    `results` are COCO result entries (image_id, category_id, bbox, score, segmentation as RLE).
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: object) -> None:
        pass

    truth = COCO(str(annotations), print_function=silent)
    # With a box in it, a mask's area, and so its size class, would be taken from the box.
    keep = ("image_id", "category_id", "score", "bbox" if iou_type == "bbox" else "segmentation")
    found = truth.loadRes([{k: r[k] for k in keep} for r in results])
    evaluation = COCOeval_faster(truth, found, iouType=iou_type, print_function=silent)
    evaluation.run()
    return np.asarray(evaluation.all_stats[:12], dtype=np.float64)


class CocoAP(COCOEvaluator):
    """detectron2's evaluator, the numbers by `coco_stats`: {"bbox": {"AP": ..., ...}, "segm": {...}}."""

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        to_dataset_id = {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        for result in results:
            result["category_id"] = to_dataset_id[result["category_id"]]
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            path.write_text(json.dumps(results))
        for task in self._tasks:
            stats = coco_stats(self._metadata.json_file, results, task)
            self._results[task] = {name: 100 * float(v) for name, v in zip(METRICS, stats) if v >= 0}


class _Counted:
    """A data loader whose batches are counted on a progress bar."""

    def __init__(self, loader: Any, progress: Progress) -> None:
        self.loader, self.progress = loader, progress

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch
            self.progress.update(1)


def evaluate(cfg: CfgNode, model: nn.Module, name: str) -> dict[str, dict[str, float]]:
    """Average precision on the data set `name`: {"bbox": {...}} and, with masks on, {"segm": {...}}.

    A size of which there is no object is left out. All ranks must call; the main one gets the numbers.
    """
    if MetadataCatalog.get(name).evaluator_type == "pascal_voc":
        evaluator: Any = PascalVOCDetectionEvaluator(name)
    else:
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        evaluator = CocoAP(name, tasks=tasks, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))
    loader = build_detection_test_loader(cfg, name)
    with Progress(
        len(loader), label=f"evaluating on {name}", unit="image", file=Path(cfg.OUTPUT_DIR) / "progress.json"
    ) as progress:
        outcome = inference_on_dataset(model, _Counted(loader, progress), evaluator) or {}
    return {
        task: {k: float(v) for k, v in values.items() if k in REPORTED and math.isfinite(v)}
        for task, values in outcome.items()
    }
