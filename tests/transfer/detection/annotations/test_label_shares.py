"""Shares of a set's labels: the published lists, and that nothing of the other images is used."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from pretrain.common.errors import UserError
from transfer.detection.annotations.label_shares import LabelShare, labelled, percent_of, share_of
from transfer.detection.batches import train_loader
from transfer.detection.config import load_config
from transfer.detection.data import check, digest_of, register, use_mended
from transfer.detection.protocol import IMAGES

COCO_TRAIN = 118287


def share(name: str) -> LabelShare:
    found = share_of(name)
    assert found is not None
    return found


@pytest.mark.parametrize("percent", [1, 2, 5, 10])
def test_the_lists_of_semi_supervised_detection(percent: int) -> None:
    """As STAC's prepare_coco_data.py draws them, with numpy's global generator, in the file's order."""
    ids = [7 * i % COCO_TRAIN for i in range(COCO_TRAIN)]  # 7 and 118287 have no common divisor
    np.random.seed(1)
    drawn = set(np.random.choice(range(COCO_TRAIN), size=int(float(percent) / 100.0 * COCO_TRAIN)))
    content = {"images": [{"id": i} for i in ids], "annotations": []}
    share(f"coco_2017_train.1@{percent}").keep(content, set())
    assert [image["id"] for image in content["images"]] == [ids[i] for i in sorted(drawn)]
    assert IMAGES[f"coco_2017_train.1@{percent}"] == len(drawn)


def test_the_first_images_with_an_object() -> None:
    """Of ids 1 to 8, which stand in the file from the last to the first, 2 has none: 1, 3 and 4 are 3 / 7."""
    content = {
        "images": [{"id": i} for i in range(8, 0, -1)],
        "annotations": [{"id": i, "image_id": i} for i in (1, 2, 3, 4, 5, 6, 7, 8, 3)],
    }
    share("some.first@43").keep(content, {1, 3, 4, 5, 6, 7, 8})  # 0.43 * 7 = 3.01
    assert [image["id"] for image in content["images"]] == [4, 3, 1]
    assert [a["image_id"] for a in content["annotations"]] == [1, 3, 4, 3]
    for percent in (5, 10):
        assert IMAGES[f"coco_2017_train.first@{percent}"] == int(percent / 100 * 117266)


def test_the_name_says_the_share() -> None:
    assert share_of("coco_2017_train") is None and share_of("a.jpg@b") is None
    assert share("mine.v2.12@0.5") == LabelShare(
        name="mine.v2.12@0.5", base="mine.v2", draw="12", percent=0.5
    )
    assert percent_of(["a.1@10"]) == percent_of(["a.1@10", "b.first@10"]) == 10
    assert percent_of(["a.1@10", "b"]) == percent_of(["a"]) == percent_of([]) == 100


# --- in a run


def settings(coco_mini: Path, *words: str) -> CfgNode:
    classes = len(json.loads((coco_mini / "instances.json").read_text())["categories"])
    return load_config("small_R18_FPN", [
        "MODEL.ROI_HEADS.NUM_CLASSES", str(classes), "INPUT.MASK_FORMAT", "bitmask", "DATASETS.TEST",
        "('mini',)", "SOLVER.IMS_PER_BATCH", "1", *words,
    ])  # fmt: skip


def registered(coco_mini: Path) -> dict[str, Any]:
    register([f"mini={coco_mini / 'instances.json'}:{coco_mini / 'images'}"])
    content: dict[str, Any] = json.loads((coco_mini / "instances.json").read_text())
    return content


@pytest.mark.parametrize("name", ["mini.3@10", "mini.first@10"])
def test_no_other_image_is_trained_on(coco_mini: Path, tmp_path: Path, name: str) -> None:
    content = registered(coco_mini)
    cfg = settings(coco_mini, "DATASETS.TRAIN", f"('{name}',)")
    (told, _) = check(cfg, mended=tmp_path / "a")
    records = DatasetCatalog.get(name)
    assert f"of the {len(content['images'])} images of mini" in told
    of = {i["id"]: [a for a in content["annotations"] if a["image_id"] == i["id"]] for i in content["images"]}
    usable = sorted(i for i, objects in of.items() if any(not a["iscrowd"] for a in objects))
    if name.endswith("first@10"):
        wanted = set(usable[: len(usable) // 10])
    else:
        np.random.seed(3)
        size = len(content["images"]) // 10
        wanted = {content["images"][i]["id"] for i in np.random.choice(range(len(of)), size=size)}
        assert len(wanted) <= size
    assert {r["image_id"] for r in records} == wanted
    assert {r["image_id"]: len(r["annotations"]) for r in records} == {i: len(of[i]) for i in wanted}
    held = json.loads((tmp_path / "a" / f"{name.replace('@', '_')}.json").read_text())
    assert {a["image_id"] for a in held["annotations"]} <= wanted and held["categories"] == content[
        "categories"
    ]
    assert len(DatasetCatalog.get("mini")) == len(content["images"])
    batches = train_loader(cfg, seed=0, rank=0, world_size=1)
    assert {batch[0]["image_id"] for batch in islice(batches, 3 * len(wanted))} == wanted & set(usable)

    again, digest = labelled(records), digest_of(name)
    assert digest != digest_of("mini")
    registered(coco_mini)
    use_mended(tmp_path / "a", ["mini", name])  # as a spawned rank does
    assert labelled(DatasetCatalog.get(name)) == again and digest_of(name) == digest
    check(cfg, mended=tmp_path / "b")
    assert labelled(DatasetCatalog.get(name)) == again and digest_of(name) == digest
    check(cfg)  # a dry run keeps no copy: then there is nothing to train on, rather than everything
    assert DatasetCatalog.get(name) == [] and len(DatasetCatalog.get("mini")) == len(content["images"])


def test_draws_differ_by_their_seed(coco_mini: Path, tmp_path: Path) -> None:
    registered(coco_mini)
    found = []
    for name in ("mini.1@20", "mini.2@20"):
        check(settings(coco_mini, "DATASETS.TRAIN", f"('{name}',)"), mended=tmp_path)
        found.append(labelled(DatasetCatalog.get(name)))
    assert found[0]["ids_sha256"] != found[1]["ids_sha256"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mini.1@0", "a percentage above 0 and at most 100"),
        ("mini.1@101", "a percentage above 0 and at most 100"),
        ("mini.5000000000@10", "a seed of 32 bits"),
        ("mini.1@0.1", "are none"),
        ("nowhere.1@10", r"give --dataset nowhere=ANNOTATIONS.json:IMAGES"),
        ("voc_2007_trainval.1@10", "voc_2007_trainval has no annotation file in COCO's format"),
    ],
)
def test_what_is_no_share_is_refused(coco_mini: Path, tmp_path: Path, name: str, said: str) -> None:
    registered(coco_mini)
    with pytest.raises(UserError, match=said):
        check(settings(coco_mini, "DATASETS.TRAIN", f"('{name}',)"), mended=tmp_path)
