"""Image folders: which files lie under a folder, their classes, sizes and times.

Listing and looking at a million files takes ten seconds on a local disk and minutes on a shared one, for
every command and every rank. The list of a folder with more than LARGE images is therefore kept in the user's
cache folder. It is used again as long as no folder in it has another modification time (which any file added,
removed or renamed changes) and SAMPLE of its files, drawn anew each time, are as they were. What that misses
is a file of a large set that was overwritten in place: `touch` its folder after such a change.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import numpy as np

from pretrain.common.errors import UserError
from pretrain.common.files import write_text
from pretrain.common.machine import launch_id
from pretrain.data.cache import cache_dir, load_arrays, one_at_a_time, packed, save_arrays, unpacked

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
NO_DATA = frozenset({"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found"})
FORMAT = 1
LARGE = 100_000  # images
SAMPLE = 2_000  # files of a large set that are looked at although its list is known
MOST_KINDS = 8  # of files passed over, in a message
THREADS = 8  # on a shared disk a look at a file is waiting
WAITING = 3  # times as long as the work: what a folder takes there, and not beside a few busy neighbours
SETTLED_NS = 2 * 10**9  # a folder that changed this shortly before it was read may change again unnoticed
COLUMNS = ("names", "labels", "sizes", "times", "folders", "folder_times")


@dataclass(kw_only=True)
class Listing:
    """Image files under a folder: names relative to it, in the order of class and name."""

    files: list[str]
    labels_N: np.ndarray
    stats_N2: np.ndarray
    """Size in bytes and modification time in ns of each file; -1 for a link to nothing."""
    folders: dict[str, int]
    """Every folder that was read, relative to the top one, with its modification time in ns."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files of which kind were left out; empty for a list that was known."""


def is_no_data(name: str) -> bool:
    """Whether a file or folder of this name is the system's or an editor's, and nobody's data."""
    return name.startswith(".") or name.lower() in NO_DATA


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted. Raises UserError where it cannot be read."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(e.name for e in entries if not is_no_data(e.name) and os.path.isdir(e.path))


def list_images(folder: Path, classes: Sequence[str]) -> Listing:
    """The images in the folders `classes` of `folder`, however deep; "" is the folder itself alone.

    Raises UserError for a folder that cannot be read.
    """
    said = "\0".join([str(FORMAT), os.path.realpath(folder), *sorted(IMAGE_SUFFIXES), "", *classes])
    digest = hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:32]
    kept = cache_dir() / "folders" / f"{digest}.npz"
    with one_at_a_time(kept) if launch_id() or kept.exists() else contextlib.nullcontext():
        known = _known(kept, folder)
        if known is None:
            known = _scan(folder, classes)
            _keep(kept, known)
        return known


def _keep(kept: Path, listing: Listing) -> None:
    """Write down the list of a large set, or of any that the other ranks of this launch will ask for."""
    settled = max(listing.folders.values()) < time.time_ns() - SETTLED_NS
    if not settled or not (len(listing.files) > LARGE or launch_id()):
        with contextlib.suppress(OSError):
            kept.unlink(missing_ok=True)
        return
    save_arrays(kept, {
        "names": packed(listing.files), "labels": listing.labels_N, "sizes": listing.stats_N2[:, 0],
        "times": listing.stats_N2[:, 1], "folders": packed(list(listing.folders)),
        "folder_times": np.array(list(listing.folders.values()), np.int64),
    })  # fmt: skip
    _mark(kept)


def _mark(kept: Path) -> None:
    """Note that this launch has compared the list with the disk: its other ranks need not, and must agree."""
    if launch_id():
        with contextlib.suppress(OSError):
            write_text(kept.with_suffix(".launch"), launch_id())


def _known(kept: Path, folder: Path) -> Listing | None:
    """The list as it was kept, if it is still true."""
    columns = load_arrays(kept, COLUMNS)
    if columns is None:
        return None
    files, folders = unpacked(columns["names"]), unpacked(columns["folders"])
    count = {len(files), *(len(columns[name]) for name in ("labels", "sizes", "times"))}
    if count != {len(columns["sizes"])} or len(folders) != len(columns["folder_times"]):
        return None
    listing = Listing(
        files=files, labels_N=columns["labels"],
        stats_N2=np.stack([columns["sizes"], columns["times"]], 1),
        folders=dict(zip(folders, columns["folder_times"].tolist())),
    )  # fmt: skip
    marker = kept.with_suffix(".launch")
    if launch_id() and marker.exists() and marker.read_text() == launch_id():
        return listing
    if not _as_it_was(listing, folder):
        return None
    _mark(kept)
    return listing


def _as_it_was(listing: Listing, folder: Path) -> bool:
    n = len(listing.files)
    picks = range(n) if n <= LARGE else random.sample(range(n), min(SAMPLE, n))
    try:
        same = all(os.stat(folder / name).st_mtime_ns == then for name, then in listing.folders.items())
    except OSError:
        return False
    return same and np.array_equal(
        stats_of(folder, [listing.files[i] for i in picks]), listing.stats_N2[picks]
    )


def stats_of(folder: Path, files: Sequence[str]) -> np.ndarray:
    """Size in bytes and modification time in ns of each file, N x 2; -1 where there is none."""
    found = np.full((len(files), 2), -1, np.int64)
    top = f"{folder}/"
    for i, name in enumerate(files):
        try:
            stat = os.stat(top + name)
        except OSError:
            continue
        found[i] = stat.st_size, stat.st_mtime_ns
    return found


def _scan(folder: Path, classes: Sequence[str]) -> Listing:
    parts = [_walk(folder, "", deep=False)] if list(classes) == [""] else list(_walks(folder, classes))
    folders = {"": os.stat(folder).st_mtime_ns}
    for part in parts:
        folders |= part.folders
    return Listing(
        files=[name for part in parts for name in part.files],
        labels_N=np.repeat(np.arange(len(parts)), [len(p.files) for p in parts]),
        stats_N2=np.concatenate([np.zeros((0, 2), np.int64), *(p.stats_N2 for p in parts)]),
        folders=folders, passed_over=sum((p.passed_over for p in parts), Counter()),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Part:
    files: list[str]
    stats_N2: np.ndarray
    folders: dict[str, int]
    passed_over: Counter[str]


def _walks(top: Path, classes: Sequence[str]) -> Iterator[_Part]:
    """Every class folder's; by THREADS from the first one on in which a disk was waited for.

    Where nothing is waited for, threads only take the interpreter from one another: four times as slow.
    """
    for at, name in enumerate(classes, 1):
        began, worked = time.perf_counter(), time.thread_time()
        part = _walk(top, name)
        waited = time.perf_counter() - began > WAITING * (time.thread_time() - worked)
        yield part
        if waited:
            with ThreadPoolExecutor(THREADS) as pool:
                yield from pool.map(lambda name: _walk(top, name), classes[at:])
            return


def _walk(top: Path, name: str, *, deep: bool = True) -> _Part:
    """Everything under one class folder."""
    found: list[tuple[str, int, int]] = []
    folders: dict[str, int] = {}
    passed_over: Counter[str] = Counter()
    root = os.stat(top)
    pending = [(name, frozenset({(root.st_dev, root.st_ino)} if name else ()))]
    while pending:
        inside, above = pending.pop()
        try:
            here = os.stat(top / inside)
            entries = list(os.scandir(top / inside))
        except OSError as error:
            raise UserError(f"{top / inside}: cannot be read ({error.strerror})") from error
        identity = here.st_dev, here.st_ino
        if identity in above:
            passed_over["links back to a folder above"] += 1
            continue
        folders[inside] = here.st_mtime_ns
        for entry in entries:
            relative = f"{inside}/{entry.name}" if inside else entry.name
            if is_no_data(entry.name):
                passed_over["hidden or the system's"] += 1
                continue
            dot = entry.name.rfind(".")
            suffix = entry.name[dot:].lower() if dot > 0 else ""
            try:
                stat = entry.stat()
            except OSError as error:
                if error.errno != errno.ELOOP and suffix in IMAGE_SUFFIXES:
                    found.append((relative, -1, -1))  # named as unreadable when its turn comes
                else:
                    passed_over["broken links"] += 1
                continue
            if S_ISDIR(stat.st_mode):
                if deep:
                    pending.append((relative, above | {identity}))
            elif not S_ISREG(stat.st_mode):
                passed_over["no files (pipes, sockets)"] += 1
            elif suffix in IMAGE_SUFFIXES:
                found.append((relative, stat.st_size, stat.st_mtime_ns))
            else:
                passed_over[suffix or "without an extension"] += 1
    found.sort()
    return _Part(
        files=[name for name, *_ in found], folders=folders, passed_over=passed_over,
        stats_N2=np.array([stats for _, *stats in found], np.int64).reshape(-1, 2),
    )  # fmt: skip


def tell_passed_over(folder: Path, passed_over: Counter[str]) -> None:
    """One warning about the files that were left out."""
    if passed_over:
        logger.warning(
            "%s: passed over %d entries that are no images by their names (%s); of files, %s are taken",
            folder, passed_over.total(), spell_counts(passed_over), ", ".join(sorted(IMAGE_SUFFIXES)),
        )  # fmt: skip


def spell_counts(counts: Counter[str]) -> str:
    """ "3 .gif, 2 without an extension" """
    return ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common(MOST_KINDS))
