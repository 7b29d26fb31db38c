"""The plan command: schedules scaled by hand, files that detectron2 reads, notes where the rule ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.common.cli import run
from transfer.conversion.availability import CONFIGS
from transfer.detection import schedule
from transfer.detection.config import load_config, shipped
from transfer.detection.protocol import protocol_of

VOC = {
    "IMS_PER_BATCH": 16, "BASE_LR": 0.02, "MAX_ITER": 24000, "STEPS": [18000, 22000], "WARMUP_ITERS": 100,
    "CHECKPOINT_PERIOD": 5000,
}  # fmt: skip


def test_half_the_batch_is_half_the_rate_and_twice_the_steps() -> None:
    assert schedule.equivalent(VOC, batch=8) == {  # k = 8/16
        "IMS_PER_BATCH": 8, "BASE_LR": 0.01, "MAX_ITER": 48000, "STEPS": [36000, 44000],
        "WARMUP_ITERS": 200, "CHECKPOINT_PERIOD": 10000,
    }  # fmt: skip
    assert schedule.equivalent(VOC, batch=16) == VOC
    third = schedule.equivalent(VOC, batch=12)  # k = 3/4: 24000 * 4/3, 18000 * 4/3, 22000 * 4/3 = 29333.3
    assert (third["MAX_ITER"], third["STEPS"]) == (32000, [24000, 29333])
    assert third["BASE_LR"] == pytest.approx(0.015)


def test_the_last_rate_of_a_polynomial_schedule_is_scaled_too() -> None:
    words = {"config_file": "sem_seg_voc12_R50_FCN_20k", "num_gpus": 2}
    found = schedule.plan(schedule.PlanSettings(**words, ims_per_gpu=4))
    assert found["overrides"]["SOLVER.BASE_LR_END"] == pytest.approx(5e-5)  # batch 8 of 16
    assert found["overrides"]["SOLVER.MAX_ITER"] == 40000
    as_published = schedule.plan(schedule.PlanSettings(**{**words, "num_gpus": 4}))
    assert as_published["ims_per_gpu"] == 4 and as_published["before"] == as_published["after"]
    assert found["norm"] == {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.SEM_SEG_HEAD.NORM": "SyncBN"}


def test_semantic_segmentation_is_timed_on_crops(tmp_path: Path) -> None:
    settings = schedule.PlanSettings(config_file="small_R18_linear", num_gpus=1, ims_per_gpu=1)
    found = schedule.cost(schedule.plan(settings), 1)
    assert found["hours"] == pytest.approx(found["seconds"] * 1200 / 3600)  # 300 iterations of 4 images


def test_the_number_of_images_seen_is_kept() -> None:
    for batch in (1, 2, 4, 8, 32, 64):
        scaled = schedule.equivalent(VOC, batch=batch)
        assert scaled["MAX_ITER"] * batch == 24000 * 16


def test_gpus_keep_their_two_images_by_default(capsys: Any) -> None:
    words = ["--config-file", "voc_R50_C4_24k", "--num-gpus", "2", "--json"]
    assert run(schedule.main, words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["after"]["IMS_PER_BATCH"] == 4 and result["after"]["MAX_ITER"] == 96000
    assert result["norm"]["MODEL.RESNETS.NORM"] == "SyncBN"
    assert any("4 images instead of 16" in note for note in result["notes"])


def test_the_same_batch_on_one_gpu_is_the_same_protocol_and_the_file_is_read_back(
    tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "one.yaml"
    words = ["--config-file", "coco_R50_FPN_1x", "--num-gpus", "1", "--ims-per-gpu", "16"]
    assert run(schedule.main, [*words, "--output", str(out)]) == 0
    assert "the same global batch" in capsys.readouterr().out
    cfg = load_config(out, ["PROTOCOL", "coco_R50_FPN_1x@1"], to_run_here=False)
    assert protocol_of(cfg, shipped(cfg.PROTOCOL)) == {
        "name": "coco_R50_FPN_1x", "version": "1", "hash": "da7c223bd2f0a667"
    }  # fmt: skip
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (16, 90000, (60000, 80000))
    assert cfg.MODEL.MASK_ON  # the rest is the original's


def test_the_cost_is_measured_here(tmp_path: Path, capsys: Any) -> None:
    small = tmp_path / "small.yaml"
    base = f"_BASE_: {CONFIGS / 'scenes_R18_FPN.yaml'}\n"
    small.write_text(base + "INPUT:\n  MIN_SIZE_TRAIN: [64]\nSOLVER:\n  IMS_PER_BATCH: 2\n")
    words = ["--config-file", str(small), "--num-gpus", "2", "--ims-per-gpu", "1", "--measure", "2", "--json"]
    assert run(schedule.main, words) == 0
    found = json.loads(capsys.readouterr().out)["cost"]
    assert found["hours"] == pytest.approx(found["seconds"] * 250 / 3600)
    assert found["images_per_second"] == pytest.approx(2 / found["seconds"])
    assert 0.1 < found["memory_gib"] < 100 and found["device"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-file", "nothing", "--num-gpus", "2"], "known names: "),
        (["--config-file", "voc_R50_C4_24k", "--num-gpus", "0"], "wanted 1 or more"),
        (["--config-file", "voc_R50_C4_24k", "--num-gpus", "1", "--output", "x.txt"], "ends in .yaml"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, capsys: Any) -> None:
    assert run(schedule.main, words) == 2
    assert said in capsys.readouterr().err
