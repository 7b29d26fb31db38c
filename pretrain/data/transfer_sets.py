"""The transfer sets: their files and labels, split as torchvision has them.

torchvision.datasets reads each set's lists and knows its classes. Chosen here is what it leaves open: which
of its splits to train and to evaluate on, a split where it has none, and the metric the set is reported in.
Mean per-class accuracy for Flowers, Pets, Aircraft and Caltech-101, top-1 for Food, SUN397 and DTD, is what
Kornblith, Shlens and Le have (https://arxiv.org/abs/1805.08974, table 1), and after them SimCLR and BYOL.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain.common.errors import UserError

SEED = 0  # of the splits that are made here
CALTECH_TRAIN = 30  # images a class
EUROSAT_TRAIN = 0.8  # of each class

Metric = Literal["top1", "mean_per_class"]


@dataclass(frozen=True, kw_only=True)
class TransferSet:
    """What is known of a data set."""

    title: str
    kind: str
    """Its class in torchvision.datasets."""
    folder: str
    """Where torchvision has it under its root."""
    needs: tuple[str, ...]
    """Files and folders/ in it, "A or B" where either will do."""
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """torchvision's splits that make up train and test."""
    split_text: str
    """The same for people, with its source where the split is made here."""
    note: str = ""
    """Goes into results, where there are several splits of the set."""
    classes: int
    images: tuple[int, int]
    """Of train and test, as published."""
    metric: Metric = "top1"
    source: str
    hint: str = ""
    """Where to get what torchvision does not fetch."""

    @property
    def layout(self) -> str:
        """The folder and what must be in it, for messages."""
        where = f"{self.folder}/ with " if self.folder else ""
        return where + ", ".join(self.needs)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One part of a set: files under `root`, or pixels N x H x W x 3."""

    root: Path
    labels_N: np.ndarray
    classes: list[str]
    files: list[str] | None = None
    pixels: np.ndarray | None = None
    notes: tuple[str, ...] = ()


Splits = dict[str, tuple[str, ...]]
TRAIN_TEST: Splits = {"train": ("train",), "test": ("test",)}
TRAIN_VAL_TEST: Splits = {"train": ("train", "val"), "test": ("test",)}
TRAINVAL_TEST: Splits = {"train": ("trainval",), "test": ("test",)}

SETS: dict[str, TransferSet] = {
    "flowers102": TransferSet(
        title="Oxford Flowers-102", kind="Flowers102", folder="flowers-102",
        needs=("jpg/", "imagelabels.mat", "setid.mat"), splits=TRAIN_VAL_TEST,
        split_text="train and val against test", classes=102, images=(2040, 6149), metric="mean_per_class",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "pets": TransferSet(
        title="Oxford-IIIT Pets", kind="OxfordIIITPet", folder="oxford-iiit-pet",
        needs=("images/", "annotations/trainval.txt", "annotations/test.txt"), splits=TRAINVAL_TEST,
        split_text="trainval against test", classes=37, images=(3680, 3669), metric="mean_per_class",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "food101": TransferSet(
        title="Food-101", kind="Food101", folder="food-101",
        needs=("images/", "meta/train.json", "meta/test.json"), splits=TRAIN_TEST,
        split_text="train against test", classes=101, images=(75_750, 25_250),
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "dtd": TransferSet(
        title="Describable Textures (DTD)", kind="DTD", folder="dtd/dtd",
        needs=("images/", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"), splits=TRAIN_VAL_TEST,
        split_text="train1 and val1 against test1, the first of its ten splits", note="split 1",
        classes=47, images=(3760, 1880), source="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    "aircraft": TransferSet(
        title="FGVC Aircraft", kind="FGVCAircraft", folder="fgvc-aircraft-2013b",
        needs=(
            "data/images/", "data/variants.txt", "data/images_variant_trainval.txt",
            "data/images_variant_test.txt",
        ),
        splits=TRAINVAL_TEST, split_text="trainval against test; classes are the variants", classes=100,
        images=(6667, 3333), metric="mean_per_class",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    ),
    "stl10": TransferSet(
        title="STL-10", kind="STL10", folder="stl10_binary",
        needs=("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt"),
        split_text="the labelled train against test", classes=10, images=(5000, 8000),
        source="https://cs.stanford.edu/~acoates/stl10/",
    ),
    "eurosat": TransferSet(
        title="EuroSAT (RGB)", kind="EuroSAT", folder="eurosat/2750", needs=("AnnualCrop/", "SeaLake/"),
        split_text="made here: 80 % of each class against the rest, the shares of Helber et al. 2019 "
        "(https://arxiv.org/abs/1709.00029), who give no lists",
        note=f"80/20 a class, seed {SEED}", classes=10, images=(21_600, 5400),
        source="https://github.com/phelber/EuroSAT",
    ),
    "caltech101": TransferSet(
        title="Caltech-101", kind="Caltech101", folder="caltech101/101_ObjectCategories",
        needs=("BACKGROUND_Google/", "accordion/"),
        split_text=f"made here: {CALTECH_TRAIN} images a class against the rest, without the background "
        "class, as torchvision has it; Kornblith et al. draw as many and count the background as a 102nd "
        "class, with which figures are not comparable",
        note=f"{CALTECH_TRAIN} a class without background, seed {SEED}", classes=101, images=(3030, 5647),
        metric="mean_per_class", source="https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "sun397": TransferSet(
        title="SUN397", kind="SUN397", folder="SUN397",
        needs=(
            "ClassName.txt", "Training_01.txt or Partitions/Training_01.txt",
            "Testing_01.txt or Partitions/Testing_01.txt",
        ),
        split_text="Training_01 against Testing_01, the first of its ten partitions, 50 images a class each",
        note="partition 1", classes=397, images=(19_850, 19_850),
        source="https://vision.princeton.edu/projects/2010/SUN/",
        hint="the lists are in Partitions.zip of https://vision.princeton.edu/projects/2010/SUN/",
    ),
    "places365": TransferSet(
        title="Places365-Standard", kind="Places365", folder="",
        needs=(
            "categories_places365.txt", "places365_train_standard.txt", "places365_val.txt",
            "data_256_standard/ or data_large_standard/", "val_256/ or val_large/",
        ),
        split_text="train-standard against val; the images of 256 px where both parts have them",
        classes=365, images=(1_803_460, 36_500), source="http://places2.csail.mit.edu/download.html",
    ),
}  # fmt: skip


def metric_of(dataset: str) -> Metric:
    """The metric that a data set is reported in, and heads and epochs are chosen by."""
    return SETS[dataset].metric if dataset in SETS else "top1"


def read_transfer_set(name: str, root: Path, split: str) -> Listed:
    """The part `split` of the set `name` in `root`: torchvision's root, or the set's own folder.

    Raises UserError for what is missing or damaged, before any image is decoded.
    """
    known = SETS[name]
    base = _find(known, root)
    with tempfile.TemporaryDirectory() as scratch:
        # torchvision wants its own folder names, which a staged or renamed folder has by links alone, and
        # takes every file for its own: hidden ones (of the staging, of a Mac) are left out
        top = Path(scratch) / "root"
        link = top / known.folder
        link.mkdir(parents=True)
        for entry in base.resolve().iterdir():
            if not entry.name.startswith("."):
                (link / entry.name).symlink_to(entry)
        try:
            listed = READERS.get(name, _splits)(known, top, link, split)
        except RuntimeError as error:
            lists = ", ".join(n for n in known.needs if not n.endswith("/"))
            raise UserError(
                f"{base}: a file of {known.title} is cut off or another version: wrong checksum of one of "
                f"{lists}; fetch it again"
            ) from error
        except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
            reason = str(error).replace(str(link), str(base))
            raise UserError(
                f"{base}: not {known.title} as torchvision.datasets.{known.kind} reads it "
                f"({type(error).__name__}: {reason}); wanted {known.layout}"
            ) from error
    files, labels, classes, more = listed
    labels_N = np.asarray(labels, np.int64)
    notes = tuple(filter(None, (known.note, more)))
    if isinstance(files, np.ndarray):
        return Listed(root=base, pixels=files, labels_N=labels_N, classes=classes, notes=notes)
    names = [f[len(f"{link}/") :] for f in map(str, files)]
    absent = _absent(base, names)
    if absent:
        raise UserError(
            f"{base}: {known.title} lacks {len(absent):,} of its {len(names):,} {split} images "
            f"({', '.join(absent[:3])}); unpack its archive again"
        )
    return Listed(root=base, files=names, labels_N=labels_N, classes=classes, notes=notes)


def _find(known: TransferSet, root: Path) -> Path:
    """The folder with what is needed: `root` itself, or where torchvision or the archive has it under it."""
    parts = Path(known.folder).parts
    places = [root.joinpath(*parts[i:]) for i in range(len(parts) + 1)]
    missing = {p: [n for n in known.needs if not _there(p, n)] for p in places}
    base = min(places, key=lambda p: len(missing[p]))
    if not missing[base]:
        return base
    fetch = f"torchvision.datasets.{known.kind}(DIR, download=True) fetches it into DIR"
    how = "; ".join(filter(None, (fetch, known.hint)))
    if len(missing[base]) == len(known.needs):
        raise UserError(f"{root}: holds no {known.title}; wanted {root}/{known.layout} ({how})")
    raise UserError(
        f"{base}: {known.title} lacks {', '.join(missing[base])}; wanted {', '.join(known.needs)} ({how})"
    )


def _there(folder: Path, need: str) -> bool:
    paths = [(folder / n, n.endswith("/")) for n in need.split(" or ")]
    return any(p.is_dir() if is_folder else p.is_file() for p, is_folder in paths)


def _absent(root: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that are not under `root`; one look into each folder, not one at each file."""
    there = {
        folder: set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        for folder in {os.path.dirname(n) for n in names}
    }
    return [n for n in names if os.path.basename(n) not in there[os.path.dirname(n)]]


Read = tuple[Iterable[Any] | np.ndarray, Sequence[int], list[str], str]
"""Paths of the files (or pixels), their labels, the classes, and what else results should say."""


def _splits(known: TransferSet, top: Path, link: Path, split: str) -> Read:
    """The splits of torchvision's that `known` names, one after the other."""
    from torchvision import datasets

    parts = [getattr(datasets, known.kind)(str(top), split=s) for s in known.splits[split]]
    files = [f for p in parts for f in (p._images if known.kind == "OxfordIIITPet" else p._image_files)]
    numbers = [str(c) for c in range(known.classes)]  # older torchvision has no names of Flowers'
    return files, [x for p in parts for x in p._labels], list(getattr(parts[0], "classes", numbers)), ""


def _stl10(known: TransferSet, top: Path, link: Path, split: str) -> Read:
    from torchvision.datasets import STL10

    class Labelled(STL10):
        train_list = STL10.train_list[:2]  # its 2.8 GB of unlabelled images need not be there

    data = Labelled(str(top), split=split)
    return np.ascontiguousarray(data.data.transpose(0, 2, 3, 1)), data.labels, list(data.classes), ""


def _eurosat(known: TransferSet, top: Path, link: Path, split: str) -> Read:
    from torchvision.datasets import EuroSAT

    data = EuroSAT(str(top))
    files = [path for path, _ in data.samples]
    trained = class_wise(link, files, data.targets, lambda n: round(EUROSAT_TRAIN * n))
    return _part(files, data.targets, trained == (split == "train"), data.classes)


def _caltech101(known: TransferSet, top: Path, link: Path, split: str) -> Read:
    from torchvision.datasets import Caltech101

    data = Caltech101(str(top))
    files = [f"{link}/{data.categories[y]}/image_{i:04d}.jpg" for y, i in zip(data.y, data.index)]
    trained = class_wise(link, files, data.y, lambda n: CALTECH_TRAIN)
    return _part(files, data.y, trained == (split == "train"), data.categories)


def _sun397(known: TransferSet, top: Path, link: Path, split: str) -> Read:
    from torchvision.datasets import SUN397

    data = SUN397(str(top))
    file = "Training_01.txt" if split == "train" else "Testing_01.txt"
    path = next(p for p in (link / file, link / "Partitions" / file) if p.is_file())
    names = [line.strip().lstrip("/") for line in path.read_text().splitlines() if line.strip()]
    labels = [data.class_to_idx["/".join(name.split("/")[1:-1])] for name in names]
    return [f"{link}/{name}" for name in names], labels, list(data.classes), ""


def _places365(known: TransferSet, top: Path, link: Path, split: str) -> Read:
    from torchvision.datasets import Places365

    small = all((link / n).is_dir() for n in ("data_256_standard", "val_256"))
    data = Places365(str(top), split="train-standard" if split == "train" else "val", small=small)
    classes = sorted(data.class_to_idx, key=data.class_to_idx.__getitem__)
    return (f for f, _ in data.imgs), data.targets, classes, "256 px" if small else "large images"


READERS: dict[str, Callable[[TransferSet, Path, Path, str], Read]] = {
    "stl10": _stl10,
    "eurosat": _eurosat,
    "caltech101": _caltech101,
    "sun397": _sun397,
    "places365": _places365,
}
"""Of those that are more than some of torchvision's splits."""


def class_wise(
    link: Path, files: Sequence[str], labels: Sequence[int], count: Callable[[int], int]
) -> np.ndarray:
    """Which images are for training: `count(n)` of the n of each class, N booleans.

    They are those whose SHA-256 of "SEED CLASS/FILE" comes first: the same everywhere and for ever, and an
    image more or less moves one other at most.
    """
    keys = [hashlib.sha256(f"{SEED} {f[len(f'{link}/') :]}".encode()).digest() for f in files]
    order_N = np.array(sorted(range(len(files)), key=keys.__getitem__), np.int64)
    labels_N = np.asarray(labels)[order_N]
    trained_N = np.zeros(len(files), bool)
    for label in np.unique(labels_N):
        members = order_N[labels_N == label]
        trained_N[members[: count(len(members))]] = True
    return trained_N


def _part(files: Sequence[str], labels: Sequence[int], chosen_N: np.ndarray, classes: Sequence[str]) -> Read:
    index = np.flatnonzero(chosen_N).tolist()
    return [files[i] for i in index], [labels[i] for i in index], list(classes), ""


def validation_files(name: str, root: Path) -> set[str]:
    """Those training images of data set `name` under `root` that are its own validation part, by name.

    Empty where the set has none, or where its list is not there (the one of aircraft is not needed else).
    """
    if name == "dtd":
        lines = (root / "labels" / "val1.txt").read_text().split()
        return {f"images/{line}" for line in lines}
    if name == "flowers102":
        from scipy.io import loadmat

        numbers = loadmat(root / "setid.mat", squeeze_me=True)["valid"]
        return {f"jpg/image_{number:05d}.jpg" for number in np.atleast_1d(numbers)}
    listed = root / "data" / "images_variant_val.txt"
    if name == "aircraft" and listed.is_file():
        return {f"data/images/{line.split(' ')[0]}.jpg" for line in listed.read_text().splitlines() if line}
    return set()


def markdown() -> str:
    """The sets as a table, for the documentation."""
    lines = [
        "| `--dataset` | what | in `--data-dir`, as torchvision has it | train and test | classes | images, "
        "train + test | metric |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, known in SETS.items():
        needs = ", ".join(" or ".join(f"`{n}`" for n in need.split(" or ")) for need in known.needs)
        layout = (f"`{known.folder}/`: " if known.folder else "") + needs
        note = f"; in results: {known.note}" if known.note else ""
        train, test = known.images
        metric = {"top1": "top-1", "mean_per_class": "mean per class"}[known.metric]
        lines.append(
            f"| `{name}` | [{known.title}]({known.source}) | {layout} | {known.split_text}{note} | "
            f"{known.classes} | {train:,} + {test:,} | {metric} |"
        )
    return "\n".join(lines)
