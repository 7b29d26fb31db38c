"""What is wrong with a folder of images, in one line that says what to do."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.folders import IMAGE_SUFFIXES, is_no_data, spell_counts

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".zip", ".7z", ".rar")
TABLES = (
    ".h5", ".hdf5", ".lmdb", ".mdb", ".parquet", ".arrow", ".tfrecord", ".npz", ".npy", ".mat", ".ffcv",
    ".beton",
)  # fmt: skip
ALSO_CALLED = {
    "train": re.compile(r"(?i)train(ing)?([_-]?(images|set|data))?"),
    "val": re.compile(r"(?i)(val|valid|validation|test|testing|eval|dev)([_-]?(images|set|data))?"),
}
CLASS_TAR = re.compile(r"n\d{8}\.tar")
MOST_FOLDERS = 2000  # looked into for a split that lies deeper
DEEPEST = 4


def no_folder(root: Path, name: str) -> str:
    """`root` is no folder at all."""
    wanted = f"--data-dir must name the folder that holds {name}"
    if not root.exists():
        return f"{root}: no such folder; {wanted}"
    if root.name.lower().endswith(ARCHIVES):
        return f"{root}: an archive; unpack it: {wanted}"
    if root.name.lower().endswith(TABLES):
        return (
            f"{root}: images packed in one file, of a kind that is not read; write them out as files, "
            "train/<class>/<image>, or as WebDataset shards (--dataset webdataset)"
        )
    return f"{root}: a file, no folder; {wanted}"


def no_split(root: Path, names: Sequence[str]) -> str:
    """`root` has none of the folders `names`, which are those of one split."""
    wanted = (
        f"{root}: has no {' or '.join(f'{n}/' for n in names)}; wanted {root}/{names[0]}/<class>/<images>"
    )
    folders = [entry for entry in _entries(root) if entry.is_dir()]
    alike = [e.name for e in folders if ALSO_CALLED[names[0]].fullmatch(e.name)]
    if alike:
        return f"{wanted}. Did you mean {alike[0]}/? Rename it, or: ln -s {alike[0]} {root / names[0]}"
    if ALSO_CALLED[names[0]].fullmatch(root.name):
        return f"{wanted}. Did you mean --data-dir {root.parent}?"
    for folder in itertools.islice(_below(root), MOST_FOLDERS):
        if any((folder / n).is_dir() for n in names):
            return f"{wanted}. Did you mean --data-dir {folder}?"
    packed = sorted(e.name for e in _entries(root) if e.name.lower().endswith(ARCHIVES))
    if packed:
        return f"{wanted}. {packed[0]} is an archive: unpack it first"
    if any(_has_images(Path(e.path)) for e in folders[:20]):
        return (
            f"{wanted}. It has class folders ({folders[0].name}/ ...) and no split: move those to train on "
            "to train/, those to test on to val/"
        )
    return wanted


def no_class(folder: Path) -> str:
    """`folder`, a split, has no class folders."""
    names = [entry.name for entry in _entries(folder)]
    tars = sorted(n for n in names if CLASS_TAR.fullmatch(n))
    if tars:
        return (
            f"{folder}: holds {len(tars):,} archives, one a class ({tars[0]} ...); unpack each into a folder "
            'of its name: for f in *.tar; do mkdir "${f%.tar}" && tar -xf "$f" -C "${f%.tar}"; done'
        )
    packed = sorted(n for n in names if n.lower().endswith(ARCHIVES))
    if packed:
        return f"{folder}: has no class folders; {packed[0]} is an archive: unpack it"
    if _has_images(folder):
        return (
            f"{folder}: holds images but no class folders; sort them into one folder a class (for ImageNet's "
            "validation images, the script valprep.sh does so). Pretraining alone (--dataset imagefolder) "
            "takes them as they are"
        )
    return f"{folder}: is empty; wanted one folder a class with image files in it"


def no_image(folder: Path) -> str:
    """A class folder without an image."""
    others = Counter(os.path.splitext(e.name)[1].lower() or "without an extension" for e in _entries(folder))
    holds = f"it holds {spell_counts(others)}; " if others else ""
    return (
        f"{folder}: no image in this class folder; {holds}add images or remove the folder "
        f"(wanted {', '.join(sorted(IMAGE_SUFFIXES))})"
    )


def one_level_too_high(folder: Path, classes: Sequence[str], files: Sequence[str]) -> str | None:
    """Where the one class folder holds no image itself, but folders that do: those are the classes."""
    if len(classes) != 1 or any(name.count("/") < 2 for name in files):
        return None
    inner = {name.split("/")[1] for name in files}
    if len(inner) < 2:
        return None
    return (
        f"{folder}: its only folder, {classes[0]}/, would be the only class, so that every answer is right; "
        f"it holds {len(inner)} folders ({', '.join(sorted(inner)[:3])} ...). If those are the "
        f"classes, move them up: mv {folder / classes[0]}/* {folder}/ && rmdir {folder / classes[0]}"
    )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        found = [entry for entry in os.scandir(folder) if not is_no_data(entry.name)]
    except OSError:
        return []
    return sorted(found, key=lambda entry: entry.name)


def _has_images(folder: Path) -> bool:
    return any(os.path.splitext(e.name)[1].lower() in IMAGE_SUFFIXES for e in _entries(folder))


def _below(root: Path) -> Iterator[Path]:
    """Folders under `root`, the nearer first, not into links; each is read when its turn comes."""
    pending = deque([(root, 0)])
    while pending:
        folder, depth = pending.popleft()
        yield folder
        if depth < DEEPEST:
            inner = (e for e in _entries(folder) if e.is_dir(follow_symlinks=False))
            pending += [(Path(e.path), depth + 1) for e in inner]
