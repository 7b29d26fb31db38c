"""Check a COCO annotation file, and mend a copy of one that would be misread.

pycocotools and the evaluators built on it take some things for granted without a word: an annotation with id
0 counts as missed when it is found, one without `area` as small, one without `iscrowd` or with an image id
that is text ends the evaluation. Such files are mended in a copy; what cannot be guessed is refused.
"""

from __future__ import annotations

import codecs
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_codec

from pretrain.common.errors import UserError
from pretrain.common.files import regular
from transfer.detection.annotations.label_shares import LabelShare

MOST_BEYOND = 0.5  # share of boxes that may reach beyond their image before they are held for another format


def examine(
    file: Path, *, masks: bool = False, keypoints: bool = False, share: LabelShare | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Check an annotation file; returns its mended content (None: it is read rightly as it is) and notes.

    `share`: the content is that part of the file. Raises UserError for what is not COCO's format, names what
    does not exist, or cannot be trained on.
    """
    try:
        raw = regular(file).read_bytes()
        content = json.loads(raw.decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise TypeError(f"holds a {type(content).__name__}")
        part = [(True, share.keep(content, _usable(content)))] if share else []
        notes = part + _examine(file, content, masks=masks, keypoints=keypoints)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not in COCO's format ({type(error).__name__}: {error})") from error
    mended = [note for mends, note in notes if mends]
    if raw.startswith(codecs.BOM_UTF8):
        mended.append("the byte order mark at its head was left out")
    return (content if mended else None), [*mended, *(note for mends, note in notes if not mends)]


def share_seen(train: Iterable[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> float:
    """The share of the test images whose file is that of a training image, wherever links lead."""
    folder = functools.cache(os.path.realpath)

    def place(record: Mapping[str, Any]) -> tuple[str, str]:
        head, name = os.path.split(record["file_name"])
        return folder(head), name

    seen = {place(record) for record in train}
    return sum(place(record) in seen for record in test) / len(test)


def _usable(content: Mapping[str, Any]) -> set[Any]:
    """The ids of the images that detectron2 trains on: with an object that is neither a crowd nor a line."""
    objects = content.get("annotations", [])
    return {a["image_id"] for a in objects if not a.get("iscrowd") and not _has_only_lines(a)}


def _examine(file: Path, content: dict[str, Any], *, masks: bool, keypoints: bool) -> list[tuple[bool, str]]:
    """Mend `content` in place; returns (whether this changed it, what is to be said of it)."""
    images, categories = content["images"], content["categories"]
    annotations = content.setdefault("annotations", [])
    notes = []
    for what, entries in (("image", images), ("category", categories), ("annotation", annotations)):
        twice = [i for i, n in Counter(e.get("id") for e in entries).items() if n > 1 and i is not None]
        if twice:
            raise UserError(f"{file}: {what} id {twice[0]} occurs more than once; ids must be unique")
    for c in categories:
        if not _is_whole(c["id"]):
            raise UserError(f"{file}: category id {c['id']!r} is no whole number")
    if not all(_is_whole(i["id"]) for i in images):
        new = {image["id"]: number for number, image in enumerate(images, 1)}
        for image in images:
            image["id"] = new[image["id"]]
        for a in annotations:
            a["image_id"] = new.get(a["image_id"], a["image_id"])
        notes.append((True, "its image ids are no whole numbers: images were numbered from 1"))
    sizes = {i["id"]: (i["width"], i["height"]) for i in images}
    known = {c["id"] for c in categories}
    for a in annotations:
        if a["image_id"] not in sizes:
            raise UserError(_named(file, a, f"names image {a['image_id']}, which is not listed"))
        if a["category_id"] not in known:
            raise UserError(_named(file, a, f"names category {a['category_id']}, which is not listed"))
    notes += _mend_boxes(file, annotations, sizes)
    _need_objects(file, annotations, masks=masks, keypoints=keypoints)
    lines = sum(_has_only_lines(a) for a in annotations)
    if lines:
        notes.append((False, f"{lines} objects with fewer than three points a polygon: not trained on"))
    if not all(_is_whole(a.get("id")) and a["id"] > 0 for a in annotations):
        for number, a in enumerate(annotations, 1):
            a["id"] = number
        notes.append(
            (True, "annotations were numbered from 1: one of id 0, or without, would count as missed")
        )
    for key, value, why in (
        ("area", lambda a: _area(a, sizes[a["image_id"]]), "derived from their masks or boxes"),
        ("iscrowd", lambda a: 0, "taken for single objects"),
    ):
        lacking = [a for a in annotations if a.get(key) is None]
        _fill(lacking, key, value)
        if lacking:
            notes.append((True, f"{len(lacking)} objects without {key}: {why}"))
    return notes


def _mend_boxes(
    file: Path, annotations: list[dict[str, Any]], sizes: Mapping[int, tuple[int, int]]
) -> list[tuple[bool, str]]:
    """Refuse boxes that are none; count those that reach beyond their image."""
    beyond = 0
    for a in annotations:
        box = a["bbox"]
        if len(box) != 4 or not all(math.isfinite(v) for v in box) or min(box[2:]) < 0:
            raise UserError(_named(file, a, f"has box {box}; wanted [x, y, width, height] in pixels"))
        x, y, w, h = box
        width, height = sizes[a["image_id"]]
        beyond += min(x, y) < -1 or x + w > width + 1 or y + h > height + 1
    if beyond > MOST_BEYOND * len(annotations):
        raise UserError(
            f"{file}: {beyond} of {len(annotations)} boxes reach outside their image; boxes are "
            "[x, y, width, height] in pixels"
        )
    if not beyond:
        return []
    return [
        (False, f"{beyond} boxes reach beyond their image: training cuts them off there, evaluation does not")
    ]


def _need_objects(file: Path, annotations: list[dict[str, Any]], *, masks: bool, keypoints: bool) -> None:
    """Some object is left without crowds and degenerate shapes, and has what the config asks for."""
    single = [a for a in annotations if not a.get("iscrowd")]
    usable = [a for a in single if min(a["bbox"][2:]) > 0 and not _has_only_lines(a)]
    if not usable:
        why = "there are none" if not annotations else (
            f"of {len(annotations)}, {len(annotations) - len(single)} are crowds and {len(single)} have an "
            "empty box or a polygon of fewer than three points"
        )  # fmt: skip
        raise UserError(f"{file}: no object to train on or to evaluate with: {why}")
    if masks and (lacking := [a for a in annotations if not a.get("segmentation")]):
        raise UserError(
            _named(
                file,
                lacking[0],
                f"has no mask, as {len(lacking)} of {len(annotations)}: add MODEL.MASK_ON False",
            )
        )
    if keypoints and (lacking := [a for a in single if not a.get("keypoints")]):
        raise UserError(
            _named(
                file, lacking[0],
                f"has no keypoints, as {len(lacking)} of {len(single)}: add MODEL.KEYPOINT_ON False",
            )
        )  # fmt: skip


def _named(file: Path, annotation: Mapping[str, Any], what: str) -> str:
    return f"{file}: annotation {annotation.get('id', '(no id)')} {what}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_only_lines(annotation: Mapping[str, Any]) -> bool:
    """detectron2 leaves out an object all of whose polygons have fewer than three points."""
    shape = annotation.get("segmentation")
    return bool(shape) and isinstance(shape, list) and not any(len(p) >= 6 and len(p) % 2 == 0 for p in shape)


def _area(annotation: Mapping[str, Any], size: tuple[int, int]) -> float:
    """Pixels of the mask, as in COCO's own files; of the box where there is none."""
    shape = annotation.get("segmentation")
    width, height = size
    if isinstance(shape, list) and shape and not _has_only_lines(annotation):
        polygons = [p for p in shape if len(p) >= 6]
        return float(mask_codec.area(mask_codec.merge(mask_codec.frPyObjects(polygons, height, width))))
    if isinstance(shape, dict):
        counted = isinstance(shape["counts"], list)
        return float(mask_codec.area(mask_codec.frPyObjects(shape, *shape["size"]) if counted else shape))
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _fill(lacking: list[dict[str, Any]], key: str, value: Callable[[Mapping[str, Any]], float]) -> None:
    for annotation in lacking:
        annotation[key] = value(annotation)
