"""Shares of the labels: SimCLR's lists checked name by name, class-balanced draws elsewhere."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from pretrain.common.errors import UserError
from pretrain.data.datasets import CLASS_COUNTS, ImageDataset, open_dataset
from transfer.evaluators import subsets
from transfer.evaluators.subsets import PublishedList, balanced_draw, choose_subset, fetch_list, read_list


@pytest.fixture
def data(cifar_folder: Path) -> ImageDataset:
    return open_dataset("cifar10", cifar_folder, "train")


@pytest.fixture(autouse=True)
def imagenet_of_four_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASS_COUNTS, "imagenet", 4)


def _imagenet(folder: Path, classes: int = 4, each: int = 30) -> ImageDataset:
    """Empty files in ImageNet's naming: train/n00000002/n00000002_17.JPEG."""
    for c in range(classes):
        (folder / "train" / f"n{c:08d}").mkdir(parents=True)
        for i in range(each):
            (folder / "train" / f"n{c:08d}" / f"n{c:08d}_{i}.JPEG").touch()
    return open_dataset("imagenet", folder, "train")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ImageDataset, Path]:
    """A small ImageNet with a "published" 10 % list of 12 names, in no order, and its known hash."""
    data = _imagenet(tmp_path / "imagenet")
    names = [f"n{c:08d}_{i}.JPEG" for i in (7, 3, 19) for c in (2, 0, 3, 1)]
    text = "\n".join(names)
    known = PublishedList(names=12, sha256=hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(subsets, "PUBLISHED", {10: known, 1: PublishedList(names=4, sha256="0" * 64)})
    path = tmp_path / "10percent.txt"
    path.write_text(text + "\n")
    return data, path


def test_a_draw_is_balanced_nested_and_its_seeds_differ(data: ImageDataset) -> None:
    ten, one = balanced_draw(data, 10, 0), balanced_draw(data, 1, 0)
    each = round(len(data) / 100)  # 10 % of all, over 10 classes
    assert np.bincount(data.labels_N[ten]).tolist() == [each] * 10
    assert np.bincount(data.labels_N[one]).tolist() == [1] * 10
    assert set(one) <= set(ten)
    assert (np.diff(ten) > 0).all()
    np.testing.assert_array_equal(ten, balanced_draw(data, 10, 0))
    assert set(ten) != set(balanced_draw(data, 10, 1))


def test_a_class_with_too_few_images(tmp_path: Path) -> None:
    _imagenet(tmp_path)
    for i in range(29):
        (tmp_path / "train" / "n00000001" / f"n00000001_{i}.JPEG").unlink()
    data = open_dataset("imagefolder", tmp_path, "train")
    with pytest.raises(UserError, match="'n00000001' has 1"):
        balanced_draw(data, 10, 0)


def test_names_say_which_set_it_was(data: ImageDataset, tmp_path: Path) -> None:
    choose = functools.partial(choose_subset, data, folder=tmp_path)
    whole, drawn = choose(100, lists=None, seed=0), choose(10, lists=None, seed=3)
    assert (whole.name, len(whole.indices)) == ("all", len(data))
    assert drawn.name == "class-balanced draw, seed 3"
    own = tmp_path / "mine.txt"
    own.write_text("\n".join(data.key(int(i)) for i in drawn.indices[::-1]) + "\n\n")
    listed = choose(10, lists=str(own), seed=0)
    assert listed.name == "own list mine.txt"
    assert listed.sha256 == drawn.sha256 != whole.sha256  # the same set, whatever its order
    np.testing.assert_array_equal(listed.indices, drawn.indices)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_simclr_s_list_is_taken_with_or_without_a_last_newline(
    published: tuple[ImageDataset, Path], ending: str
) -> None:
    data, path = published
    names = path.read_text().split()
    path.write_bytes(((ending or "\n").join(names) + ending).encode())
    subset = choose_subset(data, 10, lists=str(path), seed=0, folder=path.parent)
    assert subset.name == "SimCLR 10 % list"
    assert sorted(data.key(int(i)).rpartition("/")[2] for i in subset.indices) == sorted(names)


def _without_one(names: list[str]) -> list[str]:
    return names[1:]


def _another(names: list[str]) -> list[str]:
    return ["n00000000_25.JPEG", *names[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_one, "11 names; SimCLR's 10 % list has 12"),
        (_another, "not SimCLR's 10 % list"),
        (sorted, "in its published order"),
        (lambda names: names[:4], "the size of the 1 % list; --label-percent is 10"),
        (lambda names: [*names, names[2]], "comes twice"),
        (lambda names: [], "holds no name"),
    ],
)
def test_any_other_list_is_refused_on_imagenet(
    published: tuple[ImageDataset, Path], change, message: str
) -> None:
    data, path = published
    path.write_text("\n".join(change(path.read_text().split())))
    with pytest.raises(UserError, match=message):
        choose_subset(data, 10, lists=str(path), seed=0, folder=path.parent)


def test_every_name_of_a_list_must_exist(published: tuple[ImageDataset, Path], tmp_path: Path) -> None:
    _, path = published
    (tmp_path / "imagenet" / "train" / "n00000002" / "n00000002_7.JPEG").unlink()
    data = open_dataset("imagenet", tmp_path / "imagenet", "train")
    with pytest.raises(UserError, match=r"1 of 12 names have no image .*n00000002_7\.JPEG"):
        choose_subset(data, 10, lists=str(path), seed=0, folder=tmp_path)


def test_imagenet_without_a_list_is_told_where_it_is(published: tuple[ImageDataset, Path]) -> None:
    data, path = published
    with pytest.raises(UserError, match=r"imagenet_subsets/10percent\.txt"):
        choose_subset(data, 10, lists=None, seed=0, folder=path.parent)


def test_bad_lists_elsewhere(data: ImageDataset, tmp_path: Path) -> None:
    choose = functools.partial(choose_subset, data, seed=0, folder=tmp_path)
    with pytest.raises(UserError, match="none that is published"):
        choose(10, lists="download")
    with pytest.raises(UserError, match="not a readable text file"):
        choose(10, lists=str(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="with 100 every image is used"):
        choose(100, lists="x")
    part = tmp_path / "part.txt"
    part.write_text("\n".join(data.key(i) for i in range(len(data)) if data.labels_N[i] != 4))
    with pytest.raises(UserError, match=f"no image of class '{data.classes[4]}'"):
        choose(10, lists=str(part))
    part.write_text(f"{data.key(0)}\n{data.key(0).rpartition('/')[2]}\n")
    with pytest.raises(UserError, match=r"the same image|images are called"):
        choose(10, lists=str(part))


def test_the_images_are_looked_at_before_the_network(
    published: tuple[ImageDataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsets, "fetch_list", lambda *_: pytest.fail("went to the network"))
    few = _imagenet(tmp_path / "few", each=2)
    with pytest.raises(
        UserError, match=r"few/train: 8 images, and SimCLR's 10 % list names 12; is --data-dir"
    ):
        choose_subset(few, 10, lists="download", seed=0, folder=tmp_path)


def test_a_list_is_fetched_once_and_checked(published: tuple[ImageDataset, Path], tmp_path: Path) -> None:
    _, path = published
    good = path.read_text()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/{{percent}}percent.txt"
            path.write_text(good.replace("n0", "m0"))
            with pytest.raises(UserError, match="not SimCLR's"):
                fetch_list(10, tmp_path / "cache", url)
            assert not (tmp_path / "cache" / "10percent.txt").exists()
            path.write_text(good)
            fetched = fetch_list(10, tmp_path / "cache", url)
            assert read_list(fetched) == good.split()
            with pytest.raises(UserError, match="could not be fetched"):
                fetch_list(1, tmp_path / "cache", url)
        finally:
            server.shutdown()
            thread.join()
    assert fetch_list(10, tmp_path / "cache", url) == fetched  # without the server


def test_what_is_known_of_the_published_lists() -> None:
    assert {p: k.names for p, k in subsets.PUBLISHED.items()} == {1: 12_811, 10: 128_116}
    assert all(len(k.sha256) == 64 for k in subsets.PUBLISHED.values())
