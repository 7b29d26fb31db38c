"""Scenes: deterministic, disjoint, masks that are what is visible, complete or made anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_codec
import pytest
from PIL import Image

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from pretrain.data.datasets import open_dataset
from transfer.detection import scenes


@pytest.fixture(scope="module")
def composed(fashion_mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "out"
    return scenes.compose(fashion_mnist_dir, folder, train=12, test=6, size=96, seed=3)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(
        p for p in folder.rglob("*") if p.suffix in (".jpg", ".json") and p.name != "progress.json"
    )
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_arguments_give_the_same_files(
    composed: Path, fashion_mnist_dir: Path, tmp_path: Path
) -> None:
    again = scenes.compose(fashion_mnist_dir, tmp_path / "b", train=12, test=6, size=96, seed=3)
    assert digest(again) == digest(composed)
    other = scenes.compose(fashion_mnist_dir, tmp_path / "c", train=12, test=6, size=96, seed=4)
    assert digest(other)["train/00001.jpg"] != digest(composed)["train/00001.jpg"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_annotations_agree_with_each_other_and_the_images(composed: Path, split: str) -> None:
    content = json.loads((composed / f"{split}.json").read_text())
    assert len(content["images"]) == {"train": 12, "test": 6}[split]
    assert [c["name"] for c in content["categories"]][8] == "Bag"
    for image in content["images"]:
        with Image.open(composed / split / image["file_name"]) as picture:
            assert picture.size == (96, 96) == (image["width"], image["height"])
        masks = []
        for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            mask = mask_codec.decode(a["segmentation"]).astype(bool)
            ys, xs = np.nonzero(mask)
            assert a["area"] == mask.sum() >= scenes.LEAST_PIXELS
            assert a["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            masks.append(mask)
        assert 1 <= len(masks) <= scenes.MOST_OBJECTS
        assert np.sum(masks, axis=0).max() == 1  # every pixel belongs to the one object seen there


def test_splits_share_no_source_image() -> None:
    pools = scenes._disjoint_pools(1000, 12, 6, seed=0)
    assert not set(pools["train"]) & set(pools["test"])
    assert len(pools["train"]) == 667 and len(pools["test"]) == 333  # 12 : 6


def test_occluded_objects_stay_visible_and_leave_the_hidden_part_out(fashion_mnist_dir: Path) -> None:
    data = open_dataset("fashion_mnist", fashion_mnist_dir, "test")
    hidden = 0
    for number in range(40):
        rng = np.random.default_rng(number)
        sources = iter(rng.integers(0, len(data), 6).tolist())
        _, objects = scenes.draw_scene(data, sources, 64, rng, cut_out="fashion_mnist")
        for _, mask in objects[:-1]:
            filled = mask.sum() / max(1, (mask.any(0).sum() * mask.any(1).sum()))
            hidden += filled < 0.3
        assert all(mask.sum() >= scenes.LEAST_PIXELS for _, mask in objects)
    assert hidden > 0  # on 64 px some objects do cover others


def test_a_cut_off_folder_is_made_anew_and_a_foreign_one_refused(
    composed: Path, fashion_mnist_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "scenes"
    arguments = {"train": 12, "test": 6, "size": 96, "seed": 3}
    scenes.compose(fashion_mnist_dir, folder, **arguments)  # type: ignore[arg-type]
    marker = json.loads((folder / scenes.MARKER).read_text())
    (folder / scenes.MARKER).write_text(json.dumps({**marker, "complete": False}))
    (folder / "test.json").unlink()
    (folder / "train" / "00003.jpg").unlink()
    scenes.compose(fashion_mnist_dir, folder, **arguments)  # type: ignore[arg-type]
    assert digest(folder) == digest(composed)

    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        scenes.compose(fashion_mnist_dir, foreign, **arguments)  # type: ignore[arg-type]
    assert (foreign / "holiday.txt").read_text() == "mine"


def test_whole_images_become_rectangles(cifar_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    arguments = ["--data-dir", str(cifar_folder), "--output", str(out), "--source", "imagefolder"]
    assert run(scenes.main, [*arguments, "--train", "2", "--test", "2", "--size", "64"]) == 0
    first = json.loads((out / "train.json").read_text())["annotations"][-1]
    assert first["area"] == first["bbox"][2] * first["bbox"][3]  # the last object laid is never hidden


def test_wrong_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "o")]
    assert run(scenes.main, [*here, "--train", "0", "--test", "0"]) == 2
    assert "at least one scene" in capsys.readouterr().err
    assert run(scenes.main, ["--data-dir", str(tmp_path / "none"), "--output", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()
