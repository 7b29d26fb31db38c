"""A protocol's name belongs to the config as it ships: whatever else was run says so."""

from __future__ import annotations

import pytest

from transfer.detection.config import load_config, shipped
from transfer.detection.protocol import IMAGES, UNKNOWN, flat, judged, judged_otherwise, protocol_of

C4 = {"name": "coco_R50_C4_2x", "version": "1", "hash": "9fab3e45eb7ca8fb"}  # as results have it since @1


def of(*words: str, file: str = "coco_R50_C4_2x", images: dict[str, int] | None = None) -> dict[str, object]:
    cfg = load_config(file, words, to_run_here=False)
    return protocol_of(cfg, shipped(cfg.PROTOCOL), images)


def test_the_shipped_config_and_what_is_no_part_of_it() -> None:
    elsewhere = ("OUTPUT_DIR", "x", "SEED", "3", "TEST.EVAL_PERIOD", "500", "DATALOADER.NUM_WORKERS", "1")
    assert of() == of(*elsewhere) == of(file="coco_R50_C4_2x_supervised") == C4
    assert of("DATASETS.TEST", "('coco_2017_val','my_val')") == C4  # each result names its own
    assert of(images={"coco_2017_train": 118287}) == C4


@pytest.mark.parametrize(
    ("key", "value", "differs"),
    [
        ("SOLVER.MAX_ITER", "1", "SOLVER.MAX_ITER 1 instead of 180000"),
        ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.NORM FrozenBN instead of SyncBN"),
        ("MODEL.RESNETS.NORM", "naiveSyncBN", "MODEL.RESNETS.NORM naiveSyncBN instead of SyncBN"),
        ("INPUT.MIN_SIZE_TEST", "96", "INPUT.MIN_SIZE_TEST 96 instead of 800"),
        ("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.BACKBONE.FREEZE_AT 2 instead of 0"),
        ("MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.DEPTH 101 instead of 50"),
        ("SOLVER.IMS_PER_BATCH", "8", "SOLVER.IMS_PER_BATCH 8 instead of 16"),
        ("DATASETS.TRAIN", "('mine',)", "DATASETS.TRAIN (mine,) instead of (coco_2017_train,)"),
    ],
)
def test_another_run_says_what_differs(key: str, value: str, differs: str) -> None:
    found = of(key, value)
    assert found["differs"] == [differs] and found["hash"] != C4["hash"]
    assert (found["name"], found["version"]) == ("coco_R50_C4_2x", "1")


def test_part_of_a_public_set_under_its_name() -> None:
    assert of(images={"coco_2017_train": 128})["differs"] == [
        "coco_2017_train of 128 images instead of 118287"
    ]
    assert judged(C4, "coco_2017_val", 5000) == judged(C4, "mine_val", 3) == C4
    part = judged(C4, "coco_2017_val", 128, ["TEST.AUG.ENABLED True instead of False"])
    assert part["differs"] == [
        "TEST.AUG.ENABLED True instead of False",
        "coco_2017_val of 128 images instead of 5000",
    ]
    assert (IMAGES["coco_2017_val"], IMAGES["voc_2007_test"]) == (5000, 4952)


def test_a_model_keeps_the_protocol_that_it_was_trained_by() -> None:
    settings = flat(load_config("coco_R50_C4_2x", [], to_run_here=False))
    other = load_config("coco_R50_C4_1x", ["INPUT.MIN_SIZE_TEST", "400"], to_run_here=False)
    found = judged_otherwise(other, settings)  # of another schedule, which no trained model knows of
    assert found == ["INPUT.MIN_SIZE_TEST 400 at evaluation instead of 800"]
    assert judged(UNKNOWN, "coco_2017_val", 5000) == {"name": "unknown", "version": None, "hash": "unknown"}


def test_a_users_own_config_is_known_by_its_content(tmp_path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("SOLVER:\n  MAX_ITER: 5\n  STEPS: []\n")
    first = of(file=str(own))
    own.write_text("SOLVER:\n  MAX_ITER: 6\n  STEPS: []\n")
    assert first["name"] == "mine" and first["hash"] != of(file=str(own))["hash"]
    same_name = tmp_path / "coco_R50_C4_2x.yaml"
    same_name.write_text("SOLVER:\n  MAX_ITER: 5\n  STEPS: []\n")
    assert "SOLVER.MAX_ITER 5 instead of 180000" in of(file=str(same_name))["differs"]
