"""Whether a classifier of one part of a data set may be evaluated on the other."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict

import numpy as np

from pretrain.common.errors import UserError
from pretrain.data.datasets import IMAGE_COUNTS, ImageDataset

LOOKED_AT = 256  # test images that are looked for among the training images
FEW = 0.01  # of those; a set may hold an image twice


def check_pair(train: ImageDataset, test: ImageDataset) -> None:
    """Raises UserError where the two parts do not have the same classes, or one class only."""
    if len(test.classes) < 2:
        raise UserError(
            f"{test.root}: one class only ({', '.join(test.classes)}), so that every answer is right; "
            "wanted two or more class folders in train and val"
        )
    if train.classes != test.classes:
        lost = sorted(set(train.classes) - set(test.classes))
        more = sorted(set(test.classes) - set(train.classes))
        if lost and _composed(lost) == _composed(more):
            raise UserError(
                f"{test.root}: its class names are those of {train.root} in another Unicode form, such as "
                f"{lost[0]!r} (NFC, the one of most systems, and NFD, that of macOS); rename the folders"
            )
        says = [f"{len(lost)} only in train ({', '.join(lost[:3])})"] if lost else []
        says += [f"{len(more)} only in the test part ({', '.join(more[:3])})"] if more else []
        raise UserError(
            f"{test.root}: its classes are not those of {train.root}: {'; '.join(says) or 'other order'}; "
            "are train and val swapped, or is a class folder missing?"
        )
    for part in (train, test):
        labels = part.labels_N
        if len(labels) and (labels.min() < 0 or labels.max() >= len(part.classes)):
            raise UserError(f"{part.root}: a label lies outside 0..{len(part.classes) - 1}")
    absent = np.setdiff1d(test.labels_N, train.labels_N)
    if absent.size:
        raise UserError(f"{train.root}: no training image of class {train.classes[int(absent[0])]!r}")
    empty = np.setdiff1d(np.arange(len(test.classes)), test.labels_N)
    if empty.size:
        raise UserError(
            f"{test.root}: no image of class {test.classes[int(empty[0])]!r}; results over the "
            "other classes would not be comparable"
        )


def _composed(names: list[str]) -> set[str]:
    return {unicodedata.normalize("NFC", name) for name in names}


def doubts_about(train: ImageDataset, test: ImageDataset) -> list[str]:
    """What is doubtful about the parts, a sentence each; nothing of a known set that is whole.

    Raises UserError where they are swapped, or where the test images are training images.
    """
    counts = len(train), len(test)
    if IMAGE_COUNTS.get(test.name) == counts and train.root != test.root:
        return []
    for name, known in IMAGE_COUNTS.items():
        maybe = test.name in (name, "imagefolder", "webdataset")
        if maybe and counts == known[::-1] and known[0] != known[1]:
            raise UserError(
                f"{train.root} holds {counts[0]:,} images and {test.root} {counts[1]:,}: train and test of "
                f"{name} are swapped"
            )
    found = []
    twice = also_trained_on(train, test)
    if twice == 1:
        raise UserError(
            f"{test.root}: its images are training images too, those of {train.root}; wanted images that "
            "the classifier was not trained on"
        )
    if twice > FEW:
        found.append(f"{100 * twice:.0f} % of the test images looked at are training images too")
    if counts[1] > counts[0] and test.name not in IMAGE_COUNTS:
        found.append(f"more test images ({counts[1]:,}) than training images ({counts[0]:,}): swapped?")
    return found


def also_trained_on(train: ImageDataset, test: ImageDataset) -> float:
    """The share of test images, of up to LOOKED_AT evenly spaced ones, that are in `train` byte for byte."""
    picks = np.linspace(0, len(test) - 1, min(LOOKED_AT, len(test)), dtype=int).tolist()
    if train.pixels is not None and test.pixels is not None:
        seen = {_digest(image.tobytes()) for image in train.pixels}
        return float(np.mean([_digest(test.pixels[i].tobytes()) in seen for i in picks]))
    if train.files is None or test.files is None:  # shards: by their names alone
        same = {path.resolve() for path in train.shards.paths} if train.shards is not None else set()
        other = {path.resolve() for path in test.shards.paths} if test.shards is not None else {None}
        return float(same == other)
    by_size: defaultdict[int, list[int]] = defaultdict(list)
    sizes_N = train.stats_N2[:, 0]  # known since the files were listed
    for i in np.flatnonzero(np.isin(sizes_N, test.stats_N2[picks, 0])).tolist():
        by_size[int(sizes_N[i])].append(i)
    read: dict[int, str] = {}

    def trained(i: int) -> str:
        if i not in read:
            read[i] = _digest_of(train, i)
        return read[i]

    hits = []
    for i in picks:
        own = _digest_of(test, i)
        alike = by_size[int(test.stats_N2[i, 0])] if own else []
        hits.append(any(trained(j) == own for j in alike))
    return float(np.mean(hits))


def _digest_of(data: ImageDataset, i: int) -> str:
    """Of the file's bytes; "" where it cannot be read, which is told when its turn comes."""
    try:
        return _digest((data.root / data.key(i)).read_bytes())
    except OSError:
        return ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
