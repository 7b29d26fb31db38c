"""COCO and VOC average precision of a detector, the mean IoU of a labelling of every pixel, in percent.

COCO's numbers come from faster-coco-eval, a C++ implementation equal to pycocotools (tests compare all 24);
VOC's from detectron2's own evaluator.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    pascal_voc_evaluation,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from pretrain.common.progress import Progress
from transfer.detection.semantic.keys import is_semantic
from transfer.detection.semantic.mapper import mapper_of
from transfer.detection.semantic.scores import MeanIoU

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
CATEGORY = re.compile(r"(AP|IoU|ACC)-(.*)")
"""detectron2's names of a single category's numbers: AP of objects, IoU and accuracy of pixels."""

Task = Literal["bbox", "segm", "keypoints"]
Outcome = dict[str, dict[str, float]]
"""By task: numbers in percent, those of single categories as "AP-NAME"."""


def coco_evaluation(
    annotations: str | Path, results: Sequence[dict[str, Any]], task: Task, sigmas: Sequence[float] = ()
) -> Any:
    """The finished evaluation of COCO result entries, for `named_stats` and `category_precisions`.

    `results`: image_id, category_id, score, and bbox, segmentation (RLE) or keypoints. `sigmas`: one a
    keypoint; none: those of COCO's persons.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: object) -> None:
        pass

    truth = COCO(str(annotations), print_function=silent)
    # With a box in it, a mask's area, and so its size class, would be taken from the box.
    keep = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[task]
    found = truth.loadRes([{k: r[k] for k in ("image_id", "category_id", "score", keep)} for r in results])
    evaluation = COCOeval_faster(
        truth, found, iouType=task, print_function=silent, kpt_oks_sigmas=list(sigmas) or None
    )
    evaluation.run()
    return evaluation


def named_stats(evaluation: Any) -> dict[str, float]:
    """COCO's twelve numbers (`METRICS`), of keypoints its ten (`KEYPOINT_METRICS`), by name, as fractions; -1
    where no object is of that size."""
    names = KEYPOINT_METRICS if evaluation.params.iouType == "keypoints" else METRICS
    return dict(zip(names, map(float, evaluation.all_stats)))


def category_precisions(evaluation: Any) -> np.ndarray:
    """AP of each category of `params.catIds`, as a fraction; nan for one without objects."""
    precision_TRKAM = evaluation.eval["precision"]  # IoU, recall, category, area, detections an image
    values = [p[p > -1] for p in np.moveaxis(precision_TRKAM[:, :, :, 0, -1], 2, 0)]
    return np.array([v.mean() if v.size else np.nan for v in values])


class CocoAP(COCOEvaluator):
    """detectron2's evaluator, the numbers by `coco_evaluation`: {"bbox": {"AP": ..., ...}, "segm": {...}}."""

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        to_dataset_id = {v: k for k, v in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        for result in results:
            result["category_id"] = to_dataset_id[result["category_id"]]
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            path.write_text(json.dumps(results))
        for task in self._tasks:
            sigmas = self._kpt_oks_sigmas or ()
            evaluation = coco_evaluation(self._metadata.json_file, results, task, sigmas)
            numbers = {name: v for name, v in named_stats(evaluation).items() if v >= 0}
            if len(self._metadata.thing_classes) > 1:
                names_by_id = {i: self._metadata.thing_classes[n] for n, i in to_dataset_id.items()}
                aps = zip(evaluation.params.catIds, category_precisions(evaluation).tolist())
                numbers |= {f"AP-{names_by_id[i]}": ap for i, ap in aps}
            self._results[task] = {name: 100 * v for name, v in numbers.items()}


class VocAP(PascalVOCDetectionEvaluator):
    """detectron2's evaluator of PASCAL VOC, which also gives each category's AP and reads annotations without
    pose, truncated or difficult (none of them difficult, as in VOC's development kit)."""

    def evaluate(self) -> Outcome | None:
        """{"bbox": {"AP", "AP50", "AP75", "AP-aeroplane" ...}}, on the main rank. All ranks must call."""
        aps: dict[str, list[float]] = {name: [] for name in self._class_names}
        by_file, judge = functools.cache(_voc_objects), pascal_voc_evaluation.voc_eval

        def noted(predictions: str, annotations: str, listing: str, name: str, **options: Any) -> Any:
            outcome = judge(predictions, annotations, listing, name, **options)
            aps[name].append(100 * float(outcome[2]))
            return outcome

        with _replaced(pascal_voc_evaluation, parse_rec=by_file, voc_eval=noted):
            outcome = super().evaluate()
        if outcome:
            outcome["bbox"] |= {f"AP-{name}": float(np.mean(values)) for name, values in aps.items()}
        return outcome


@contextlib.contextmanager
def _older_numpy() -> Iterator[None]:
    """Names that numpy has no more, for a while: evaluators of other packages still take them.

    np.float until 1.24 (https://github.com/lvis-dataset/lvis-api/blob/master/lvis/eval.py), np.in1d until 2.4
    (https://github.com/mcordts/cityscapesScripts/blob/master/cityscapesscripts/evaluation/evalInstanceLevelSemanticLabeling.py).
    """
    names = {"float": float, "in1d": lambda values, wanted: np.isin(np.ravel(values), wanted)}
    lacking = {name: value for name, value in names.items() if name not in vars(np)}
    vars(np).update(lacking)
    try:
        yield
    finally:
        for name in lacking:
            del vars(np)[name]


class LvisAP(LVISEvaluator):
    """detectron2's evaluator of LVIS, with any numpy."""

    def evaluate(self) -> Outcome | None:
        """{"bbox": {"AP", "AP50", ... "APr", "APc", "APf"}}, "segm" too, those without objects left out. All
        ranks must call."""
        with _older_numpy():
            outcome: Outcome | None = super().evaluate()
        return outcome and {
            task: {k: v for k, v in numbers.items() if v >= 0} for task, numbers in outcome.items()
        }


class CityscapesAP(CityscapesInstanceEvaluator):
    """detectron2's evaluator of Cityscapes' instances, with any numpy, and without a matches.json in the
    current folder."""

    def evaluate(self) -> Outcome | None:
        """{"segm": {"AP", "AP50"}}. All ranks must call."""
        judge = import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")

        def write(values: Any, file: str) -> None:
            if Path(file).is_absolute():
                Path(file).write_text(json.dumps(values, default=int))

        with _older_numpy(), _replaced(judge, writeDict2JSON=write):
            outcome: Outcome | None = super().evaluate()
        return outcome


def _voc_objects(file: str) -> list[dict[str, Any]]:
    """The objects of a VOC annotation file as detectron2's evaluator wants them."""
    objects = []
    for thing in ElementTree.parse(file).findall("object"):
        box = [
            int(float(thing.findtext(f"bndbox/{side}", "nan"))) for side in ("xmin", "ymin", "xmax", "ymax")
        ]
        objects.append({
            "name": thing.findtext("name"), "pose": thing.findtext("pose", "Unspecified"), "bbox": box,
            "truncated": int(thing.findtext("truncated", "0")),
            "difficult": int(thing.findtext("difficult", "0")),
        })  # fmt: skip
    return objects


@contextlib.contextmanager
def _replaced(module: Any, **functions: Any) -> Iterator[None]:
    """Other functions in a module for a while: detectron2's evaluator calls them by their names there."""
    earlier = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(earlier)


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


def evaluate(cfg: CfgNode, model: nn.Module, name: str, *, augmented: bool = False) -> Outcome:
    """Average precision on the data set `name`: {"bbox": {...}}, and "segm" and "keypoints" where trained;
    {"sem_seg": {"mIoU": ...}} of semantic segmentation.

    `augmented`: with detectron2's test-time augmentation as TEST.AUG has it. A number that the set has no
    objects for is left out. All ranks must call; the main one gets the numbers.
    """
    if augmented:
        model = GeneralizedRCNNWithTTA(cfg, model.module if hasattr(model, "module") else model)
    loader = build_detection_test_loader(cfg, name, mapper=mapper_of(cfg, train=False))
    with Progress(
        len(loader), label=f"evaluating on {name}{' (augmented)' if augmented else ''}", unit="image",
        file=Path(cfg.OUTPUT_DIR) / "progress.json",
    ) as progress:  # fmt: skip
        folder = str(Path(cfg.OUTPUT_DIR) / ("inference_augmented" if augmented else "inference"))
        outcome = inference_on_dataset(model, _Counted(loader, progress), _evaluator(cfg, name, folder)) or {}
    return {
        task: {k: float(v) for k, v in values.items() if math.isfinite(v)} for task, values in outcome.items()
    }


def _evaluator(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    """detectron2's evaluator for the kind of data set that `name` is."""
    kind = MetadataCatalog.get(name).evaluator_type
    if is_semantic(cfg):
        return MeanIoU(name)
    switches: tuple[tuple[Task, bool], ...] = (
        ("bbox", True), ("segm", cfg.MODEL.MASK_ON), ("keypoints", cfg.MODEL.KEYPOINT_ON)
    )  # fmt: skip
    tasks = tuple(task for task, on in switches if on)
    if kind == "pascal_voc":
        return VocAP(name)
    if kind == "lvis":
        return LvisAP(name, tasks=tasks, output_dir=folder)
    if kind == "cityscapes_instance":
        return CityscapesAP(name)
    return CocoAP(
        name, tasks=tasks, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        allow_cached_coco=False,
    )  # fmt: skip
