"""Two parts of a data set: swapped, the same, of one class; what is told and what is refused."""

from __future__ import annotations

import os
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.common.errors import UserError
from pretrain.data.datasets import ImageDataset, open_dataset
from transfer.evaluation import results
from transfer.evaluation.split_checks import also_trained_on, check_pair, doubts_about
from transfer.evaluators.knn import main


@pytest.fixture
def parts(cifar_folder: Path) -> tuple[ImageDataset, ImageDataset]:
    train, test = (open_dataset("imagefolder", cifar_folder, split) for split in ("train", "test"))
    return train, test


def test_sound_parts_are_not_doubted(parts: tuple[ImageDataset, ImageDataset]) -> None:
    check_pair(*parts)
    assert doubts_about(*parts) == [] and also_trained_on(*parts) == 0


def test_training_images_are_no_test_images(parts: tuple[ImageDataset, ImageDataset], tmp_path: Path) -> None:
    train, _ = parts
    with pytest.raises(UserError, match="its images are training images too"):
        doubts_about(train, replace(train, split="test"))  # the same folder
    shutil.copytree(train.root, tmp_path / "test")
    for i, file in enumerate(sorted((tmp_path / "test").rglob("*.jpg"))):
        file.rename(file.with_name(f"x{i}.jpg"))
    renamed = open_dataset("imagefolder", tmp_path, "test")
    with pytest.raises(UserError, match="training images too"):
        doubts_about(train, renamed)  # the same files under other names
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    one = replace(train, files=None, pixels=pixels, labels_N=np.arange(40) % 10)
    with pytest.raises(UserError, match="training images too"):
        doubts_about(one, replace(one, pixels=pixels[::-1].copy()))
    assert also_trained_on(one, replace(one, pixels=255 - pixels)) == 0


def test_some_training_images_among_the_test_images_are_told(
    parts: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    train, test = parts
    mixed = tmp_path / "test"
    shutil.copytree(test.root, mixed)
    for name in train.classes:  # 4 of the 16 of each class are overwritten by training images
        theirs = sorted((train.root / name).iterdir())
        for source, target in zip(theirs, sorted((mixed / name).iterdir())[:4]):
            shutil.copy(source, target)
    assert doubts_about(train, open_dataset("imagefolder", tmp_path, "test")) == [
        "25 % of the test images looked at are training images too"
    ]


def test_more_test_than_training_images_are_told(parts: tuple[ImageDataset, ImageDataset]) -> None:
    train, test = parts
    assert doubts_about(test, train) == ["more test images (640) than training images (160): swapped?"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagefolder", "pets"])
def test_the_counts_of_a_known_set_show_a_swap(name: str) -> None:
    def part(split: str, numbers: range) -> ImageDataset:
        pixels = np.array(numbers, np.uint32).view(np.uint8).reshape(len(numbers), 1, 4)
        return ImageDataset(
            name=name, split=split, classes=["a", "b"], labels_N=np.arange(len(numbers)) % 2, native_size=32,
            root=Path(split), pixels=pixels,
        )  # fmt: skip

    train, test = part("train", range(10_000)), part("test", range(10_000, 60_000))
    if name == "pets":  # which has other counts either way: no swap, and open_dataset tells of it
        assert doubts_about(train, test) == []
        return
    with pytest.raises(UserError, match=r"10,000 images and .* 50,000: train and test of cifar10+ are"):
        doubts_about(train, test)


def test_one_class_is_refused(parts: tuple[ImageDataset, ImageDataset]) -> None:
    one = [replace(p, classes=["a"], labels_N=np.zeros(len(p), np.int64)) for p in parts]
    with pytest.raises(UserError, match=r"one class only \(a\), so that every answer is right"):
        check_pair(*one)


def test_names_in_two_unicode_forms_are_told_as_such(cifar_folder: Path, tmp_path: Path) -> None:
    """The folders of macOS come decomposed (NFD), those of most other systems composed (NFC)."""
    for split, form in (("train", "NFC"), ("val", "NFD")):
        theirs = sorted((cifar_folder / {"val": "test"}.get(split, split)).iterdir())
        for name, source in zip(("café", "naïf", "plain"), theirs):
            shutil.copytree(source, tmp_path / split / unicodedata.normalize(form, name))
    assert len(os.listdir(tmp_path / "val")) == 3
    parts = [open_dataset("imagefolder", tmp_path, split) for split in ("train", "test")]
    with pytest.raises(UserError, match=r"in another Unicode form, such as 'caf.*NFC.*NFD.*rename"):
        check_pair(*parts)
    (tmp_path / "val" / "plain").rename(tmp_path / "val" / "other")  # more than the form differs
    parts[1] = open_dataset("imagefolder", tmp_path, "test")
    with pytest.raises(UserError, match=r"3 only in train .* 3 only in the test part"):
        check_pair(*parts)


def test_the_result_carries_the_doubt(cifar_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for mine, theirs in (("train", "test"), ("val", "train")):
        shutil.copytree(cifar_folder / theirs, data / mine)
    words = ["--weights", "raw-pixels", "--dataset", "imagefolder", "--data-dir", str(data)]
    assert main([*words, "--protocol", "solo_knn@2", "--output", str(tmp_path / "o")]) == 0
    (found,) = results.read(tmp_path / "o")
    assert found.settings["folder"] == "data"
    assert found.warnings == ["more test images (640) than training images (160): swapped?"]
