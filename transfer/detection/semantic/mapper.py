"""From a record of a data set to what the network takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform

from transfer.detection.semantic.keys import is_semantic
from transfer.detection.semantic.label_files import read_labels

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


def mapper_of(cfg: CfgNode, *, train: bool) -> Mapper:
    """detectron2's mapper, or that of semantic segmentation, whose masks detectron2 reads by colour."""
    return SemanticMapper(cfg, train=train) if is_semantic(cfg) else DatasetMapper(cfg, is_train=train)


class OpenCVResize(T.ResizeTransform):
    """Resized by OpenCV, bilinearly without antialiasing and labels to the nearest, as mmsegmentation does:
    detectron2 resizes by Pillow (https://github.com/open-mmlab/mmcv/blob/v1.7.1/mmcv/image/geometric.py)."""

    def apply_image(self, img: np.ndarray, interp: Any = None) -> np.ndarray:
        """H x W x C of another size."""
        return cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """H x W of another size."""
        return cv2.resize(segmentation, (self.new_w, self.new_h), interpolation=cv2.INTER_NEAREST)


class ShortestEdge(T.ResizeShortestEdge):
    """detectron2's choice of a size, by OpenCV."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resizing of one image."""
        found = super().get_transform(image)
        if not isinstance(found, T.ResizeTransform):  # of a size of 0: the image stays as it is
            return found
        return OpenCVResize(found.h, found.w, found.new_h, found.new_w)


class SemanticMapper:
    """Image and labels resized, in training also cropped, mirrored and of changed colours."""

    def __init__(self, cfg: CfgNode, *, train: bool) -> None:
        resize, *augmentations = detection_utils.build_augmentation(cfg, train)
        shortest = resize.short_edge_length
        augmentations = [
            ShortestEdge(shortest, resize.max_size, "range" if resize.is_range else "choice"),
            *augmentations,
        ]
        if train and cfg.INPUT.CROP.ENABLED:
            crop = cfg.INPUT.CROP
            augmentations.insert(1, T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE, [int(side) for side in crop.SIZE], crop.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            ))  # fmt: skip
        if train and cfg.INPUT.COLOR_AUG_SSD:
            augmentations.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
        self.augmentations = T.AugmentationList(augmentations)
        self.train, self.format = train, cfg.INPUT.FORMAT

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """`record` with "image", C x H x W uint8, and in training "sem_seg", H x W int64."""
        pixels = detection_utils.read_image(record["file_name"], self.format)
        detection_utils.check_image_size(record, pixels)
        labels = read_labels(record["sem_seg_file_name"]) if self.train else None
        given = T.AugInput(pixels, sem_seg=labels)
        self.augmentations(given)
        found = {key: record[key] for key in ("file_name", "height", "width")}
        found["image"] = torch.from_numpy(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        if given.sem_seg is not None:
            found["sem_seg"] = torch.from_numpy(given.sem_seg.astype(np.int64))
        return found
