"""Annotation files that would be misread without a word are mended or refused, before any training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from pretrain.common.errors import UserError
from transfer.detection import data
from transfer.detection.annotations.coco_file import examine
from transfer.detection.batches import index_batches
from transfer.detection.config import load_config
from transfer.detection.evaluation import coco_evaluation, named_stats
from transfer.detection.protocol import flat

SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def content() -> dict[str, Any]:
    """Two images of 60 x 40, two categories, a square of 20 x 20 in each image."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i, "iscrowd": 0, "bbox": [10, 10, 20, 20], "area": 400,
             "segmentation": copy.deepcopy(SQUARE)}
            for i in (1, 2)
        ],
    }  # fmt: skip


def written(folder: Path, value: dict[str, Any], name: str = "a.json") -> Path:
    (folder / name).write_text(json.dumps(value))
    return folder / name


def perfect(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth["annotations"]
    ]


def stats_of(folder: Path, mended: dict[str, Any]) -> dict[str, float]:
    return named_stats(coco_evaluation(written(folder, mended, "b.json"), perfect(mended), "bbox"))


def test_a_sound_file_is_read_as_it_is(tmp_path: Path) -> None:
    assert examine(written(tmp_path, content()), masks=True) == (None, [])


def test_annotation_id_0_counts_as_found(tmp_path: Path) -> None:
    value = content()
    for a in value["annotations"]:
        a["id"] -= 1
    mended, notes = examine(written(tmp_path, value))
    assert mended is not None and [a["id"] for a in mended["annotations"]] == [1, 2]
    assert "numbered from 1" in notes[0]
    assert stats_of(tmp_path, mended)["AP"] == 1.0  # of perfect boxes


def test_areas_are_derived_from_masks_and_boxes(tmp_path: Path) -> None:
    value = content()
    value["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 10, 30]]  # half of the square
    value["annotations"][1]["segmentation"] = []
    value["annotations"][1]["bbox"] = [0, 0, 50, 40]
    for a in value["annotations"]:
        del a["area"], a["iscrowd"]
    mended, notes = examine(written(tmp_path, value))
    assert mended is not None
    triangle, box = (a["area"] for a in mended["annotations"])
    assert triangle == pytest.approx(200, rel=0.06) and box == 50 * 40  # pixels along the edge are whole
    assert [a["iscrowd"] for a in mended["annotations"]] == [0, 0]
    assert "2 objects without area" in notes[0] and "2 objects without iscrowd" in notes[1]
    stats = stats_of(tmp_path, mended)
    assert stats["APs"] == 1 and stats["APm"] == 1 and stats["APl"] == -1  # 32² = 1024 px between them


def test_image_ids_that_are_text_and_a_byte_order_mark(tmp_path: Path) -> None:
    value = content()
    for image in value["images"]:
        image["id"] = f"img{image['id']}"
    for a in value["annotations"]:
        a["image_id"] = f"img{a['image_id']}"
    mended, notes = examine(written(tmp_path, value))
    assert mended is not None and [i["id"] for i in mended["images"]] == [1, 2]
    assert [a["image_id"] for a in mended["annotations"]] == [1, 2]
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content()).encode())
    mended, notes = examine(tmp_path / "bom.json")
    assert mended == content() and notes == ["the byte order mark at its head was left out"]


def first(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda c: c["annotations"][0].pop("segmentation"),
            "annotation 1 has no mask, as 1 of 2: add MODEL.MASK_ON",
        ),
        (first(segmentation=None), "add MODEL.MASK_ON False"),
        (first(segmentation=[]), "add MODEL.MASK_ON False"),
        (first(bbox=[1, 2, 3]), "wanted \\[x, y, width, height\\]"),
        (first(bbox=[1, 2, -3, 4]), "wanted \\[x, y, width, height\\]"),
        (first(bbox=[1, 2, float("nan"), 4]), "wanted \\[x, y, width, height\\]"),
        (first(image_id=9), "names image 9"),
        (first(category_id=9), "names category 9"),
        (lambda c: c.update(annotations=[]), "no object to train on"),
        (lambda c: c.pop("annotations"), "no object to train on"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "2 are crowds"),
        (
            lambda c: [a.update(segmentation=[[1, 1, 5, 5]]) for a in c["annotations"]],
            "fewer than three points",
        ),
        (lambda c: [a.update(bbox=[10, 10, 55, 35]) for a in c["annotations"]], "2 of 2 boxes reach outside"),
        (lambda c: c["categories"][0].update(id="one"), "category id 'one' is no whole number"),
        (lambda c: c["images"][0].pop("width"), "not in COCO's format"),
    ],
)
def test_what_cannot_be_guessed_is_refused(tmp_path: Path, harm: Any, said: str) -> None:
    value = content()
    harm(value)
    with pytest.raises(UserError, match=said):
        examine(written(tmp_path, value), masks=True)


def test_a_box_beyond_the_image_is_counted(tmp_path: Path) -> None:
    value = content()
    value["annotations"][0]["bbox"] = [50, 10, 20, 20]
    mended, notes = examine(written(tmp_path, value))
    assert mended is None and notes[0].startswith("1 boxes reach beyond their image")


# --- with images


def images(folder: Path, value: dict[str, Any]) -> None:
    for image in value["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])


def checked(
    folder: Path, *words: str, test: dict[str, Any] | None = None, mended: Path | None = None
) -> list[str]:
    value = content()
    for name, c in (("small_train", value), ("small_test", test or value)):
        file = folder / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(c))
        data.register([f"{name}={file}:{folder}"])
    cfg = load_config("small_R18_FPN", ["MODEL.ROI_HEADS.NUM_CLASSES", "2", *words])
    return data.check(cfg, mended=mended)


def test_categories_are_compared_by_name(tmp_path: Path) -> None:
    images(tmp_path, content())
    turned = content()
    turned["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    with pytest.raises(
        UserError, match=r"category 1 is 'cat' \(id 1\) in small_train and 'dog' \(id 1\) in small_te"
    ):
        checked(tmp_path, test=turned)
    (tmp_path / "small_test.json").unlink()
    moved = content()
    for c in (*moved["categories"], *moved["annotations"]):  # other ids, the same order: the same outputs
        key = "id" if "name" in c else "category_id"
        c[key] += 10
    assert len(checked(tmp_path, test=moved)) == 2


def test_a_mended_copy_is_read_in_training_and_evaluation(tmp_path: Path) -> None:
    images(tmp_path, content())
    value = content()
    for a in value["annotations"]:
        a["id"] -= 1
    original = str(written(tmp_path, value, "small_test.json"))
    assert any("numbered from 1" in line for line in checked(tmp_path))  # a dry run keeps nothing
    assert MetadataCatalog.get("small_test").json_file == original
    checked(tmp_path, mended=tmp_path / "copies")
    copied = tmp_path / "copies" / "small_test.json"
    assert MetadataCatalog.get("small_test").json_file == str(copied)
    data.register([f"small_test={original}:{tmp_path}"])  # as a spawned rank does
    data.use_mended(tmp_path / "copies", ["small_train", "small_test"])
    assert len(DatasetCatalog.get("small_test")) == 2
    assert MetadataCatalog.get("small_test").json_file == str(copied)
    written(tmp_path, content(), "small_test.json")
    checked(tmp_path, mended=tmp_path / "copies")
    assert MetadataCatalog.get("small_test").json_file == original and not copied.exists()


def test_headers_of_all_images_are_read(tmp_path: Path) -> None:
    value = content()
    images(tmp_path, value)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (40, 60)).save(tmp_path / "2.png", exif=exif)  # stored 40 x 60, shown 60 x 40
    checked(tmp_path)
    Image.new("RGB", (60, 40)).save(tmp_path / "2.png", exif=exif)  # annotated as stored
    with pytest.raises(
        UserError, match="is shown as 40 x 60 by its EXIF orientation, its annotation says 60 x 40"
    ):
        checked(tmp_path)
    Image.fromarray(np.full((40, 60), 40000, np.uint16)).save(tmp_path / "2.png")
    with pytest.raises(UserError, match=r"2\.png has more than 8 bits a pixel"):
        checked(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png is not a readable image"):
        checked(tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png is missing"):
        checked(tmp_path)


def test_data_sets_that_need_more_are_named(tmp_path: Path) -> None:
    for words, said in (
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", "('lvis_v1_val',)"], "needs the package lvis: pip install lvis"),
        (
            ["DATASETS.TEST", "('cityscapes_fine_instance_seg_val',)"],
            "package cityscapesscripts: pip install",
        ),
        (["DATASETS.TEST", "('ade20k_sem_seg_val',)"], "sets of kind sem_seg are not evaluated here"),
        (["DATASETS.TEST", "('voc_2007_test',)"], "has boxes only: add MODEL.MASK_ON False"),
    ):
        cfg = load_config("small_R18_FPN", words)
        with pytest.raises(UserError, match=said):
            data.check(cfg, train="TRAIN" in words[0])


def test_repeat_factors_fill_epochs_as_detectron2_does() -> None:
    from detectron2.data.samplers import RepeatFactorTrainingSampler

    repeats = np.array([1.0, 2.5, 1.0, 3.0])
    stream = index_batches(
        [True] * 4, seed=0, rank=0, world_size=1, batch_per_rank=1, by_shape=False, repeats_N=repeats
    )
    indices = [next(stream)[0][1] for _ in range(7500)]  # a thousand epochs of 7 or 8
    shares = np.bincount(indices, minlength=4) / (len(indices) / repeats.sum())
    np.testing.assert_allclose(shares, repeats, atol=0.05)
    records = [{"annotations": [{"category_id": 0}]}] * 99 + [{"annotations": [{"category_id": 1}]}]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.04)
    assert factors[-1] == 2 and factors[0] == 1  # sqrt(0.04 / 0.01)


def test_flat_spells_every_key() -> None:
    assert flat({"A": {"B": (1, 2)}, "C": None}) == {"A.B": [1, 2], "C": None}
