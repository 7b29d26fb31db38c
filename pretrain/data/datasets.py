"""Data sets by name: labelled RGB images, one at a time."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from pretrain.common.errors import UserError
from pretrain.data.folder_advice import no_class, no_folder, no_image, no_split, one_level_too_high
from pretrain.data.folders import IMAGE_SUFFIXES, class_folders, list_images, stats_of, tell_passed_over
from pretrain.data.images import BrokenImage, OpenImage, common_small_side, open_file
from pretrain.data.shards import Shards, find_shards, open_shards
from pretrain.data.transfer_sets import SETS, read_transfer_set

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "test", "validation")}
KEEP_BYTES = "surrogateescape"  # of file names that are no UTF-8
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


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
    listed_N2: np.ndarray | None = None
    """Size and modification time in ns of each of `files`, where listing them has told."""
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

    def open(self, i: int) -> OpenImage:
        """Image `i`, open and not decoded yet. Raises BrokenImage naming the file."""
        if self.pixels is not None:
            return OpenImage(Image.fromarray(self.pixels[i]), str(i), "")
        path = self.root / self.key(i)
        if self.shards is None:
            return open_file(path)
        try:
            data = self.shards.read(i)
        except OSError as error:
            raise BrokenImage(f"{path}: cannot be read ({error})") from error
        return OpenImage(io.BytesIO(data), path, "rewrite the shard without it")

    def image(self, i: int) -> Image.Image:
        """Image `i` as 8-bit RGB. Raises BrokenImage naming the file."""
        with self.open(i) as image:
            return image.decode()

    @cached_property
    def stats_N2(self) -> np.ndarray:
        """What shows that image i is as it was: size and time of its file, or of its shard and its place."""
        if self.listed_N2 is not None:
            return self.listed_N2
        if self.shards is not None:
            stamps = np.array(self.shards.stamps, np.int64)[self.shards.shard_N]
            return np.concatenate([stamps, self.shards.offset_N[:, None]], 1)
        return stats_of(self.root, self.files or ())

    @cached_property
    def contents(self) -> str:
        """A hash of what is in it, wherever and whenever it was copied: names and labels, or the pixels."""
        digest = hashlib.sha256(self.labels_N.tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        else:
            digest.update(
                "\n".join([*self.classes, *map(self.key, range(len(self)))]).encode(errors=KEEP_BYTES)
            )
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with the data: of the bytes, or of names, sizes and modification times."""
        digest = hashlib.sha256(f"{self.name} {self.split}".encode())
        digest.update(self.labels_N.tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.tobytes())
        if self.files is not None:
            digest.update("\0".join(self.files).encode(errors=KEEP_BYTES))
            digest.update(np.ascontiguousarray(self.stats_N2).tobytes())
        if self.shards is not None:
            for path, (size, time) in zip(self.shards.paths, self.shards.stamps):
                digest.update(f"{path.name}\0{size}\0{time}\n".encode(errors=KEEP_BYTES))
        return digest.hexdigest()

    def agree(self) -> None:
        """Take rank 0's word for the fingerprint, so that it alone looks at the files.

        All ranks must call, before it is asked for otherwise.
        """
        from pretrain.common.collectives import gather_objects  # with PyTorch, which listing needs none of
        from pretrain.common.process_group import is_main

        self.__dict__["fingerprint"] = gather_objects(self.fingerprint if is_main() else None)[0]


CLASS_COUNTS = {
    "imagenet": 1000, "imagenet100": 100, "cifar10": 10, "cifar100": 100, "fashion_mnist": 10,
    **{name: known.classes for name, known in SETS.items()},
}  # fmt: skip


IMAGE_COUNTS = {
    "imagenet": (1_281_167, 50_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000),
    "fashion_mnist": (60_000, 10_000), **{name: known.images for name, known in SETS.items()},
}  # fmt: skip
"""Of train and test."""


def open_dataset(name: str, data_dir: str | Path, split: str, *, labelled: bool = True) -> ImageDataset:
    """The `split` ("train" or "test"; for ImageNet-like folders "test" is val/) of `name` in `data_dir`.

    Where labels are not needed (`labelled` False) an imagefolder's images may lie in any folders, or in none.

    Raises UserError for an unknown name or split, a missing or empty folder, a cut-off file, and for another
    number of classes than the data set has: a name stands for its data wherever figures are compared.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    require_known(name)
    if split not in SPLIT_FOLDERS:
        raise UserError(f"unknown split {split!r}; choose train or test")
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(no_folder(root, name))
    reader = DATASETS[name] if labelled or name != "imagefolder" else _open_unlabelled
    data = reader(name, root, split)
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


def require_known(name: str) -> None:
    """Raises UserError for a name of no data set."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? There are" if near else "choose one of:"
        raise UserError(f"unknown data set {name!r}; {hint} {', '.join(DATASETS)}")


def _open_folder(
    name: str,
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    native_size: int | None = None,
    *,
    labelled: bool = True,
) -> ImageDataset:
    """`root`/<split>/<class>/<image>; with `classes`, these alone and in this order."""
    folder = next((root / n for n in SPLIT_FOLDERS[split] if (root / n).is_dir()), None)
    if folder is None:
        raise UserError(no_split(root, SPLIT_FOLDERS[split]))
    found = class_folders(folder)
    if not found:
        raise UserError(no_class(folder))
    if classes is not None:
        missing = sorted(set(classes) - set(found))
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of the {len(classes)} class folders of {name} are missing "
                f"({', '.join(missing[:3])} ...); wanted ImageNet's folder names (n01440764 ...)"
            )
    taken = list(classes or found)
    listing = list_images(folder, taken)
    empty = np.flatnonzero(np.bincount(listing.labels_N, minlength=len(taken)) == 0)
    if len(empty):
        raise UserError(no_image(folder / taken[int(empty[0])]))
    if labelled and (nested := one_level_too_high(folder, taken, listing.files)):
        raise UserError(nested)
    tell_passed_over(folder, listing.passed_over)
    return ImageDataset(
        name=name, split=split, classes=taken, labels_N=listing.labels_N, root=folder, files=listing.files,
        listed_N2=listing.stats_N2,
        native_size=native_size
        or common_small_side(len(listing.files), lambda i: open_file(folder / listing.files[i])),
    )  # fmt: skip


def _open_unlabelled(name: str, root: Path, split: str) -> ImageDataset:
    """As `_open_folder`, or images that lie in `root`/<split> or in `root` itself, as one class."""
    folder = next((root / n for n in SPLIT_FOLDERS[split] if (root / n).is_dir()), root)
    flat = list_images(folder, [""]) if folder == root or not class_folders(folder) else None
    if flat is None or not flat.files:
        return _open_folder(name, root, split, labelled=False)
    tell_passed_over(folder, flat.passed_over)
    return ImageDataset(
        name=name, split=split, classes=["all"], labels_N=flat.labels_N, root=folder, files=flat.files,
        listed_N2=flat.stats_N2,
        native_size=common_small_side(len(flat.files), lambda i: open_file(folder / flat.files[i])),
    )  # fmt: skip


def _open_webdataset(name: str, root: Path, split: str) -> ImageDataset:
    """`root`/train-*.tar, val-*.tar; the classes are called by their numbers."""
    shards = open_shards(find_shards(root, SPLIT_FOLDERS[split]), IMAGE_SUFFIXES)
    return ImageDataset(
        name=name, split=split, classes=[str(c) for c in range(int(shards.labels_N.max()) + 1)],
        labels_N=shards.labels_N, root=root, shards=shards,
        native_size=common_small_side(
            len(shards.names), lambda i: OpenImage(io.BytesIO(shards.read(i)), shards.names[i], "")
        ),
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
