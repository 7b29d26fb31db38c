"""Data sets by name: labelled RGB images, one at a time.

Conversions: every image becomes 8-bit RGB as `PIL.Image.convert("RGB")` makes it (an alpha channel is
dropped, CMYK and palettes are converted, EXIF rotation is not applied, as in the published pipelines); 16-bit
grey keeps its upper eight bits, where PIL (and torchvision with it) makes all above 255 white. Images of
32-bit integers or floats, of which nobody can tell what is white, are refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from pretrain.common.errors import UserError
from pretrain.data.shards import Shards, find_shards, open_shards
from pretrain.data.transfer_sets import SETS, read_transfer_set

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "test", "validation")}
SIXTEEN_BIT_AS_I = ("PNG", "PPM")  # formats that have 16 bits at most, which PIL may open as mode I
SMALL_SIDE = 64  # px: an image set whose images all are at most this large is evaluated without cropping
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

SizeRule = Callable[[tuple[int, int]], tuple[int, int]]


class BrokenImage(UserError):
    """An image file that cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Images with labels: files (`files`), members of tar files (`shards`) or uint8 arrays in memory
    (`pixels`: N x H x W [x 3])."""

    name: str
    split: str
    classes: list[str]
    labels_N: np.ndarray
    native_size: int | None
    root: Path
    files: Sequence[str] | None = None
    shards: Shards | None = None
    pixels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    """Which of a set's several splits this is, and what it lacks: for results."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def key(self, i: int) -> str:
        """The name under `root` of the file, or of shard and member; the index where there is neither."""
        if self.shards is not None:
            return self.shards.key(i)
        return self.files[i] if self.files is not None else str(i)

    def image(self, i: int, *, least_size: SizeRule | None = None) -> Image.Image:
        """Image `i` as 8-bit RGB, see `read_image`. Raises BrokenImage naming the file."""
        if self.shards is not None:
            return _read_member(self.root / self.key(i), self.shards, i, least_size)
        if self.pixels is None:
            return read_image(self.root / self.key(i), least_size=least_size)
        image = Image.fromarray(self.pixels[i])
        if least_size is not None:
            least_size(image.size)
        return image.convert("RGB")

    @cached_property
    def contents(self) -> str:
        """A hash of what is in it, wherever and whenever it was copied: names and labels, or the pixels."""
        digest = hashlib.sha256(self.labels_N.tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        else:
            digest.update("\n".join([*self.classes, *map(self.key, range(len(self)))]).encode())
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with the data: of the bytes, or of names, sizes and modification times."""
        digest = hashlib.sha256(f"{self.name} {self.split}".encode())
        digest.update(self.labels_N.tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        for file in self.files or ():
            stat = os.stat(self.root / file)
            digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        if self.shards is not None:
            for path, (size, time) in zip(self.shards.paths, self.shards.stamps):
                digest.update(f"{path.name}\0{size}\0{time}\n".encode())
        return digest.hexdigest()


def read_image(path: str | Path, *, least_size: SizeRule | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB. Raises BrokenImage naming the file.

    `least_size`, asked with the image's (width, height), answers with a size: a JPEG is then decoded at 1/2,
    1/4 or 1/8 of its own where that is no smaller.
    """
    return _decode(path, path, least_size, "replace the file or take it out of the folder")


def _read_member(name: Path, shards: Shards, i: int, least_size: SizeRule | None) -> Image.Image:
    try:
        data = shards.read(i)
    except OSError as error:
        raise BrokenImage(f"{name}: cannot be read ({error})") from error
    return _decode(io.BytesIO(data), name, least_size, "write the shard anew without it")


def _decode(
    file: str | Path | BinaryIO, name: str | Path, least_size: SizeRule | None, advice: str
) -> Image.Image:
    try:
        with Image.open(file) as image:
            if least_size is not None:
                image.draft(None, least_size(image.size))
            return to_rgb(image)
    except FileNotFoundError as error:
        raise BrokenImage(f"{name}: the file is gone since the folder was read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error)
        for named in (repr(str(file)), str(file)):  # the message begins with the name
            reason = reason.replace(named, "")
        reason = reason.rstrip(": ")
        raise BrokenImage(f"{name}: not a readable image ({reason}); {advice}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as 8-bit RGB, see the module's first lines. Raises ValueError for 32 bits a channel."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_AS_I)
    if image.mode in ("I", "F") and not deep:
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind}, PIL's mode {image.mode}; wanted 8 or 16 bits a channel")
    if deep:
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


CLASS_COUNTS = {
    "imagenet": 1000, "imagenet100": 100, "cifar10": 10, "cifar100": 100, "fashion_mnist": 10,
    **{name: known.classes for name, known in SETS.items()},
}  # fmt: skip


IMAGE_COUNTS = {
    "imagenet": (1_281_167, 50_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000),
    "fashion_mnist": (60_000, 10_000), **{name: known.images for name, known in SETS.items()},
}  # fmt: skip
"""Of train and test."""


def open_dataset(name: str, data_dir: str | Path, split: str) -> ImageDataset:
    """The `split` ("train" or "test"; for ImageNet-like folders "test" is val/) of `name` in `data_dir`.

    Raises UserError for an unknown name or split, a missing or empty folder, a cut-off file, and for another
    number of classes than the data set has: a name stands for its data wherever figures are compared.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; choose one of: {', '.join(DATASETS)}")
    if split not in SPLIT_FOLDERS:
        raise UserError(f"unknown split {split!r}; choose train or test")
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; --data-dir must name the folder that holds {name}")
    data = DATASETS[name](name, root, split)
    wanted = CLASS_COUNTS.get(name, len(data.classes))
    if len(data.classes) != wanted:
        raise UserError(
            f"{data.root}: has {len(data.classes)} classes, {name} has {wanted}: is a class folder missing, "
            "or is it another data set? --dataset imagefolder takes any folder of class folders"
        )
    count = IMAGE_COUNTS[name][split == "test"] if name in IMAGE_COUNTS else len(data)
    if len(data) != count:
        note = f"{len(data):,} of {count:,} {split} images"
        logger.warning("%s: %s; figures are not those of the whole set", data.root, note)
        data = replace(data, notes=(*data.notes, note))
    return data


def _open_folder(
    name: str, root: Path, split: str, classes: Sequence[str] | None = None, native_size: int | None = None
) -> ImageDataset:
    """`root`/<split>/<class>/<image>; with `classes`, these alone and in this order."""
    folder = next((root / n for n in SPLIT_FOLDERS[split] if (root / n).is_dir()), None)
    if folder is None:
        wanted = " or ".join(f"{n}/" for n in SPLIT_FOLDERS[split])
        raise UserError(
            f"{root}: has no {wanted}; wanted {root}/{SPLIT_FOLDERS[split][0]}/<class>/<image files>"
        )
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not found:
        flat = any(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in os.scandir(folder))
        hint = (
            "holds images but no class folders; sort them into one folder a class (for ImageNet's validation "
            "images, the script valprep.sh does so)"
            if flat
            else "is empty; wanted one folder a class with image files in it"
        )
        raise UserError(f"{folder}: {hint}")
    if classes is not None:
        missing = sorted(set(classes) - set(found))
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of the {len(classes)} class folders of {name} are missing "
                f"({', '.join(missing[:3])} ...); wanted ImageNet's folder names (n01440764 ...)"
            )
    files: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes or found):
        names = sorted(_image_files(folder / class_name))
        if not names:
            raise UserError(
                f"{folder / class_name}: no image in this class folder; add images or remove the folder "
                f"(wanted {', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        files += [f"{class_name}/{n}" for n in names]
        labels += [label] * len(names)
    return ImageDataset(
        name=name, split=split, classes=list(classes or found), labels_N=np.asarray(labels, np.int64),
        native_size=native_size or _common_small_side(len(files), lambda i: folder / files[i]), root=folder,
        files=files,
    )  # fmt: skip


def _image_files(folder: Path) -> list[str]:
    """Image files anywhere under `folder`, relative to it."""
    out = []
    for entry in os.scandir(folder):
        if entry.is_dir():
            out += [f"{entry.name}/{n}" for n in _image_files(Path(entry.path))]
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            out.append(entry.name)
    return out


def _common_small_side(count: int, image_file: Callable[[int], Path | BinaryIO]) -> int | None:
    """The side of the images where 32 of them spread over the set are all square, equal and small."""
    sizes = set()
    for i in range(0, count, max(1, count // 32)):
        try:
            with Image.open(image_file(i)) as image:
                sizes.add(image.size)
        except OSError:
            continue
        if len(sizes) > 1 or max(image.size) > SMALL_SIDE:
            return None
    width, height = sizes.pop() if sizes else (0, 1)
    return width if width == height else None


def _open_webdataset(name: str, root: Path, split: str) -> ImageDataset:
    """`root`/train-*.tar, val-*.tar; the classes are called by their numbers."""
    shards = open_shards(find_shards(root, SPLIT_FOLDERS[split]), IMAGE_SUFFIXES)
    return ImageDataset(
        name=name, split=split, classes=[str(c) for c in range(int(shards.labels_N.max()) + 1)],
        labels_N=shards.labels_N, root=root, shards=shards,
        native_size=_common_small_side(len(shards.names), lambda i: io.BytesIO(shards.read(i))),
    )  # fmt: skip


def _open_imagenet100(name: str, root: Path, split: str) -> ImageDataset:
    """The 100 classes of Tian et al. (CMC), from a folder of all of ImageNet or of these classes alone."""
    classes = (Path(__file__).parent / "imagenet100.txt").read_text().split()
    return _open_folder(name, root, split, classes)


def _open_cifar(name: str, root: Path, split: str) -> ImageDataset:
    """torchvision's python batches (with its checksums), or an image folder {train,test}/<class>/."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    for parent in (root, root.parent):
        if (parent / kind.base_folder).is_dir() and (parent == root or root.name == kind.base_folder):
            try:
                data = kind(str(parent), train=split == "train", download=False)
            except RuntimeError as error:
                raise UserError(
                    f"{parent / kind.base_folder}: incomplete or damaged; delete it and download it again"
                ) from error
            return ImageDataset(
                name=name, split=split, classes=list(data.classes),
                labels_N=np.asarray(data.targets, np.int64), native_size=32,
                root=parent / kind.base_folder, pixels=np.asarray(data.data),
            )  # fmt: skip
    if not any((root / n).is_dir() for names in SPLIT_FOLDERS.values() for n in names):
        raise UserError(
            f"{root}: holds no {name}; wanted {kind.base_folder}/ as torchvision downloads it, or a "
            "folder of images train/<class>/ and test/<class>/"
        )
    return _open_folder(name, root, split, native_size=32)


def _open_fashion_mnist(name: str, root: Path, split: str) -> ImageDataset:
    """The idx files, gzipped or not: in `root`, in fashion-mnist/ or in FashionMNIST/raw/ under it."""
    prefix = "train" if split == "train" else "t10k"
    for folder in (root, root / "fashion-mnist", root / "FashionMNIST" / "raw"):
        images = _first_file(folder, f"{prefix}-images-idx3-ubyte")
        labels = _first_file(folder, f"{prefix}-labels-idx1-ubyte")
        if images and labels:
            pixels, labels_N = _read_idx(images), _read_idx(labels).astype(np.int64)
            if pixels.ndim != 3 or labels_N.shape != pixels.shape[:1]:
                raise UserError(f"{folder}: {images.name} and {labels.name} do not belong together")
            return ImageDataset(
                name=name, split=split, classes=list(FASHION_MNIST_CLASSES), labels_N=labels_N,
                native_size=pixels.shape[1], root=folder, pixels=pixels,
            )  # fmt: skip
    raise UserError(f"{root}: holds no Fashion-MNIST; wanted {prefix}-images-idx3-ubyte.gz and its labels")


def _open_transfer_set(name: str, root: Path, split: str) -> ImageDataset:
    """As torchvision lays it out, evaluated in ImageNet's size whatever its own (the field's custom)."""
    found = read_transfer_set(name, root, split)
    return ImageDataset(
        name=name, split=split, classes=found.classes, labels_N=found.labels_N, native_size=None,
        root=found.root, files=found.files, pixels=found.pixels, notes=found.notes,
    )  # fmt: skip


def _first_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    """An array of uint8 in the idx format (http://yann.lecun.com/exdb/mnist/): magic, sizes, values."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); delete it and fetch it again") from error
    if len(data) < 16 or data[:3] != b"\x00\x00\x08":
        raise UserError(f"{path}: not an idx file of bytes; delete it and fetch it again")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise UserError(
            f"{path}: cut off, holds {values.size} of {shape.prod()} values; delete it and fetch it again"
        )
    return values.reshape(shape)


DATASETS: dict[str, Callable[[str, Path, str], ImageDataset]] = {
    "imagenet": _open_folder,
    "imagenet100": _open_imagenet100,
    "imagefolder": _open_folder,
    "webdataset": _open_webdataset,
    "cifar10": _open_cifar,
    "cifar100": _open_cifar,
    "fashion_mnist": _open_fashion_mnist,
    "flowers102": _open_transfer_set,
    "pets": _open_transfer_set,
    "food101": _open_transfer_set,
    "dtd": _open_transfer_set,
    "aircraft": _open_transfer_set,
    "stl10": _open_transfer_set,
    "eurosat": _open_transfer_set,
    "caltech101": _open_transfer_set,
    "sun397": _open_transfer_set,
    "places365": _open_transfer_set,
}
