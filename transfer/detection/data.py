"""Detection data sets, checked before anything runs."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of, write_json
from transfer.detection.annotations import coco_file
from transfer.detection.annotations.label_shares import share_of
from transfer.detection.semantic import sets
from transfer.detection.semantic.image_files import check_images
from transfer.detection.semantic.keys import is_semantic

NEEDS_PACKAGE = {"lvis": "lvis", "cityscapes_instance": "cityscapesscripts"}
"""What detectron2's evaluator of a kind of data set cannot do without."""
JUDGED = ("coco", "pascal_voc", *NEEDS_PACKAGE)
OF_MASKS = {"--dataset": "--sem-seg", "--detection-data": "--sem-seg-data"}
"""The option that gives sets of label masks, beside each that gives sets in COCO's format."""


def register(definitions: Sequence[str], sem_seg: Sequence[str] = (), *, option: str = "--dataset") -> None:
    """Register each NAME=ANNOTATIONS.json:IMAGES, given by `option`, as a COCO-format data set, and each
    NAME=IMAGES:MASKS of `sem_seg` as one of label masks."""
    sets.register(sem_seg, option=OF_MASKS[option])
    for definition in definitions:
        match = re.fullmatch(r"([^=]+)=(.+\.json):(.+)", definition)
        if match is None:
            raise UserError(f"{option} {definition}: wanted NAME=ANNOTATIONS.json:IMAGES")
        name, annotations, images = match.groups()
        if not Path(annotations).is_file():
            raise UserError(f"{option} {name}: {annotations}: no such file")
        if not Path(images).is_dir():
            raise UserError(f"{option} {name}: {images}: no such folder of images")
        _forget(name)
        register_coco_instances(name, {}, annotations, images)


def _forget(name: str) -> None:
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _register_shares(names: Sequence[str]) -> None:
    """Make shares of the labels of known sets known too; they are read from the copy that `check` writes."""
    for name in names:
        share = share_of(name)
        if share is None or share.base not in DatasetCatalog.list():
            continue
        base = MetadataCatalog.get(share.base)
        if base.get("evaluator_type") != "coco" or not base.get("json_file"):
            raise UserError(
                f"data set {name!r}: {share.base} has no annotation file in COCO's format to take a share of"
            )
        _forget(name)
        register_coco_instances(name, {}, base.get("original_json_file", base.json_file), base.image_root)
        DatasetCatalog.remove(name)  # until it is drawn
        DatasetCatalog.register(name, list)


def check(
    cfg: CfgNode, *, train: bool = True, option: str = "--dataset", mended: Path | None = None
) -> list[str]:
    """Check the config's data sets, given by `option`, before anything runs; one line of counts each.

    Annotation files that would be misread are read from a mended copy in the folder `mended` from now on
    (None: a dry run, nothing is kept). Raises UserError for a missing file, categories that differ between
    the sets or do not match NUM_CLASSES, ids that name nothing, objects without what the config asks for,
    images whose size is not that of the annotations or that detectron2 would read wrongly.
    """
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name at least one set to evaluate on")
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name at least one set to train on")
    names = list(dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]))
    _register_shares(names)
    with tempfile.TemporaryDirectory() as aside:
        lines = [_check_one(name, cfg, option, mended or Path(aside)) for name in names]
        for name in names[1:]:
            same_categories(names[0], categories(names[0]), name, categories(name))
        if mended is None:
            _read_originals(names)
    return lines


def digest_of(name: str) -> str:
    """SHA-256 of a set's annotation file as the user gave it, of a share's own; "" without such a file."""
    known = vars(MetadataCatalog.get(name))
    original = None if share_of(name) else known.get("original_json_file")
    file = original or known.get("json_file")
    return sha256_of(file) if file else ""


def also_trained_on(test: str, records: Sequence[Mapping[str, Any]], digests: Collection[str]) -> list[str]:
    """What is to be said where the set `test` has images of the training `records`, or is a file of
    `digests`."""
    share = 1.0 if digest_of(test) in digests else coco_file.share_seen(records, DatasetCatalog.get(test))
    return [f"{100 * share:.3g} % of the images of {test} are training images too"] if share else []


def categories(name: str) -> list[tuple[Any, str]]:
    """(id in the annotation file, name) of a checked set's categories, in the classifier's order."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") in sets.KINDS:
        return list(enumerate(metadata.stuff_classes))
    ids = {v: k for k, v in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    return [(ids.get(i, i + 1), str(label)) for i, label in enumerate(metadata.thing_classes)]


def same_categories(
    first: str, ours: Sequence[tuple[Any, str]], second: str, theirs: Sequence[tuple[Any, str]]
) -> None:
    """Raises UserError, naming the first difference, where a classifier's outputs mean other things."""
    for number, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
        if a is None or b is None or a[1] != b[1]:
            one, other = (f"{c[1]!r} (id {c[0]})" if c else "none" for c in (a, b))
            raise UserError(
                f"category {number + 1} is {one} in {first} and {other} in {second}: a detector trained on "
                "the one would be evaluated under wrong names on the other; give both the same categories, "
                "with ids in the same order"
            )


def use_mended(folder: Path, names: Sequence[str]) -> None:
    """Read the data sets from the copies that `check` left in `folder`, where it did."""
    _register_shares(names)
    for name in names:
        if (copy := _copy(folder, name)).is_file():
            _read_from(name, copy)


def _copy(folder: Path, name: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def _read_from(name: str, file: Path) -> None:
    """Let `name` have its annotations in `file`, a copy of the same categories."""
    metadata = MetadataCatalog.get(name)
    known = vars(metadata)  # set() takes no second value
    known.setdefault("original_json_file", metadata.json_file)
    known["json_file"] = str(file)
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: load_coco_json(str(file), metadata.image_root, name))


def _read_originals(names: Sequence[str]) -> None:
    _register_shares(names)
    for name in names:
        if original := MetadataCatalog.get(name).get("original_json_file"):
            _read_from(name, Path(original))


def _check_one(name: str, cfg: CfgNode, option: str, mended: Path) -> str:
    if name not in DatasetCatalog.list():
        share = share_of(name)
        how = f"{option} {share.base if share else name}=ANNOTATIONS.json:IMAGES"
        if is_semantic(cfg):
            how = f"{OF_MASKS[option]} {name}=IMAGES:MASKS"
        raise UserError(
            f"data set {name!r} is not known: give {how}, or put a standard set under the folder that "
            "DETECTRON2_DATASETS names"
        )
    metadata = MetadataCatalog.get(name)
    kind, keypoints = metadata.get("evaluator_type", "none"), cfg.MODEL.KEYPOINT_ON
    if is_semantic(cfg):
        return _check_masks(name, kind, cfg, OF_MASKS[option])
    if kind not in JUDGED:
        raise UserError(
            f"data set {name!r}: sets of kind {kind} are not evaluated here, only {', '.join(JUDGED)}"
        )
    package = NEEDS_PACKAGE.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"data set {name!r} needs the package {package}: pip install {package}")
    if kind == "pascal_voc" and (cfg.MODEL.MASK_ON or keypoints):
        raise UserError(f"data set {name!r} has boxes only: add MODEL.MASK_ON False MODEL.KEYPOINT_ON False")
    notes: list[str] = []
    if metadata.get("json_file") and kind == "coco":
        notes = _check_annotations(name, option, mended, masks=cfg.MODEL.MASK_ON, keypoints=keypoints)
    elif metadata.get("dirname"):
        _check_voc_folder(name, Path(metadata.dirname), metadata.split)
    records = _records(name)
    classes = len(MetadataCatalog.get(name).thing_classes)
    key = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    wanted = cfg.MODEL[key].NUM_CLASSES
    if classes != wanted:
        raise UserError(
            f"data set {name!r} has {classes} categories, the config's model {wanted}: add "
            f"MODEL.{key}.NUM_CLASSES {classes}"
        )
    check_images(name, records)
    objects = [a for r in records for a in r.get("annotations", ())]
    if not any(not a.get("iscrowd") for a in objects):
        raise UserError(f"data set {name!r} holds no object to train on or to evaluate with")
    if keypoints:
        _check_keypoints(name, cfg, objects)
    # crowds, COCO's only run-length masks, are left out of training
    run_length = any(isinstance(a.get("segmentation"), dict) and not a.get("iscrowd") for a in objects)
    if run_length and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        raise UserError(f"{name}: its masks are run-length encoded: add INPUT.MASK_FORMAT bitmask")
    return "; ".join([f"{name}: {len(records)} images, {len(objects)} objects, {classes} categories", *notes])


def _records(name: str) -> list[dict[str, Any]]:
    try:
        records = DatasetCatalog.get(name)
    except (OSError, KeyError, ValueError, AttributeError, AssertionError, SyntaxError) as error:
        raise UserError(f"data set {name!r} cannot be read: {error}") from error
    if not records:
        raise UserError(f"data set {name!r} holds no images")
    return records


def _check_masks(name: str, kind: str, cfg: CfgNode, option: str) -> str:
    """The images and label masks of a set for semantic segmentation."""
    if kind not in sets.KINDS:
        raise UserError(
            f"data set {name!r} has no label mask for every image: take one of detectron2's sem_seg sets, or "
            f"give {option} NAME=IMAGES:MASKS"
        )
    records = _records(name)
    sets.name_classes(cfg, [name])
    check_images(name, records)
    return sets.check(name, cfg, records)


def name_keypoints(name: str) -> None:
    """Tell detectron2 the keypoints that the annotation file names; a mirror swaps left and right."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("keypoint_names") or not metadata.get("json_file"):
        return
    categories = json.loads(Path(metadata.json_file).read_bytes().decode("utf-8-sig"))["categories"]
    names: list[str] = next((c["keypoints"] for c in categories if c.get("keypoints")), [])
    swaps = [(n, n.replace("left", "right", 1)) for n in names if n.replace("left", "right", 1) in names]
    metadata.set(keypoint_names=list(names), keypoint_flip_map=[(a, b) for a, b in swaps if a != b])


def _check_keypoints(name: str, cfg: CfgNode, objects: Sequence[Mapping[str, Any]]) -> None:
    """The names of the keypoints and which of them a mirror swaps are known, and their number is right."""
    name_keypoints(name)
    if not MetadataCatalog.get(name).get("keypoint_names"):
        raise UserError(f"data set {name!r}: no category of its annotation file names its keypoints")
    wanted = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for a in objects:
        count = len(a.get("keypoints", ())) // 3
        if not a.get("iscrowd") and count != wanted:
            raise UserError(
                f"data set {name!r} has objects of {count} keypoints, the config's model {wanted}: set "
                "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
            )


def _check_voc_folder(name: str, folder: Path, split: str) -> None:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    for path in (listing, folder / "Annotations", folder / "JPEGImages"):
        if not path.exists():
            raise UserError(
                f"{name}: {path} is missing; set DETECTRON2_DATASETS to the folder that holds {folder.name}/"
            )


def _check_annotations(name: str, option: str, mended: Path, *, masks: bool, keypoints: bool) -> list[str]:
    """Examine the annotation file, and read its mended copy from now on where it has to be mended."""
    _read_originals([name])
    file = Path(MetadataCatalog.get(name).json_file)
    if not file.is_file():
        raise UserError(
            f"{name}: {file} is missing; set DETECTRON2_DATASETS to the folder that holds it, or give "
            f"{option} {name}=ANNOTATIONS.json:IMAGES"
        )
    content, notes = coco_file.examine(file, masks=masks, keypoints=keypoints, share=share_of(name))
    copy = _copy(mended, name)
    if content is None:
        copy.unlink(missing_ok=True)  # of an earlier state of the file
    else:
        write_json(copy, content)
        _read_from(name, copy)
    return notes
