"""Image folders: what is an image and what is not, what is said of wrong layouts, the list that is kept."""

from __future__ import annotations

import math
import os
import shutil
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.common.errors import UserError
from pretrain.data import folders
from pretrain.data.cache import cache_dir
from pretrain.data.datasets import open_dataset
from pretrain.data.folders import list_images
from pretrain.data.images import BrokenImage


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTL_BENCH_DATA", str(tmp_path_factory.mktemp("cache")))


def picture(path: Path, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (1, 2, 3)).save(path, "png")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(3):
                picture(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def said(root: Path, split: str = "train", **more: bool) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset("imagefolder", root, split, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_data_is_left_out_and_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = open_dataset("imagefolder", root, "train")
    assert "passed over" not in caplog.text
    train = root / "train"
    shutil.copytree(train / "cat", train / ".ipynb_checkpoints")  # would be a class, with images judged
    shutil.copytree(train / "cat", train / "__MACOSX")
    shutil.copytree(train / "cat", train / "cat" / "@eaDir")
    picture(train / "cat" / "._0.png")
    (train / "cat" / "Thumbs.db").write_bytes(b"x")
    for name in ("a.gif", "b.gif", "c.jfif", "without", "notes.txt"):
        (train / "dog" / name).write_bytes(b"x")
    os.mkfifo(train / "dog" / "pipe.jpg")  # opening it would wait for ever
    (train / "dog" / "loop").symlink_to("loop")
    (train / "dog" / "up").symlink_to("..")
    after = open_dataset("imagefolder", root, "train")
    assert after.classes == before.classes == ["cat", "dog"] and after.files == before.files
    for told in (
        "2 .gif",
        "1 .jfif",
        "without an extension",
        "1 .txt",
        "1 no files",
        "1 broken links",
        "1 links back",
    ):
        assert told in caplog.text, told
    assert "3 hidden or the system's" in caplog.text  # in the class folders


def test_a_link_that_leads_back_ends(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "dog" / "again").symlink_to(root / "train" / "dog")
    assert len(open_dataset("imagefolder", root, "train")) == 6
    assert "1 links back to a folder above" in caplog.text


def test_a_link_to_nothing_is_named_when_its_turn_comes(root: Path) -> None:
    (root / "train" / "dog" / "3.png").symlink_to("elsewhere.png")
    data = open_dataset("imagefolder", root, "train")
    assert len(data) == 7
    with pytest.raises(BrokenImage, match=r"dog/3\.png: the file was removed"):
        data.image(6)


def test_names_that_are_no_utf8(root: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    picture(root / "train" / "dog" / name)
    data = open_dataset("imagefolder", root, "train")
    assert data.files is not None and data.files[-1] == f"dog/{name}" and data.image(6).size == (8, 8)
    assert len(data.contents) == len(data.fingerprint) == 64
    (root / "train" / "dog" / name).write_bytes(b"x")
    with pytest.raises(BrokenImage) as caught:
        data.image(6)
    assert b"caf\\xe9.png" in str(caught.value).encode("ascii", "backslashreplace").replace(b"udc", b"x")


def test_an_unreadable_folder_is_named(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (root / "train" / "dog").chmod(0)
    try:
        assert f"{root / 'train' / 'dog'}: cannot be read" in said(root)
    finally:
        (root / "train" / "dog").chmod(0o700)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda r: (r / "train").rename(r / "Train"), r"Did you mean Train/\? Rename it, or: ln -s Train"),
        (lambda r: (r / "train").rename(r / "training_set"), r"Did you mean training_set/\?"),
        (
            lambda r: shutil.move(r / "train", r / "ILSVRC" / "Data" / "CLS-LOC" / "train"),
            "Did you mean --data-dir .*/ILSVRC/Data/CLS-LOC?",
        ),
        (
            lambda r: [
                (r / "train").rename(r / "x"), shutil.rmtree(r / "val"), (r / "x/cat").rename(r / "cat")
            ],
            "It has class folders .cat/ ....*move those to train on",
        ),
        (
            lambda r: [shutil.rmtree(r / "train"), tarfile.open(r / "ILSVRC2012_img_train.tar", "w").close()],
            r"ILSVRC2012_img_train\.tar is an archive: unpack it",
        ),
        (
            lambda r: [
                shutil.rmtree(r / "train"), (r / "train").mkdir(),
                [tarfile.open(r / "train" / f"n0144076{i}.tar", "w").close() for i in range(3)],
            ],
            r"3 archives, one a class \(n01440760\.tar \.\.\.\); unpack each .*for f in \*\.tar",
        ),
        (
            lambda r: shutil.move(r / "train", r / "x") and shutil.move(r / "x", r / "train" / "images"),
            r"its only folder, images/, .*2 folders \(cat, dog .*move them up: mv .*/train/images/\*",
        ),
        (
            lambda r: [shutil.rmtree(r / "train" / "dog"), (r / "train/dog").mkdir(),
                       (r / "train/dog/a.gif").write_bytes(b"x")],
            r"dog: no image in this class folder; it holds 1 \.gif; add images",
        ),
    ],
    ids=["Train", "training_set", "Kaggle", "no split", "archive", "class tars", "nested", "gif alone"],
)  # fmt: skip
def test_a_wrong_layout_is_told_with_the_way_on(root: Path, change, wanted: str) -> None:
    import re

    (root / "train").mkdir(exist_ok=True)
    if "CLS-LOC" in wanted:
        (root / "ILSVRC" / "Data" / "CLS-LOC").mkdir(parents=True)
    change(root)
    assert re.search(wanted, said(root)), said(root)


def test_valid_is_no_val(root: Path) -> None:
    (root / "val").rename(root / "valid")
    assert "Did you mean valid/?" in said(root, "test")
    assert f"Did you mean --data-dir {root}?" in said(root / "valid", "test")


def test_files_in_place_of_the_folder(tmp_path: Path) -> None:
    for name, wanted in (
        ("a.zip", "unpack it"),
        ("a.h5", "write them out as files"),
        ("a", "a file, no folder"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w"):
            assert wanted in said(tmp_path / name)


def test_pretraining_takes_images_without_classes(root: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for i in range(4):
        picture(flat / "train" / f"{i}.png")
    assert "takes them as they are" in said(flat)
    for folder in (flat, flat / "train"):
        data = open_dataset("imagefolder", folder, "train", labelled=False)
        assert data.classes == ["all"] and len(data) == 4 and data.image(3).size == (8, 8)
    nested = root / "train" / "images"
    nested.mkdir()
    for name in ("cat", "dog"):
        (root / "train" / name).rename(nested / name)
    assert len(open_dataset("imagefolder", root, "train", labelled=False)) == 6
    (root / "train" / "images").rename(root / "images")
    (root / "train").rmdir()
    assert "has no train/" in said(root, labelled=False)


def _age(folder: Path) -> None:
    """Let all folders be old enough to be trusted."""
    for path, _, _ in os.walk(folder):
        os.utime(path, ns=(10**18, 10**18))


def test_the_list_of_a_large_set_is_kept_as_long_as_it_is_true(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "LARGE", 5)  # of 6 files
    monkeypatch.setattr(folders, "SAMPLE", 100)  # all of them: what a sample finds is chance
    scans: list[Path] = []
    scan = folders._scan
    monkeypatch.setattr(
        folders, "_scan", lambda folder, classes: scans.append(folder) or scan(folder, classes)
    )
    train = root / "train"

    def count(scanned: int, images: int) -> None:
        data = open_dataset("imagefolder", root, "train")
        wanted = scan(train, data.classes)
        assert (len(scans), len(data)) == (scanned, images)
        assert data.files == wanted.files and np.array_equal(data.stats_N2, wanted.stats_N2)
        assert np.array_equal(data.labels_N, wanted.labels_N)

    count(1, 6)
    count(2, 6)  # its folders were made a moment ago, and may change within the clock's tick
    _age(train)
    count(3, 6)
    count(3, 6)
    kept = next((cache_dir() / "folders").glob("*.npz"))
    whole = kept.read_bytes()
    for damage in (whole[:-30], whole[:200] + bytes(20) + whole[220:], b""):
        kept.write_bytes(damage)
        seen = len(scans)
        count(seen + 1, 6)
        count(seen + 1, 6)
    seen = len(scans)
    picture(train / "dog" / "deep" / "7.png")
    count(seen + 1, 7)
    _age(train)
    count(seen + 2, 7)
    picture(train / "dog" / "deep" / "8.png")  # changes the time of the deep folder alone
    count(seen + 3, 8)
    _age(train)
    count(seen + 4, 8)
    picture(train / "dog" / "0.png", side=9)  # in place: no folder changes
    count(seen + 5, 8)
    count(seen + 5, 8)
    (train / "dog" / "0.png").unlink()
    count(seen + 6, 7)


@pytest.mark.parametrize("waits", [False, True])
def test_threads_read_the_folders_of_a_disk_that_is_waited_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    classes = [f"c{i}" for i in range(6)]
    for i, name in enumerate(classes):
        picture(root / "more" / name / "b.png", side=i + 1)
        picture(root / "more" / name / "a.png")
    walk, readers = folders._walk, []

    def slow(*words: Path) -> folders._Part:
        readers.append(threading.current_thread())
        if waits:
            time.sleep(0.1)
        return walk(*words)

    monkeypatch.setattr(folders, "_walk", slow)
    if not waits:
        monkeypatch.setattr(folders, "WAITING", math.inf)  # the tests' machine may be busy
    listing = list_images(root / "more", classes)
    assert listing.files == [f"{name}/{x}.png" for name in classes for x in "ab"]
    assert listing.labels_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert listing.stats_N2.tolist() == folders.stats_of(root / "more", listing.files).tolist()
    assert [t is threading.main_thread() for t in readers] == [True] + 5 * [not waits]


def test_ranks_of_one_launch_look_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "12345"}.items():
        monkeypatch.setenv(name, value)
    _age(root / "train")
    first = list_images(root / "train", ["cat", "dog"])
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_scan", lambda *_: pytest.fail("listed again"))
        patch.setattr(folders, "stats_of", lambda *_: pytest.fail("looked again"))
        again = list_images(root / "train", ["cat", "dog"])
    assert again.files == first.files and np.array_equal(again.stats_N2, first.stats_N2)
    monkeypatch.setenv("MASTER_PORT", "12346")  # another launch looks anew
    picture(root / "train" / "cat" / "0.png", side=9)
    assert not np.array_equal(list_images(root / "train", ["cat", "dog"]).stats_N2, first.stats_N2)
