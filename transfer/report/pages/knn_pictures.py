"""Pictures of some queries with their nearest neighbours, from cached features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from pretrain.common.errors import UserError
from pretrain.common.output_folder import read_config
from pretrain.data.cache import checksum_of
from pretrain.data.datasets import ImageDataset, open_dataset
from transfer.evaluation.feature_cache import FORMAT, mapped
from transfer.evaluation.pooled_features import LAST, stages_of
from transfer.evaluators.nearest import nearest
from transfer.report.evidence.grouping import Results
from transfer.report.evidence.records import Record
from transfer.report.pages.pictures import Shown, encode

SHOWN, NEIGHBOURS = 6, 6
COUNTED = 1000
"""Test images, evenly spread, whose neighbours are counted for the caption: six rows alone would mislead."""
MOST_IMAGES = 200_000
"""Beyond it the training images are not searched again for a picture's sake."""
TILE, FRAME, GAP = 72, 4, 4  # px
SAME, OTHER, QUERY = "#16a34a", "#dc2626", "#7c7c86"


def neighbour_pictures(results: Results) -> tuple[list[Shown], list[str]]:
    """One picture a method with k-NN results, the same queries in all; and why one could not be made."""
    pictures: list[Shown] = []
    notes: list[str] = []
    for method in results.methods:
        records = [r for t in results.tasks if t.name == "knn" for r in results.all_records(method, t)]
        if records:
            try:
                pictures.append(_picture(method, records[0], f"neighbours-{len(pictures)}.png"))
            except UserError as error:
                notes.append(f"{method}: {error}")
    return pictures, notes


def _picture(method: str, record: Record, name: str) -> Shown:
    """Raises UserError where images or features cannot be read from here."""
    config = read_config(record.folder)
    if not config.get("data_dir"):
        raise UserError(f"{record.folder / 'config.yaml'} does not say where the images are")
    settings: dict[str, Any] = record["settings"] or {}
    if int(settings.get("bank") or 0) > MOST_IMAGES:
        raise UserError(f"more than {MOST_IMAGES:,} training images")
    train = open_dataset(str(record["dataset"]), config["data_dir"], "train")
    test = open_dataset(str(record["dataset"]), config["data_dir"], "test")
    cache = Path(config.get("cache_dir") or record.folder / "features")
    bank, queries = _features(cache, record, train), _features(cache, record, test)
    shown = _shown(test)
    counted = np.unique(np.linspace(0, len(test) - 1, min(COUNTED, len(test))).round().astype(int))
    asked = np.concatenate([shown, counted])
    with torch.no_grad():
        _, index = nearest(
            torch.from_numpy(bank), torch.from_numpy(np.array(queries[asked])),
            min(NEIGHBOURS, len(train)), metric=settings.get("metric", "cosine"), device=torch.device("cpu"),
        )  # fmt: skip
    found = index.numpy()
    sheet = draw(test, train, shown, found[: len(shown)])
    same = train.labels_N[found[len(shown) :]] == test.labels_N[counted][:, None]
    caption = (
        f"{method}, {record['dataset']}: of the {found.shape[1]} nearest to each of {len(counted):,} test "
        f"images, {100 * same.mean():.1f} % have its class"
    )
    return Shown(
        name=name, caption=caption, data=encode(sheet, "PNG"), mime="image/png", width=sheet.width,
        height=sheet.height,
    )  # fmt: skip


def _features(cache: Path, record: Record, data: ImageDataset) -> np.ndarray:
    """The cached features of all images of `data` under the record's weights."""
    weights, settings = record["weights"] or {}, record["settings"] or {}
    branch = weights.get("branch")
    stages = stages_of(tuple(settings.get("features") or LAST))  # other commands may share the cache
    for file in sorted(cache.glob("*/meta.json")):
        meta = json.loads(file.read_text(encoding="utf-8"))
        if (
            meta["format"] == FORMAT
            and meta["weights"].startswith(f"{record.sha256} {branch} ")
            and (meta["split"], meta["data"], meta["n"]) == (data.split, data.fingerprint, len(data))
            and tuple(meta.get("stages", LAST)) == stages
            and settings.get("precision") in (None, meta["precision"])
            and record["image_size"] in (None, meta["transform"].get("size"))
            and all(weights.get(k) in (None, meta["transform"].get(k)) for k in ("mean", "std"))
        ):
            features = mapped(file.with_name("features.npy"))
            whole = features is not None and checksum_of(file.with_name("features.npy")) == meta["crc32"]
            if not whole or meta["broken"]:
                raise UserError(f"{file.parent}: features of some images alone, or damaged ones")
            return np.array(features)
    raise UserError(f"no features of today's {data.split} images under {cache}")


def _shown(data: ImageDataset) -> list[int]:
    """The first image of classes spread over all."""
    classes = np.unique(np.linspace(0, len(data.classes) - 1, SHOWN).round().astype(int))
    return [int(np.flatnonzero(data.labels_N == c)[0]) for c in classes if (data.labels_N == c).any()]


def draw(test: ImageDataset, train: ImageDataset, queries: list[int], index_QK: np.ndarray) -> Image.Image:
    """A row a query: the query, then its neighbours, nearest first.

    A neighbour of another class has a red frame and a bar through its lower corner.
    """
    side = TILE + 2 * FRAME
    rows, columns = index_QK.shape
    sheet = Image.new("RGB", (columns * (side + GAP) + side + 2 * GAP, rows * (side + GAP) - GAP), "white")
    for row, query in enumerate(queries):
        y = row * (side + GAP)
        sheet.paste(_tile(test.image(query), QUERY), (0, y))
        for column, neighbour in enumerate(index_QK[row]):
            same = bool(train.labels_N[neighbour] == test.labels_N[query])
            x = (column + 1) * (side + GAP) + 2 * GAP
            sheet.paste(_tile(train.image(int(neighbour)), SAME if same else OTHER, struck=not same), (x, y))
    return sheet


def _tile(image: Image.Image, colour: str, *, struck: bool = False) -> Image.Image:
    tile = Image.new("RGB", (TILE + 2 * FRAME, TILE + 2 * FRAME), colour)
    tile.paste(image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC), (FRAME, FRAME))
    if struck:
        last = TILE + 2 * FRAME
        ImageDraw.Draw(tile).line([(last - 22, last), (last, last - 22)], fill=colour, width=FRAME)
    return tile
