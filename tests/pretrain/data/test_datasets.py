"""Data sets: layouts, conversions, fingerprints, and what a user gets to read when a folder is wrong."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.common.errors import UserError
from pretrain.data.datasets import DATASETS, open_dataset
from pretrain.data.fashion_mnist import FILES, find_or_fetch
from pretrain.data.images import BrokenImage, read_image
from pretrain.views.loader import StepBatches


def test_image_folder_has_every_file_once(cifar_folder: Path) -> None:
    for split in ("train", "test"):
        data = open_dataset("imagefolder", cifar_folder, split)
        on_disk = {str(p.relative_to(cifar_folder / split)) for p in (cifar_folder / split).rglob("*.jpg")}
        assert {data.key(i) for i in range(len(data))} == on_disk and len(data) == len(on_disk)
        assert data.classes == sorted(p.name for p in (cifar_folder / split).iterdir())
        for i in (0, len(data) - 1):
            assert data.key(i).split("/")[0] == data.classes[data.labels_N[i]]
    assert data.native_size == 32  # all images are small, square and equal


def test_cifar10_accepts_an_image_folder_and_refuses_a_damaged_download(
    cifar_folder: Path, tmp_path: Path
) -> None:
    assert open_dataset("cifar10", cifar_folder, "test").native_size == 32
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half")
    with pytest.raises(UserError, match="incomplete or damaged"):
        open_dataset("cifar10", tmp_path, "train")


def test_fashion_mnist_is_whole_in_each_layout(fashion_mnist_dir: Path, tmp_path: Path) -> None:
    train = open_dataset("fashion_mnist", fashion_mnist_dir, "train")
    assert len(train) == 60_000 and np.bincount(train.labels_N).tolist() == [6000] * 10
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST" / "raw").symlink_to(fashion_mnist_dir)
    test = open_dataset("fashion_mnist", tmp_path, "test")
    assert len(test) == 10_000 and test.image(0).size == (28, 28) and test.image(0).mode == "RGB"
    assert train.fingerprint != test.fingerprint
    assert find_or_fetch().is_dir()


def test_a_cut_off_idx_file_is_named(fashion_mnist_dir: Path, tmp_path: Path) -> None:
    for file in FILES:
        shutil.copy(fashion_mnist_dir / file, tmp_path / file)
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    images.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz.*cut off"):
        open_dataset("fashion_mnist", tmp_path, "test")
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-5], 1))
    with pytest.raises(UserError, match="cut off, holds 7839995 of 7840000"):
        open_dataset("fashion_mnist", tmp_path, "test")


def test_the_fingerprint_follows_the_files(cifar_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cifar_folder / "test", tmp_path / "test")
    before = open_dataset("cifar10", tmp_path, "test")
    assert open_dataset("cifar10", tmp_path, "test").fingerprint == before.fingerprint
    file = before.root / before.key(5)
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_dataset("cifar10", tmp_path, "test").fingerprint != before.fingerprint


def test_images_become_rgb(tmp_path: Path) -> None:
    deep = np.array([[0, 256 * 7, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 7, 255]
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "cmyk.jpg"))[0, 0].astype(int) - [254, 0, 0]).max() <= 3
    red.convert("P").save(tmp_path / "palette.png")
    assert np.asarray(read_image(tmp_path / "palette.png"))[0, 0].tolist() == [255, 0, 0]
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "alpha.png")
    assert np.asarray(read_image(tmp_path / "alpha.png"))[0, 0].tolist() == [1, 2, 3]


def test_sixteen_bits_keep_the_upper_eight_and_more_are_refused(tmp_path: Path) -> None:
    deep = np.array([[0, 256 * 7, 65535]], np.uint16)
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    for name in ("deep.pgm", "deep.tif"):
        assert np.asarray(read_image(tmp_path / name))[0, :, 0].tolist() == [0, 7, 255], name
    with Image.open(tmp_path / "deep.pgm") as image:
        assert image.mode == "I"  # as older versions of PIL open a PNG
    Image.fromarray(np.full((2, 2), 200, np.int32)).save(tmp_path / "whole.tif")
    Image.fromarray(np.full((2, 2), 0.7, np.float32)).save(tmp_path / "float.tif")
    for name, kind in (("whole.tif", "32-bit or signed integers"), ("float.tif", "floats")):
        with pytest.raises(BrokenImage, match=rf"{name}: .*its pixels are {kind}.*wanted 8 or 16 bits"):
            read_image(tmp_path / name)


def test_a_broken_image_is_named(cifar_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cifar_folder / "test", tmp_path / "test")
    data = open_dataset("cifar10", tmp_path, "test")
    file = data.root / data.key(3)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(BrokenImage, match=str(file)):
        data.image(3)
    file.unlink()
    with pytest.raises(BrokenImage, match="was removed after the folder was listed"):
        data.image(3)


def test_a_name_stands_for_its_classes(cifar_folder: Path) -> None:
    assert len(open_dataset("imagefolder", cifar_folder, "train").classes) == 10
    for name, count in (("imagenet", 1000), ("cifar100", 100)):
        with pytest.raises(UserError, match=f"has 10 classes, {name} has {count}: is a class"):
            open_dataset(name, cifar_folder, "train")


def test_wrong_folders_are_explained(cifar_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_dataset("imagenet", tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="unknown data set 'imagnet'; did you mean imagenet"):
        open_dataset("imagnet", tmp_path, "train")
    with pytest.raises(UserError, match=f"unknown data set 'mnist'.*{next(iter(DATASETS))}"):
        open_dataset("mnist", tmp_path, "train")
    with pytest.raises(UserError, match="has no train/"):
        open_dataset("imagenet", tmp_path, "train")
    with pytest.raises(UserError, match="holds no Fashion-MNIST"):
        open_dataset("fashion_mnist", tmp_path, "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="is empty"):
        open_dataset("imagenet", tmp_path, "test")
    some = next((cifar_folder / "test").rglob("*.jpg"))
    shutil.copy(some, tmp_path / "val" / "ILSVRC2012_val_00000001.jpg")
    with pytest.raises(UserError, match=r"no class folders.*valprep"):
        open_dataset("imagenet", tmp_path, "test")
    (tmp_path / "val" / "n01440764").mkdir()
    with pytest.raises(UserError, match="n01440764: no image in this class folder"):
        open_dataset("imagenet", tmp_path, "test")
    with pytest.raises(UserError, match="100 of the 100 class folders"):
        open_dataset("imagenet100", tmp_path, "test")


def test_imagenet100_takes_its_classes_out_of_all_of_imagenet(cifar_folder: Path, tmp_path: Path) -> None:
    import pretrain.data.datasets

    wanted = (Path(pretrain.data.datasets.__file__).parent / "imagenet100.txt").read_text().split()
    some = next((cifar_folder / "test").rglob("*.jpg"))
    for name in [*wanted, "n00000000"]:
        (tmp_path / "train" / name).mkdir(parents=True)
        shutil.copy(some, tmp_path / "train" / name / f"{name}_1.JPEG")
    data = open_dataset("imagenet100", tmp_path, "train")
    assert len(data) == 100 and data.classes == wanted and "n00000000/n00000000_1.JPEG" not in data.files


def _steps(world: int, rank: int, start: int = 0, stop: int = 12) -> list[list[tuple[int, int]]]:
    return list(StepBatches(50, batch_global=12, rank=rank, world=world, seed=3, start=start, stop=stop))


def test_an_epoch_has_each_image_at_most_once_and_epochs_differ() -> None:
    steps = _steps(1, 0)  # 50 // 12 = 4 steps an epoch, 3 epochs
    for epoch in range(3):
        pairs = [pair for step in steps[4 * epoch : 4 * epoch + 4] for pair in step]
        assert {e for e, _ in pairs} == {epoch} and len({i for _, i in pairs}) == 48
    assert {i for _, i in steps[0]} != {i for _, i in steps[4]}


def test_ranks_share_a_step_and_a_later_start_goes_on_alike() -> None:
    whole = _steps(1, 0)
    shares = [_steps(4, r) for r in range(4)]
    for step, pairs in enumerate(whole):
        joined = [pair for share in shares for pair in share[step]]
        assert sorted(joined) == sorted(pairs) and len(set(joined)) == 12
    assert _steps(1, 0, start=5) == whole[5:]


def test_a_part_of_a_named_set_says_so(cifar_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = open_dataset("cifar10", cifar_folder, "test")
    assert part.notes == (f"{len(part)} of 10,000 test images",)
    assert "figures are not those of the whole set" in caplog.text
    assert open_dataset("imagefolder", cifar_folder, "test").notes == ()


def test_contents_are_told_apart_and_a_copy_is_not(cifar_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(cifar_folder, tmp_path / "copy")
    shutil.copytree(cifar_folder, tmp_path / "other")
    file = next((tmp_path / "other" / "test").rglob("*.jpg"))
    file.rename(file.with_name("x.jpg"))
    folders = (cifar_folder, tmp_path / "copy", tmp_path / "other")
    own, copy, other = (open_dataset("imagefolder", folder, "test").contents for folder in folders)
    assert own == copy != other
