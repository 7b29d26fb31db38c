"""Intersection over union, counted at the masks' own resolution."""

from __future__ import annotations

from typing import Any

from detectron2.evaluation import SemSegEvaluator

from transfer.detection.semantic.label_files import read_labels


class MeanIoU(SemSegEvaluator):
    """detectron2's evaluator: mIoU, mean accuracy mACC, pixel accuracy pACC, fwIoU, and IoU and accuracy of
    each class, in percent over all images together.

    Masks are read by their class numbers; boundaries are not evaluated, predictions not written.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, sem_seg_loading_fn=read_labels)
        self._compute_boundary_iou = False

    def encode_json_sem_seg(self, sem_seg: Any, input_file_name: str) -> list[dict[str, Any]]:
        """No run-length codes: they cost more than the network, and nothing reads them."""
        return []
