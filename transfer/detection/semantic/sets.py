"""Data sets with a label mask for every image, by detectron2's names and the user's own.

VOC 2012 and ADE20K are looked for under DETECTRON2_DATASETS when they are read, Cityscapes by detectron2.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.utils.colormap import colormap

from pretrain.common.errors import UserError
from transfer.detection.semantic.label_files import check_masks, sizes_of

KINDS = ("sem_seg", "cityscapes_sem_seg")
"""detectron2's evaluator_type of such sets."""
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
IGNORED = 255  # the border of VOC's objects, what ADE20K and Cityscapes leave unlabelled

Records = list[dict[str, Any]]


def register(definitions: Sequence[str], *, option: str = "--sem-seg") -> None:
    """Register each NAME=IMAGES:MASKS, two folders of files with the same names, given by `option`."""
    _paired.cache_clear()
    for definition in definitions:
        match = re.fullmatch(r"([^=]+)=(.+):(.+)", definition)
        if match is None:
            raise UserError(f"{option} {definition}: wanted NAME=IMAGES:MASKS, two folders")
        name, images, masks = match.groups()
        for folder, what in ((images, "images"), (masks, "masks")):
            if not Path(folder).is_dir():
                raise UserError(f"{option} {name}: {folder}: no such folder of {what}")
        _add(name, functools.partial(_from_folders, images, masks))


def _add(name: str, load: Callable[[], Records], **known: Any) -> None:
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="sem_seg", **known)


def _from_folders(images: str, masks: str) -> Records:
    """The images and masks of two folders, whatever lies in folders below them."""
    found, labels = _by_name(images, IMAGES), _by_name(masks, (".png",))
    if not found or not labels:
        folder, what = (masks, "masks (*.png)") if found else (images, "images")
        raise UserError(f"{folder} holds no {what}")
    for here, there, what in ((found, labels, f"mask in {masks}"), (labels, found, f"image in {images}")):
        alone = [here[name] for name in here if name not in there]
        if alone:
            raise UserError(f"{alone[0]} has no {what} of the same name, as {len(alone)} of {len(here)}")
    if both := set(map(os.path.realpath, found.values())) & set(map(os.path.realpath, labels.values())):
        raise UserError(f"{min(both)} would be image and mask: give two folders, IMAGES:MASKS")
    return [dict(r) for r in _paired(tuple(found.values()), tuple(labels[name] for name in found))]


def _by_name(folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    """The files of a folder by their names without suffix. Raises UserError for two of one name."""
    found: dict[str, str] = {}
    for file in sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in suffixes):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(
                f"{found[name]} and {file} have one name: which is meant? Images and masks belong in folders "
                "of their own, one file of each name"
            )
        found[name] = str(file)
    return found


@functools.cache
def _paired(images: tuple[str, ...], masks: tuple[str, ...]) -> Records:
    """Records of images and their masks, in the mask's size: an image of another is refused by it."""
    return [
        {"file_name": image, "sem_seg_file_name": mask, "width": width, "height": height}
        for image, mask, (width, height) in zip(images, masks, sizes_of(masks))
    ]


def _root() -> Path:
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def _voc(split: str) -> Records:
    """VOC2012/: the split's list with SegmentationClass, or `aug`: what SBD labels beside train and val.

    Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011: 9118 images more than VOC's 1464.
    """
    folder = _root() / "VOC2012"
    lists = {s: folder / "ImageSets" / "Segmentation" / f"{s}.txt" for s in ("train", "val")}
    masks = folder / ("SegmentationClassAug" if split == "aug" else "SegmentationClass")
    for path in (*lists.values(), masks, folder / "JPEGImages"):
        if not path.exists():
            how = (
                "; it holds SBD's labels as grey PNGs, which mmsegmentation's "
                "tools/dataset_converters/voc_aug.py writes" if path.name == "SegmentationClassAug"
                else "; set DETECTRON2_DATASETS to the folder that holds VOC2012/"
            )  # fmt: skip
            raise UserError(f"{path} is missing{how}")
    listed = {s: path.read_text().split() for s, path in lists.items()}
    if split == "aug":
        known = {name for names in listed.values() for name in names}
        names = sorted(f.stem for f in masks.glob("*.png") if f.stem not in known)
    else:
        names = listed[split]
    gone = [name for name in names if not (masks / f"{name}.png").is_file()]
    if gone:
        raise UserError(f"{masks / gone[0]}.png is missing, as {len(gone)} masks of {len(names)}")
    images = tuple(str(folder / "JPEGImages" / f"{name}.jpg") for name in names)
    records = _paired(images, tuple(str(masks / f"{name}.png") for name in names)) if names else []
    return [dict(r) for r in records]


def _ade20k(split: str) -> Records:
    folder = _root() / "ADEChallengeData2016"
    masks = folder / "annotations_detectron2" / split
    if not masks.is_dir():
        raise UserError(
            f"{masks} is missing; set DETECTRON2_DATASETS to the folder that holds ADEChallengeData2016/, "
            "and write these masks by detectron2's datasets/prepare_ade20k_sem_seg.py"
        )
    return _from_folders(str(folder / "images" / split), str(masks))


def _register_public() -> None:
    classes = ["background", *CLASS_NAMES]
    for split in ("train", "val", "aug"):
        name = f"voc_2012_sem_seg_{split}"
        _add(name, functools.partial(_voc, split), stuff_classes=classes, ignore_label=IGNORED)
    for split, folder in (("train", "training"), ("val", "validation")):
        name = f"ade20k_sem_seg_{split}"
        classes = list(MetadataCatalog.get(name).stuff_classes)
        _add(name, functools.partial(_ade20k, folder), stuff_classes=classes, ignore_label=IGNORED)


_register_public()


def name_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Tell detectron2 the classes of sets without names for them, their colours and the ignored label."""
    palette = colormap(rgb=True, maximum=255).astype(int).tolist()
    for metadata in map(MetadataCatalog.get, names):
        if metadata.get("stuff_classes") is None:
            count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            metadata.set(stuff_classes=[f"class {i}" for i in range(count)])
        if metadata.get("ignore_label") is None:
            metadata.set(ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
        if metadata.get("stuff_colors") is None:
            count = len(metadata.stuff_classes)
            metadata.set(stuff_colors=[palette[i % len(palette)] for i in range(count)])


def check(name: str, cfg: CfgNode, records: Sequence[Mapping[str, Any]]) -> str:
    """A line of counts. Raises UserError for a set that does not suit the config's network."""
    metadata, head = MetadataCatalog.get(name), cfg.MODEL.SEM_SEG_HEAD
    classes = len(metadata.stuff_classes)
    for has, wanted, key, what in (
        (classes, head.NUM_CLASSES, "NUM_CLASSES", "classes"),
        (metadata.ignore_label, head.IGNORE_VALUE, "IGNORE_VALUE", "as the label to ignore"),
    ):
        if has != wanted:
            raise UserError(
                f"data set {name!r} has {has} {what}, the config {wanted}: add MODEL.SEM_SEG_HEAD.{key} {has}"
            )
    pixels_K = check_masks(name, records, classes=classes, ignored=head.IGNORE_VALUE)
    return f"{name}: {len(records)} images, {(pixels_K > 0).sum()} of {classes} classes in their masks"
