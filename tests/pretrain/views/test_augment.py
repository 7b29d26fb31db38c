"""Augmentation: crops against torchvision's, distributions by counts, randomness by its key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from pretrain.data.datasets import open_dataset
from pretrain.input_pipeline import InputPipeline
from pretrain.views.augment import SLOTS, View, box_of, boxes_of, resized_crop, resized_crops, uniforms
from pretrain.views.batch import moved
from pretrain.views.loader import StepBatches, Views, batches

HALF_LEVEL = 0.5 / 255
ZERO, ONE = torch.zeros(3), torch.ones(3)


def test_crops_have_torchvisions_distribution() -> None:
    """Means of area, aspect and position over many crops, ours against RandomResizedCrop.get_params."""
    view = View(size=224, min_scale=0.08, max_scale=1.0)
    n, width, height = 4000, 500, 375
    u = uniforms(0, 0, np.arange(n), 0)
    ours = np.array([box_of(row, width, height, view) for row in u], float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)], float
    )
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width -> left, top, width, height
    assert (ours[:, 0] + ours[:, 2] <= width).all() and (ours[:, 1] + ours[:, 3] <= height).all()
    for statistic in (
        lambda b: b[:, 2] * b[:, 3] / (width * height), lambda b: np.log(b[:, 2] / b[:, 3]),
        lambda b: b[:, 0] + b[:, 2] / 2, lambda b: b[:, 1] + b[:, 3] / 2,
        lambda b: (b[:, 2] * b[:, 3] / (width * height)) ** 2,
    ):  # fmt: skip
        a, b = statistic(ours), statistic(theirs)
        error = (a.var() / n + b.var() / n) ** 0.5
        assert abs(a.mean() - b.mean()) < 4 * error


def test_an_image_too_narrow_for_any_try_gets_the_centre_crop() -> None:
    view = View(size=32, min_scale=1.0, max_scale=1.0)
    assert box_of(uniforms(0, 0, np.arange(1), 0)[0], 1000, 10, view) == (493, 0, 13, 10)


def test_resized_crop_equals_torchvision_on_pillow_images(coco_mini: Path) -> None:
    image = Image.open(sorted((coco_mini / "images").iterdir())[0]).convert("RGB")
    for interpolation in ("bicubic", "bilinear"):
        view = View(size=96, interpolation=interpolation)
        box = box_of(uniforms(0, 0, np.arange(9), 0)[8], *image.size, view)
        left, top, w, h = box
        theirs = F.resized_crop(image, top, left, h, w, [96, 96], InterpolationMode(interpolation))
        ours = resized_crop(torch.from_numpy(np.array(image)), box, view).numpy()
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_random_numbers_depend_on_each_part_of_their_key() -> None:
    images = np.array([7, 8, 9])
    base = uniforms(1, 2, images, 0)
    assert base.shape == (3, SLOTS) and (base >= 0).all() and (base < 1).all()
    assert np.array_equal(uniforms(1, 2, images[1:], 0), base[1:])  # not on the other images of the batch
    for other in (uniforms(2, 2, images, 0), uniforms(1, 3, images, 0), uniforms(1, 2, images, 1)):
        assert not np.isclose(base, other).any()
    many = uniforms(0, 0, np.arange(30_000), 0)
    assert np.abs(many.mean(0) - 0.5).max() < 4 / (12 * 30_000) ** 0.5 * 1.3
    correlation = np.corrcoef(many.T) - np.eye(SLOTS)
    assert np.abs(correlation).max() < 5.5 / 30_000**0.5


def _views(folder: Path, **changes) -> Views:  # type: ignore[no-untyped-def]
    options = {"seed": 0, "mean": [0.5] * 3, "std": [0.25] * 3, "finish_here": True} | changes
    return Views(open_dataset("cifar10", folder, "train"), [View(size=32), View(size=24)], **options)


def test_workers_and_placement_change_nothing(cifar_folder: Path) -> None:
    steps = StepBatches(640, batch_global=64, rank=0, world=1, seed=0, start=2, stop=5)
    here = list(batches(_views(cifar_folder), steps, workers=0))
    there = list(batches(_views(cifar_folder), steps, workers=2))
    for a, b in zip(here, there, strict=True):
        assert [v.shape for v in a.views] == [(64, 3, 32, 32), (64, 3, 24, 24)]
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views))
    later = _views(cifar_folder, finish_here=False)
    pipeline = InputPipeline(
        views=later, batch_global=64, workers=0, where="on the device", device=torch.device("cpu"),
        resident=None, mean=later.mean, std=later.std,
    )  # fmt: skip
    for a, b in zip(here, batches(later, steps, workers=0), strict=True):
        assert b.views[0].dtype == torch.uint8
        finished = pipeline.finished(moved(b, torch.device("cpu")))
        assert all(torch.equal(x, y) for x, y in zip(a.views, finished))


def test_a_small_decoding_leaves_the_crops_nearly_alone(coco_mini: Path, tmp_path: Path) -> None:
    """JPEGs of 640 px and views of 48: decoded at 1/2 or 1/4 where every crop allows it."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "scenes").symlink_to(coco_mini / "images")
    data = open_dataset("imagefolder", tmp_path, "train")
    if data.image(0).width < 300:
        pytest.skip("scenes of 160 px leave nothing to save")
    made = {}
    for draft in (False, True):
        views = Views(
            data, [View(size=48, min_scale=0.5)], seed=0, mean=[0.0] * 3, std=[1.0] * 3,
            finish_here=False, jpeg_draft=draft,
        )  # fmt: skip
        made[draft] = views.__getitems__([(0, i) for i in range(16)]).views[0].float()
    difference = (made[True] - made[False]).abs()
    # Of 255 levels; the crops are the same, their resampling is not. Bilinear for bicubic changes 2.3 levels.
    assert 0 < difference.mean() < 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_many_crops_at_once_are_those_of_each_image(coco_mini: Path, interpolation: str) -> None:
    """Boxes the same, pixels within a level: sums of the same weights, rounded at the same two places."""
    images = [Image.open(p).convert("RGB") for p in sorted((coco_mini / "images").iterdir())[:12]]
    sizes_N2 = np.array([i.size for i in images])
    view = View(size=40, interpolation=interpolation)
    u = uniforms(3, 1, np.arange(12), 0)
    boxes = boxes_of(u, sizes_N2, view)
    assert [tuple(b) for b in boxes.tolist()] == [box_of(row, *i.size, view) for row, i in zip(u, images)]
    padded = torch.zeros((12, *sizes_N2.max(0)[::-1], 3), dtype=torch.uint8)
    for n, image in enumerate(images):
        padded[n, : image.height, : image.width] = torch.from_numpy(np.array(image))
    together = resized_crops(padded, torch.from_numpy(boxes), view).int()
    alone = torch.stack([resized_crop(p, tuple(b), view) for p, b in zip(padded, boxes.tolist())]).int()
    difference = (together - alone).abs()
    assert difference.max() <= 2 and (difference > 1).float().mean() < 1e-4  # where both passes round apart
    assert difference.float().mean() < 0.05


def test_boxes_of_many_images_are_those_of_each() -> None:
    """Of photographs, of squares, and of shapes that no crop fits."""
    n = 3000
    sizes_N2 = np.random.default_rng(0).integers(2, 700, (n, 2))
    sizes_N2[:50, 0], sizes_N2[50:100, 1] = 1000, 7
    view = View(size=32, min_scale=0.3)
    u = uniforms(0, 0, np.arange(n), 1)
    want = [box_of(row, int(w), int(h), view) for row, (w, h) in zip(u, sizes_N2)]
    assert [tuple(box) for box in boxes_of(u, sizes_N2, view).tolist()] == want
