"""PASCAL VOC 2007 for classification: images, and which of the twenty classes each one shows.

Targets are N x 20: 1 present, 0 absent, -1 present but difficult, as VISSL maps the files' 1, -1 and 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.common.errors import UserError
from pretrain.data.datasets import ImageDataset

NAME = "voc07"
SETS = {"train": "trainval", "test": "test"}
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
MEANING = {"1": 1, "-1": 0, "0": -1}


def refuse_voc07(dataset: str) -> None:
    """Raises UserError for voc07, whose images show several classes each: most evaluators want one."""
    if dataset == NAME:
        raise UserError(
            f"--dataset {NAME}: its images show several classes each, which only `python -m transfer linear` "
            "with --protocol voc07_svm@2 or voc07_svm_low_shot@2 can evaluate"
        )


def open_voc07(data_dir: str | Path, split: str) -> tuple[ImageDataset, np.ndarray]:
    """Images of trainval ("train") or test, and their targets. `labels_N` holds the first class present.

    `data_dir` is VOC2007 or a folder above it. Raises UserError for what is missing.
    """
    root = Path(data_dir)
    found = [
        p for p in (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007") if (p / "ImageSets").is_dir()
    ]
    if not found:
        raise UserError(
            f"{root}: holds no VOC2007 with ImageSets/Main and JPEGImages, as VOCdevkit unpacks it"
        )
    folder = found[0]
    ids: list[str] = []
    columns = []
    for name in CLASSES:
        file = folder / "ImageSets" / "Main" / f"{name}_{SETS[split]}.txt"
        if not file.is_file():
            raise UserError(f"{file}: missing; VOC 2007's trainval and test archives both have such files")
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
        if any(len(words) != 2 or words[1] not in MEANING for words in lines):
            raise UserError(f"{file}: wanted lines of an image's name and 1, 0 or -1")
        if ids and ids != [words[0] for words in lines]:
            raise UserError(f"{file}: lists other images than {CLASSES[0]}_{SETS[split]}.txt")
        ids = [words[0] for words in lines]
        columns.append([MEANING[words[1]] for words in lines])
    images = folder / "JPEGImages"
    gone = [i for i in ids if not (images / f"{i}.jpg").is_file()]
    if gone or not ids:
        raise UserError(
            f"{images}: {len(gone)} of {len(ids)} images of {SETS[split]} are missing ({gone[:3]})"
        )
    targets_NC = np.array(columns, np.int64).T
    data = ImageDataset(
        name=NAME, split=split, classes=list(CLASSES), labels_N=(targets_NC == 1).argmax(1), native_size=None,
        root=images, files=[f"{i}.jpg" for i in ids],
    )  # fmt: skip
    return data, targets_NC
