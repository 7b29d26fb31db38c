"""WebDataset shards, written by the library itself, are the folder of their files: images, order, weights."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import pretrain.data.shards
from pretrain.common.errors import UserError
from pretrain.common.signals import Stopped
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.data.images import BrokenImage
from pretrain.train import train
from tests.helpers.training import differing, stop_after_epoch_one, tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTL_BENCH_DATA", str(tmp_path_factory.mktemp("cache")))


def write_shards(
    folder: ImageDataset, target: Path, prefix: str, *, seed: int, rename: Callable[[str], str] = str
) -> None:
    """All files of an image folder, 100 a shard, in the order of a shuffle."""
    target.mkdir(parents=True, exist_ok=True)
    pattern = str(target / f"{prefix}-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=100, verbose=0) as writer:
        for i in np.random.default_rng(seed).permutation(len(folder)):
            key, _, suffix = folder.key(int(i)).rpartition(".")
            image = (folder.root / folder.key(int(i))).read_bytes()
            writer.write({"__key__": rename(key), suffix: image, "cls": int(folder.labels_N[i])})


@pytest.fixture(scope="module")
def shard_dir(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards")
    for split, prefix in (("train", "train"), ("test", "val")):
        write_shards(open_dataset("imagefolder", cifar_folder, split), target, prefix, seed=3)
    return target


@pytest.mark.parametrize("split", ["train", "test"])
def test_shards_are_the_folder_of_the_same_files(split: str, cifar_folder: Path, shard_dir: Path) -> None:
    folder = open_dataset("imagefolder", cifar_folder, split)
    shards = open_dataset("webdataset", shard_dir, split)
    assert len({shards.key(i).split("/")[0] for i in range(len(shards))}) == -(-len(folder) // 100) > 1
    assert [shards.key(i).partition("/")[2] for i in range(len(shards))] == list(folder.files or ())
    assert np.array_equal(shards.labels_N, folder.labels_N) and shards.native_size == folder.native_size == 32
    assert len(shards.classes) == len(folder.classes)
    for i in range(0, len(folder), 7):
        assert np.array_equal(np.asarray(shards.image(i)), np.asarray(folder.image(i)))


def test_every_byte_is_what_the_library_reads(shard_dir: Path) -> None:
    ours = open_dataset("webdataset", shard_dir, "test")
    assert ours.shards is not None
    paths = sorted(str(p) for p in shard_dir.glob("val-*.tar"))
    theirs = {
        f"{Path(s['__url__']).name}/{s['__key__']}.jpg": (int(s["cls"]), s["jpg"])
        for s in webdataset.WebDataset(paths, shardshuffle=False)
    }
    assert {ours.key(i): (int(ours.labels_N[i]), ours.shards.read(i)) for i in range(len(ours))} == theirs


def test_training_gives_the_folders_weights_to_the_bit(
    cifar_folder: Path, shard_dir: Path, tmp_path: Path
) -> None:
    """From files without a stop; from shards stopped after four of eight steps and gone on, by workers."""
    train(tiny(cifar_folder, tmp_path / "files"), CPU)
    cut = tiny(shard_dir, tmp_path / "shards", dataset="webdataset", hook_every_epochs=1)
    with pytest.raises(Stopped):
        train(cut, CPU, hook=stop_after_epoch_one)
    train(tiny(shard_dir, tmp_path / "shards", dataset="webdataset", workers=2), CPU)
    assert differing(tmp_path / "files", tmp_path / "shards") == []
    # The control: the same images under other names come in another order.
    renamed = tmp_path / "renamed"
    folder = open_dataset("imagefolder", cifar_folder, "train")
    write_shards(folder, renamed, "train", seed=3, rename=lambda key: key[::-1])
    train(tiny(renamed, tmp_path / "other", dataset="webdataset"), CPU)
    assert differing(tmp_path / "files", tmp_path / "other")


def test_evaluation_reads_them(cifar_folder: Path, shard_dir: Path, tmp_path: Path) -> None:
    from transfer.evaluation import results
    from transfer.evaluators.knn import main

    for name, folder in (("imagefolder", cifar_folder), ("webdataset", shard_dir)):
        main([
            "--weights", "raw-pixels", "--protocol", "intl_cifar_5nn@1", "--dataset", name,
            "--data-dir", str(folder), "--output", str(tmp_path / name),
        ])  # fmt: skip
    of_files, of_shards = (results.read(tmp_path / name) for name in ("imagefolder", "webdataset"))
    assert [r.metrics for r in of_files] == [r.metrics for r in of_shards] and of_shards[0].n == 160


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (48, 48, 3), np.uint8)).save(out, "png")
    return out.getvalue()


GOOD = {
    "b.cls": b"1",
    "b.png": png(0),
    "a.png": png(1),
    "a.cls": b" 0\n",
    "a.json": b"{}",
    "__meta__/x.png": b"",
}


def test_names_follow_the_librarys_rules(tmp_path: Path) -> None:
    write_tar(tmp_path / "imagenet-train-0.tar", {**GOOD, "c.d/e.PNG": png(2), "c.d/e.cls": b"0"})
    data = open_dataset("webdataset", tmp_path, "train")
    assert [data.key(i) for i in range(3)] == [
        f"imagenet-train-0.tar/{n}" for n in ("a.png", "c.d/e.PNG", "b.png")
    ]
    assert data.labels_N.tolist() == [0, 0, 1] and data.classes == ["0", "1"]


def _wrong() -> Iterator[tuple[str, dict[str, bytes], str]]:
    yield "no class", {**GOOD, "c.png": png(2)}, r"train-0\.tar: 1 of 3 samples have no \.cls \(c\)"
    yield (
        "no image",
        {**GOOD, "c.cls": b"2", "c.txt": b""},
        r"1 of 3 samples have no image \(c\); wanted KEY\.cls and",
    )
    yield (
        "no number",
        {**GOOD, "b.cls": b"cat"},
        r"train-0\.tar: b\.cls: wanted a class as a whole number.*b'cat'",
    )
    yield "far too many classes", {**GOOD, "b.cls": b"1000000000000"}, r"b\.cls: wanted a class .* to 1048575"
    yield "a long number", {**GOOD, "b.cls": b"1" * 5000}, r"b\.cls: wanted a class"
    yield "negative", {**GOOD, "b.cls": b"-1"}, r"b\.cls: wanted a class"
    yield "two images", {**GOOD, "a.jpg": b""}, r"sample a has two images, a\.png and a\.jpg"
    yield "nothing", {"readme": b""}, r"no sample in 1 shards"


@pytest.mark.parametrize(("members", "said"), [w[1:] for w in _wrong()], ids=[w[0] for w in _wrong()])
def test_a_wrong_sample_is_named(members: dict[str, bytes], said: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=said):
        open_dataset("webdataset", tmp_path, "train")


@pytest.mark.parametrize(
    "pax", [{"size": "-512"}, {"size": str(10**15)}, {"path": "a\0b.png"}, {"comment": "x" * (2 << 20)}]
)
def test_hostile_headers_are_named(pax: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = 8, pax
        tar.addfile(info, io.BytesIO(bytes(8)))
    with pytest.raises(UserError, match=r"train-0\.tar: not a whole tar file \("):
        open_dataset("webdataset", tmp_path, "train")


def test_a_shard_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-0.tar", GOOD)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar]
    # in data, in a header, between two members, before the closing zeros, at the very start
    for length in (ends[1] - 600, ends[1] + 100, ends[1], ends[-1], 0, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"train-0\.tar: (cut off or damaged after|not a whole tar file)"):
            open_dataset("webdataset", tmp_path, "train")
    path.write_bytes(whole[: ends[1]] + b"x" * 512 + whole[ends[1] + 512 :])  # a damaged header in the middle
    with pytest.raises(UserError, match=r"damaged after 1 images"):
        open_dataset("webdataset", tmp_path, "train")


def test_folders_without_shards_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no shard val-\*\.tar or test-\*\.tar"):
        open_dataset("webdataset", tmp_path, "test")
    (tmp_path / "train-0.tar.gz").touch()
    with pytest.raises(UserError, match=r"train-0\.tar\.gz is compressed.*unpack"):
        open_dataset("webdataset", tmp_path, "train")


def test_an_unreadable_image_is_named_with_its_shard(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "train-0.tar", {**GOOD, "a.png": GOOD["a.png"][:700], "d.png": b"", "d.cls": b"0"}
    )
    data = open_dataset("webdataset", tmp_path, "train")
    for i, name in enumerate(("a", "d")):
        with pytest.raises(
            BrokenImage,
            match=rf"train-0\.tar/{name}\.png: not a readable image \([^<']+[^ ]\); rewrite the shard",
        ):
            data.image(i)
    assert data.image(2).size == (48, 48)
    path.write_bytes(path.read_bytes()[:1000])  # what is open already
    with pytest.raises(BrokenImage, match=r"train-0\.tar/b\.png: cannot be read"):
        data.image(2)
    pretrain.data.shards._opened.cache_clear()
    with pytest.raises(BrokenImage, match=r"the shard has changed since it was opened"):
        data.image(2)
    path.unlink()
    with pytest.raises(BrokenImage, match=r"b\.png: cannot be read"):
        data.image(2)


def test_headers_are_read_once_and_again_when_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = []
    scan = pretrain.data.shards._scan
    monkeypatch.setattr(
        pretrain.data.shards, "_scan", lambda path, **kw: scanned.append(path.name) or scan(path, **kw)
    )
    write_tar(tmp_path / "train-0.tar", GOOD)
    path = write_tar(tmp_path / "train-1.tar", GOOD)
    first = open_dataset("webdataset", tmp_path, "train")
    again = open_dataset("webdataset", tmp_path, "train")
    assert sorted(scanned) == ["train-0.tar", "train-1.tar"] and first.fingerprint == again.fingerprint
    assert [again.key(i) for i in range(4)] == [first.key(i) for i in range(4)] == [
        "train-0.tar/a.png", "train-1.tar/a.png", "train-0.tar/b.png", "train-1.tar/b.png"
    ]  # fmt: skip
    write_tar(path, {**GOOD, "b.cls": b"2"})
    changed = open_dataset("webdataset", tmp_path, "train")
    assert len(scanned) == 4 and changed.labels_N.tolist() == [0, 0, 1, 2]
    assert changed.fingerprint != first.fingerprint
    kept = next((pretrain.data.shards.cache_dir() / "shards").glob("*.npz"))
    for torn in (b"", kept.read_bytes()[:-40]):  # a torn file is made anew
        for file in kept.parent.glob("*.npz"):
            file.write_bytes(torn)
        assert len(open_dataset("webdataset", tmp_path, "train")) == 4
    assert len(scanned) == 8
