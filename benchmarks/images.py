"""Real images to measure on, made ones where there are none.

Real are those of BENCH_TEST_DATA (CONTRIBUTING says what lies there), else Fashion-MNIST.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.common.errors import UserError
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.data.fashion_mnist import find_or_fetch


def _archive(name: str) -> Path | None:
    folder = os.environ.get("BENCH_TEST_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.exists() else None


def _unpack(archive: Path, folder: Path, part: str, most: int) -> Path:
    """Of each folder under `part` the first `most` images."""
    taken: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            within = str(Path(member.name).parent)
            if within.startswith(part) and member.name.endswith(".jpg") and taken[within] < most:
                taken[within] += 1
                tar.extract(member, folder, filter="data")
    return folder / part


def photographs(folder: Path, count: int) -> ImageDataset:
    """JPEGs of some hundred px: COCO's where they are to be had, else `natural_images`; `name` says which."""
    archive = _archive("coco-mini.tar.gz")
    if archive is None:
        return natural_images(folder, count)
    root = _unpack(archive, folder, "coco-mini/images", count)
    files = sorted(p.name for p in root.glob("*.jpg"))
    return ImageDataset(
        name="COCO photographs", split="train", classes=["all"], labels_N=np.zeros(len(files), np.int64),
        native_size=None, root=root, files=files,
    )  # fmt: skip


def small_labelled(folder: Path, per_class: int) -> ImageDataset | None:
    """Test images of CIFAR-10, else all of Fashion-MNIST's; None where neither is to be had."""
    archive = _archive("cifar10-images.tar.gz")
    if archive is not None:
        _unpack(archive, folder, "cifar10/test", per_class)
        return open_dataset("cifar10", folder / "cifar10", "test")
    try:
        return open_dataset("fashion_mnist", find_or_fetch(), "test")
    except UserError:
        return None


def natural_images(folder: Path, count: int) -> ImageDataset:
    """JPEGs of 500 x 375 px whose spectrum falls as 1/f, as that of photographs does; written to `folder`."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None, :])
    frequency[0, 0] = 1
    for i in range(count):
        waves = np.fft.fft2(rng.standard_normal((3, 375, 500))) / frequency
        pixels = np.fft.ifft2(waves).real
        pixels = 128 + 45 * (pixels - pixels.mean()) / pixels.std()
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
        picture.save(folder / f"{i}.jpg", quality=90)
    return ImageDataset(
        name="made images of photographs' spectrum", split="train", classes=["all"],
        labels_N=np.zeros(count, np.int64), native_size=None, root=folder,
        files=[f"{i}.jpg" for i in range(count)],
    )  # fmt: skip
