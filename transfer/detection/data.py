"""Detection data sets, checked, and batches that go on where they stopped.

The order of images and their augmentation follow from (seed, position) alone, so a resumed run sees what an
undisturbed one sees, whatever the number of loader workers.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.datasets import register_coco_instances
from torch.utils.data import DataLoader, Dataset

from pretrain.common.errors import UserError
from pretrain.data.datasets import read_image
from pretrain.data.loader import set_up_worker

SAMPLED_IMAGES = 32


def register(definitions: Sequence[str], *, option: str = "--dataset") -> None:
    """Register each NAME=ANNOTATIONS.json:IMAGES, given by `option`, as a COCO-format data set."""
    for definition in definitions:
        match = re.fullmatch(r"([^=]+)=(.+\.json):(.+)", definition)
        if match is None:
            raise UserError(f"{option} {definition}: wanted NAME=ANNOTATIONS.json:IMAGES")
        name, annotations, images = match.groups()
        if not Path(annotations).is_file():
            raise UserError(f"{option} {name}: {annotations}: no such file")
        if not Path(images).is_dir():
            raise UserError(f"{option} {name}: {images}: no such folder of images")
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_coco_instances(name, {}, annotations, images)


def check(cfg: CfgNode, *, train: bool = True, option: str = "--dataset") -> list[str]:
    """Check the config's data sets, given by `option`, before anything runs; one line of counts each.

    Raises UserError for a missing file, categories that do not match NUM_CLASSES, boxes outside images,
    duplicate ids, unreadable images (a sample of them is decoded).
    """
    names = [*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty")
    return [_check_one(name, cfg, option) for name in dict.fromkeys(names)]


def _check_one(name: str, cfg: CfgNode, option: str) -> str:
    if name not in DatasetCatalog.list():
        raise UserError(
            f"data set {name!r} is not known: give {option} {name}=ANNOTATIONS.json:IMAGES, or put a "
            "standard set under the folder that DETECTRON2_DATASETS names"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        _check_annotations(name, Path(metadata.json_file), option)
    elif metadata.get("dirname"):
        _check_voc_folder(name, Path(metadata.dirname), metadata.split)
    try:
        records = DatasetCatalog.get(name)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        raise UserError(f"data set {name!r} cannot be read: {error}") from error
    if not records:
        raise UserError(f"data set {name!r} holds no images")
    classes = len(MetadataCatalog.get(name).thing_classes)
    wanted = (
        cfg.MODEL.RETINANET.NUM_CLASSES
        if cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
        else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    )
    if classes != wanted:
        raise UserError(
            f"data set {name!r} has {classes} categories, the config's model {wanted}: add "
            f"MODEL.ROI_HEADS.NUM_CLASSES {classes}"
        )
    folder_missing = [r["file_name"] for r in records if not Path(r["file_name"]).is_file()]
    if folder_missing:
        raise UserError(f"{name}: {len(folder_missing)} image files are missing, as {folder_missing[0]}")
    step = max(1, len(records) // SAMPLED_IMAGES)
    for record in records[::step]:
        image = read_image(record["file_name"])
        size = (record.get("width", image.width), record.get("height", image.height))
        if image.size != size:
            raise UserError(
                f"{record['file_name']}: is {image.width} x {image.height}, its annotation says "
                f"{size[0]} x {size[1]}"
            )
    objects = [a for r in records for a in r.get("annotations", ())]
    # crowds, COCO's only run-length masks, are left out of training
    run_length = any(isinstance(a.get("segmentation"), dict) and not a.get("iscrowd") for a in objects)
    if run_length and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        raise UserError(f"{name}: its masks are run-length encoded: add INPUT.MASK_FORMAT bitmask")
    return f"{name}: {len(records)} images, {len(objects)} objects, {classes} categories"


def _check_voc_folder(name: str, folder: Path, split: str) -> None:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    for path in (listing, folder / "Annotations", folder / "JPEGImages"):
        if not path.exists():
            raise UserError(
                f"{name}: {path} is missing; set DETECTRON2_DATASETS to the folder that holds {folder.name}/"
            )


def _check_annotations(name: str, file: Path, option: str) -> None:
    """What COCO's and detectron2's loaders take for granted."""
    if not file.is_file():
        raise UserError(
            f"{name}: {file} is missing; set DETECTRON2_DATASETS to the folder that holds it, or give "
            f"{option} {name}=ANNOTATIONS.json:IMAGES"
        )
    try:
        content = json.loads(file.read_text())
        images, categories = content["images"], content["categories"]
        annotations = content.get("annotations", [])
        sizes = {i["id"]: (i["width"], i["height"]) for i in images}
        known = {c["id"] for c in categories}
        for what, entries in (("image", images), ("category", categories), ("annotation", annotations)):
            ids = [e["id"] for e in entries]
            if len(set(ids)) < len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise UserError(f"{file}: {what} id {twice} occurs more than once; ids must be unique")
        for a in annotations:
            if a["image_id"] not in sizes:
                raise UserError(
                    f"{file}: annotation {a['id']} names image {a['image_id']}, which is not listed"
                )
            if a["category_id"] not in known:
                raise UserError(
                    f"{file}: annotation {a['id']} names category {a['category_id']}, which is not listed"
                )
            x, y, w, h = a["bbox"]
            width, height = sizes[a["image_id"]]
            if min(x, y, w, h) < -1 or x + w > width + 1 or y + h > height + 1:
                raise UserError(
                    f"{file}: annotation {a['id']} has box {a['bbox']} outside its image of "
                    f"{width} x {height}; boxes are [x, y, width, height] in pixels"
                )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not in COCO's format ({type(error).__name__}: {error})") from error


def index_batches(
    wide_N: Sequence[bool], *, seed: int, rank: int, world_size: int, batch_per_rank: int, by_shape: bool
) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (position, index) for one rank, a function of the arguments alone.

    Positions count the images of one stream of permutations (the first of seed, 0; the next of seed, 1 …)
    that the ranks share in turn, as detectron2's TrainingSampler; `by_shape` fills a batch with wide or with
    tall images only, as its AspectRatioGroupedDataset.
    """
    buckets: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    position = 0
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(wide_N))
        for index in order.tolist():
            if position % world_size == rank:
                bucket = buckets[int(wide_N[index]) if by_shape else 0]
                bucket.append((position, index))
                if len(bucket) == batch_per_rank:
                    yield list(bucket)
                    bucket.clear()
            position += 1


class _Positioned(Dataset):
    """Records whose augmentation is seeded by (seed, position)."""

    def __init__(self, records: list[dict[str, Any]], mapper: Any, seed: int) -> None:
        self.records, self.mapper, self.seed = DatasetFromList(records, copy=False), mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        position, index = where
        words = np.random.SeedSequence((self.seed, position)).generate_state(4)
        earlier, earlier_plain = np.random.get_state(), random.getstate()
        np.random.seed(words)  # detectron2's augmentations draw from numpy's global generator
        random.seed(int(words[0]))
        try:
            return self.mapper(self.records[index])
        finally:
            np.random.set_state(earlier)
            random.setstate(earlier_plain)


class _From:
    """A batch sampler: `index_batches` from the batch numbered `start` on."""

    def __init__(self, wide_N: Sequence[bool], start: int, **kwargs: Any) -> None:
        self.wide_N, self.start, self.kwargs = wide_N, start, kwargs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(index_batches(self.wide_N, **self.kwargs), self.start, None)


def train_loader(
    cfg: CfgNode, *, seed: int, rank: int, world_size: int, start: int = 0, num_workers: int | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Endless training batches of this rank, from iteration `start` on."""
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    sampler = _From(
        [r["width"] > r["height"] for r in records],
        start,
        seed=seed,
        rank=rank,
        world_size=world_size,
        batch_per_rank=cfg.SOLVER.IMS_PER_BATCH // world_size,
        by_shape=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )
    workers = cfg.DATALOADER.NUM_WORKERS if num_workers is None else num_workers
    return iter(DataLoader(
        _Positioned(records, DatasetMapper(cfg, is_train=True), seed),
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_set_up_worker if workers else None,
    ))  # fmt: skip


def _set_up_worker(number: int) -> None:
    set_up_worker(number)
    torch.set_num_threads(1)
