"""The labelled training images of a 1 % or 10 % evaluation.

On ImageNet the 1 % and 10 % are the lists of SimCLR, file names in imagenet_subsets/ of
https://github.com/google-research/simclr, which every published figure uses. On other data sets a list of
your own or a class-balanced draw takes their place, and a result says which it was.
"""

from __future__ import annotations

import hashlib
import logging
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.common.errors import UserError
from pretrain.common.files import atomic_path, regular
from pretrain.data.datasets import ImageDataset

logger = logging.getLogger(__name__)

URL = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/{percent}percent.txt"
DOWNLOAD = "download"
BALANCED_KEY = 4711  # parts the draw of a subset from other uses of its seed


@dataclass(frozen=True, kw_only=True)
class PublishedList:
    """What is known of one of SimCLR's lists."""

    names: int
    sha256: str
    """Of the names in their published order, joined by newlines, without one at the end."""


PUBLISHED = {
    1: PublishedList(names=12_811, sha256="71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17"),
    10: PublishedList(
        names=128_116, sha256="6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091"
    ),
}


@dataclass(frozen=True, kw_only=True)
class LabelSubset:
    """The labelled images of an evaluation."""

    indices: np.ndarray
    """Positions in the training set, each once, ascending."""
    name: str
    """As results record it: "all", "SimCLR 1 % list", "class-balanced draw, seed 0", "own list FILE"."""
    sha256: str
    """Of the sorted image names joined by newlines: the same for the same set."""


def choose_subset(
    data: ImageDataset, percent: int, *, lists: str | None, seed: int, folder: Path
) -> LabelSubset:
    """`percent` of the labels of `data`: all, those of the list file `lists`, or a class-balanced draw.

    On imagenet `lists` must be SimCLR's, as a file or "download", which fetches it into `folder`. Raises
    UserError for a list that is not what it should be, or a name without an image.
    """
    if percent == 100:
        if lists is not None:
            raise UserError("--lists goes with --label-percent 1 or 10; with 100 every image is used")
        return _subset(data, np.arange(len(data)), "all")
    if data.name == "imagenet":
        if lists is None:
            raise UserError(
                f"the {percent} % of ImageNet is SimCLR's list: give it as --lists {percent}percent.txt "
                f"(from {URL.format(percent=percent)}), or fetch it with --lists {DOWNLOAD}"
            )
        if len(data) < PUBLISHED[percent].names:  # told before anything is fetched
            raise UserError(
                f"{data.root}: {len(data):,} images, and SimCLR's {percent} % list names "
                f"{PUBLISHED[percent].names:,}; is --data-dir the folder of ImageNet?"
            )
        path = fetch_list(percent, folder) if lists == DOWNLOAD else Path(lists)
        names = read_list(path)
        check_published(names, percent, path)
        return _subset(data, find_names(data, names, path), f"SimCLR {percent} % list")
    if lists == DOWNLOAD:
        raise UserError(
            f"--lists {DOWNLOAD} fetches lists of ImageNet; {data.name} has none that is published"
        )
    if lists is not None:
        indices = find_names(data, read_list(Path(lists)), Path(lists))
        _check_classes(data, indices, lists)
        return _subset(data, indices, f"own list {Path(lists).name}")
    return _subset(data, balanced_draw(data, percent, seed), f"class-balanced draw, seed {seed}")


def balanced_draw(data: ImageDataset, percent: float, seed: int) -> np.ndarray:
    """The same number of images of every class, together `percent` of all, at least one a class.

    A draw of 1 % lies inside that of 10 % with the same seed. Raises UserError where a class has too few.
    """
    classes = len(data.classes)
    each = max(1, round(len(data) * percent / 100 / classes))
    drawn = []
    for label, name in enumerate(data.classes):
        members = np.flatnonzero(data.labels_N == label)
        if len(members) < each:
            raise UserError(
                f"{data.root}: {percent:g} % of {len(data)} images is {each} of each of {classes} classes, "
                f"and {name!r} has {len(members)}; take a higher --label-percent or give --lists"
            )
        rng = np.random.default_rng([BALANCED_KEY, seed, label])
        drawn.append(rng.permutation(members)[:each])
    return np.sort(np.concatenate(drawn))


def read_list(path: Path) -> list[str]:
    """The file's image names, one a line, in its order. Raises UserError where one comes twice."""
    try:
        text = regular(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lists {path}: not a readable text file ({error})") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"--lists {path}: holds no name; wanted one image file name a line")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(n for n in names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        raise UserError(f"--lists {path}: {twice} comes twice")
    return names


def check_published(names: list[str], percent: int, path: Path) -> None:
    """Raises UserError unless `names` are SimCLR's `percent` % in the order published."""
    known = PUBLISHED[percent]
    other = next((p for p, k in PUBLISHED.items() if p != percent and k.names == len(names)), None)
    if other is not None:
        raise UserError(
            f"--lists {path}: this is the size of the {other} % list; --label-percent is {percent}"
        )
    if len(names) != known.names:
        raise UserError(
            f"--lists {path}: {len(names):,} names; SimCLR's {percent} % list has {known.names:,}"
        )
    joined = "\n".join(names)
    digests = {hashlib.sha256(text.encode()).hexdigest() for text in (joined, joined + "\n")}
    if known.sha256 not in digests:
        raise UserError(
            f"--lists {path}: not SimCLR's {percent} % list in its published order; fetch it anew from "
            f"{URL.format(percent=percent)}"
        )


def find_names(data: ImageDataset, names: list[str], path: Path) -> np.ndarray:
    """Ascending positions of the images with these file names (with or without their class folder).

    Raises UserError for a name that no image or more than one has.
    """
    positions: dict[str, list[int]] = {}
    for i in range(len(data)):
        key = data.key(i)
        for name in {key, key.rpartition("/")[2]}:
            positions.setdefault(name, []).append(i)
    missing = [n for n in names if n not in positions]
    if missing:
        raise UserError(
            f"--lists {path}: {len(missing):,} of {len(names):,} names have no image under {data.root} "
            f"({', '.join(missing[:3])} ...); is --data-dir the data set the list was made for?"
        )
    several = next((n for n in names if len(positions[n]) > 1), None)
    if several is not None:
        raise UserError(
            f"--lists {path}: {len(positions[several])} images are called {several}; write CLASS/{several}"
        )
    indices = np.unique([positions[n][0] for n in names])
    if len(indices) < len(names):
        raise UserError(f"--lists {path}: names the same image with and without its folder")
    return indices


def fetch_list(percent: int, folder: Path, url: str = URL) -> Path:
    """SimCLR's list in `folder`, downloaded and checked unless it is there. Raises UserError."""
    path = folder / f"{percent}percent.txt"
    if not path.exists():
        address = url.format(percent=percent)
        logger.info("fetching %s", address)
        try:
            with urllib.request.urlopen(address, timeout=60) as answer, atomic_path(path) as aside:
                aside.write_bytes(answer.read())
                check_published(read_list(aside), percent, path)
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            raise UserError(
                f"{address} could not be fetched ({error}); fetch it where there is a network, and give it "
                f"as --lists {percent}percent.txt"
            ) from error
    return path


def _check_classes(data: ImageDataset, indices: np.ndarray, lists: str) -> None:
    absent = np.setdiff1d(np.arange(len(data.classes)), data.labels_N[indices])
    if absent.size:
        raise UserError(f"--lists {lists}: names no image of class {data.classes[int(absent[0])]!r}")


def _subset(data: ImageDataset, indices: np.ndarray, name: str) -> LabelSubset:
    names = sorted(data.key(int(i)) for i in indices)
    return LabelSubset(
        indices=indices, name=name, sha256=hashlib.sha256("\n".join(names).encode()).hexdigest()
    )
