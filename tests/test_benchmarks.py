"""Benchmarks: their figures are right where the answer is known, and each kind runs and is written."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import deviation, features, knn, loader
from benchmarks import step as training_step
from benchmarks.__main__ import measure
from benchmarks.augment import six_views
from benchmarks.features import agreement
from benchmarks.growth import growth
from benchmarks.harness import (
    Comparison,
    Table,
    Timing,
    as_markdown,
    as_record,
    interleave,
    peak_extra_bytes,
)
from benchmarks.images import natural_images
from pretrain.data.datasets import ImageDataset
from pretrain.views.augment import View, uniforms
from pretrain.views.colours import draw_colours, finish
from pretrain.views.loader import FIRST_COLOUR_SLOT
from tests.helpers.held_memory import hold
from tests.helpers.tiny_resnet import ARCH
from transfer.evaluation.transforms import EvalTransform


@pytest.fixture(scope="module")
def photographs(coco_mini: Path) -> ImageDataset:
    files = sorted(p.name for p in (coco_mini / "images").iterdir())[:8]
    return ImageDataset(
        name="x", split="train", classes=["all"], labels_N=np.zeros(len(files), np.int64), native_size=None,
        root=coco_mini / "images", files=files,
    )  # fmt: skip


def test_each_operation_is_near_pillows_on_real_images(photographs: ImageDataset) -> None:
    """Limits on the mean, levels of 255; half a level is what Pillow's cutting off makes by itself."""
    limits = {
        "resized crop to 224 px, bicubic": 0.2, "resized crop to 224 px, bilinear": 0.2, "brightness": 0.6,
        "contrast": 0.6, "saturation": 0.6, "hue": 1.5, "greyscale": 0.4, "blur": 1.5, "solarisation": 1e-3,
        "all colour in the order drawn": 2.5, "all colour and solarisation": 4.0,
    }  # fmt: skip
    found = {}
    for name, pairs in deviation.operations(photographs).items():
        differences = [np.abs(ours - theirs).mean() for ours, theirs in pairs]
        found[name] = np.mean(differences) if differences else 0.0  # small scenes are not decoded smaller
        assert found[name] <= limits.get(name, 3.0), (name, found[name])
    assert limits.keys() <= found.keys() and len(found) == 13
    table = deviation.deviations(quick=True)
    assert [row[0] for row in table.rows] and all(row[1] <= row[2] <= row[3] for row in table.rows)  # type: ignore[operator]


def test_a_wrong_parameter_is_far_from_pillows(photographs: ImageDataset) -> None:
    """The control of the comparison above: it can fail."""
    view = View(size=64, jitter_p=1, grey_p=0, blur_p=0, solarise_p=0, flip_p=0)
    colours = draw_colours(uniforms(0, 0, np.arange(1), 0)[:, FIRST_COLOUR_SLOT:], view)
    crop = photographs.image(0).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(crop))[None]
    theirs = np.asarray(deviation.by_pillow(crop, colours), float)
    right, wrong = (
        255 * finish(pixels, c, mean=torch.zeros(3), std=torch.ones(3))[0].permute(1, 2, 0).numpy()
        for c in (colours, colours._replace(blend_3N=1.2 * colours.blend_3N))
    )
    assert np.abs(right - theirs).mean() < 2.5 < 5 < np.abs(wrong - theirs).mean()


def test_growth_names_the_step_that_is_superlinear() -> None:
    """Twice the size costs 2, 2 and 8 times: exponents 1, 1 and 3."""
    rows = growth("x", {10: 1.0, 20: 2.0, 40: 4.0, 80: 32.0}, limit=1.0)
    assert [(row[1], row[2], row[5], row[8]) for row in rows] == [
        ("10", "20", 2.0, "ok"), ("20", "40", 2.0, "ok"), ("40", "80", 8.0, "ABOVE"),
    ]  # fmt: skip
    assert rows[2][6] == pytest.approx(3)
    assert growth("x", {1: 1.0, 4: 16.0}, limit=2.0)[0][6] == pytest.approx(2)  # log 16 / log 4


def test_agreement_sees_other_features() -> None:
    """Points on a circle, two classes by halves: a common factor changes no neighbour, another order all."""
    angle = torch.linspace(0, 6.28, 100, dtype=torch.float64)
    points, labels = torch.stack([angle.cos(), angle.sin()], 1), (angle > 3.14).long()
    same = agreement("same", points, points, labels)
    assert same[2] == 100 and same[3] == 0 and same[1] > 80  # type: ignore[operator]
    assert agreement("doubled", 2 * points, points, labels)[1:3] == same[1:3]
    shuffled = agreement("shuffled", points[torch.randperm(100, generator=torch.Generator())], points, labels)
    assert shuffled[2] < 50 and shuffled[3] > 0.5  # type: ignore[operator]


def test_a_step_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in float64; a loss that is 1e-6 larger, and a reference in bfloat16, are not."""
    encoder = training_step.build(ARCH, hidden=16, output=16)
    views = training_step.make_views(12, 16, torch.device("cpu"))
    wide, narrow = torch.float64, torch.bfloat16
    same = training_step.agreement(encoder, views, wide, wide, steps=2)
    assert training_step.row("x", wide, wide, same)[-1] == "met"
    rounded = training_step.agreement(encoder, views, narrow, torch.float32, steps=1)
    assert rounded[0] > 1e-4
    plain = training_step.plain_loss
    monkeypatch.setattr(training_step, "plain_loss", lambda views: plain(views) * (1 + 1e-6))
    other = training_step.agreement(encoder, views, wide, wide, steps=1)
    assert other == pytest.approx([1e-6], rel=1e-2)
    assert training_step.row("x", wide, wide, other)[-1] == "MISSED"


def test_agreement_of_steps_is_judged_by_its_precision() -> None:
    """Every step where both compute alike, the last alone where they round differently."""
    single, half, nan = torch.float32, torch.bfloat16, float("nan")
    assert training_step.row("x", single, single, [2e-4, 1e-5])[1:] == [
        "float32, float32", 2e-4, 1e-5, "0.0001 at every step", "MISSED"
    ]  # fmt: skip
    assert training_step.row("x", single, half, [0.5, 0.019])[4:] == ["0.02 at the last", "met"]
    assert training_step.row("x", single, half, [0.0, 0.021])[-1] == "MISSED"
    assert training_step.row("x", half, half, [0.5, 0.019])[-1] == "met"
    assert training_step.row("x", single, single, [0.0, nan])[-1] == "MISSED"


def test_loaders_take_turns_and_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "IMAGES", 16)
    views = six_views(natural_images(tmp_path, 16), finish_here=True)
    assert loader.seconds_of(views, 2, taken=1) > 0
    assert not multiprocessing.active_children()
    order = []
    monkeypatch.setattr(loader, "seconds_of", lambda views, count, taken: order.append(count) or len(order))
    assert loader.in_turns(views, 2, turns=3, taken=4) == {1: [1, 4, 5], 2: [2, 3, 6]}


def test_a_bank_in_a_file_is_read_and_its_memory_judged(tmp_path: Path) -> None:
    path = f"{tmp_path / 'bank'}"
    knn.write_bank(path, 300, 8)
    step = knn.make_filed(path, 250, 10, 8)
    bank = step.args[0]  # type: ignore[attr-defined]
    assert bank.shape == (250, 8) and np.array_equal(
        bank, np.fromfile(path, np.float32).reshape(300, 8)[:250]
    )
    assert step().keys() >= {"top1_k10", "top5_k200"}  # type: ignore[attr-defined]
    assert knn.memory_row(5, 10, 8, 10**9, 10**9) == ["5 x 8", "10", "1000", "1000", "met"]
    assert knn.memory_row(5, 10, 8, 10**9 + 1, 10**9)[-1] == "MISSED"


def test_features_from_decoded_pixels_are_those_from_files(photographs: ImageDataset) -> None:
    """What a GPU is timed on, both ways: eight images, then the first two again."""
    case = features.Case(
        arch="resnet18", images=photographs, indices=np.arange(8),
        transform=EvalTransform(size=32, resize=36), batch=4, workers=0,
    )  # fmt: skip
    backbone, cpu = case.backbone(), torch.device("cpu")
    assert backbone.model is not None
    wanted = features.plain_loop(case, backbone.model, cpu)
    batches = features.decoded(case, 10)
    assert [len(b) for b in batches] == [4, 4, 2] and batches[0].dtype == torch.uint8
    by = features.extractor(case, backbone, cpu, "float32")
    for found in (
        features.plain_from_pixels(batches, backbone.model, cpu),
        features.ours_from_pixels(batches, by),
    ):
        assert torch.allclose(found, torch.cat([wanted, wanted[:2]]), atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def test_tables_are_written() -> None:
    table = Table(title="Growth", columns=("what", "ratio"), rows=[["a", 2.0], ["b", 0.12345]], note="n")
    record = as_record("t", [], [table])
    text = as_markdown(record)
    assert "| what | ratio |\n| --- | --- |\n| a | 2 |\n| b | 0.123 |" in text and "speed-up" not in text
    assert json.loads(json.dumps(record))["tables"][0]["rows"] == [["a", 2.0], ["b", 0.12345]]


@pytest.mark.commands
def test_features_and_growth_run_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert (
        measure(["features", "growth", "--quick", "--threads", str(threads), "--output", str(tmp_path)]) == 0
    )
    features, grown = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("features", "growth"))
    assert features["comparisons"] and all(c["speedup"] > 0 for c in features["comparisons"])
    for table in features["tables"]:  # float32 of ours is float32 of the plain loop
        assert table["rows"][1][2] == 100 and table["rows"][1][3] < 1e-4
    rows = grown["tables"][0]["rows"]
    for what in ("batch N", "embedding D", "training step", "bank", "gloo processes"):
        assert sum(what in row[0] for row in rows) == 1
    printed = capsys.readouterr().out
    assert (tmp_path / "growth.md").read_text() in printed
    summary = (tmp_path / "summary.md").read_text()
    assert summary in printed and ("No GPU" in summary) == (not torch.cuda.is_available())
    ratios = [f"{c['speedup']:.2f}x" for c in features["comparisons"]]
    rows = [line.split(" | ") for line in summary.splitlines() if line.startswith("| features | ")]
    assert [row[2] for row in rows][: len(ratios)] == ratios


def test_harness_measures_time_and_memory() -> None:
    times = interleave({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=5)
    assert times["short"].median_s < 0.015 <= times["long"].median_s and times["long"].repeats == 5
    assert 60 * 2**20 <= peak_extra_bytes(hold, 64, warm_up=partial(hold, 1)) <= 90 * 2**20

    def timing(s: float) -> Timing:
        return Timing(median_s=s, lower_s=s, upper_s=s, repeats=1)

    fast = Comparison(case="a", reference=timing(4), ours=timing(2), target_speedup=1.8)
    slow = Comparison(
        case="b", reference=timing(4), ours=timing(3), target_speedup=1.8,
        reference_peak_bytes=100, ours_peak_bytes=60, target_memory_share=0.5,
    )  # fmt: skip
    assert fast.met and fast.memory_share is None and math.isclose(fast.speedup, 2)
    assert not slow.met and math.isclose(slow.memory_share or 0, 0.6)
    table = as_markdown(as_record("t", [fast, slow]))
    assert "2.00x" in table and "met |" in table and "MISSED |" in table
