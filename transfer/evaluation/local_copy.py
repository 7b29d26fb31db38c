"""A checked copy of a data set on this node's own disk.

The first process of a node copies while the others wait for its lock; who comes later finds the copy done. A
copy that was cut off goes on with the files that are missing. The copy lies in DIR/<name>-<hash of the source
path>, a folder that is its owner's alone to write in. Its file times are those of the source, so cached
features stay valid. A journal in it has the checksum that each file of the source had when it was copied;
every run compares the copy's bytes with it (once for all ranks of a node) and copies anew what differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISDIR, S_ISREG, S_IWGRP, S_IWOTH
from typing import Any
from zlib import crc32

from pretrain.common.errors import RunFailed, UserError, is_disk_full
from pretrain.common.files import read_jsonl, write_json
from pretrain.common.locks import hold
from pretrain.common.machine import launch_id
from pretrain.common.progress import Progress
from pretrain.data.cache import BLOCK, checksum_of

logger = logging.getLogger(__name__)

DONE = ".staged.json"
LOCK = ".staging.lock"
JOURNAL = ".staging.journal"
PART = ".staging-part"
THREADS = 16  # copies at the same time: small files on a network disk wait far more than they work
SPARE_BYTES = 10**9  # of the disk that are left free, but no more than a fiftieth of it


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Files under a folder, relative to it, with (size, modification time).

    In whole seconds: a local file system may keep coarser times than the source's.
    """

    files: dict[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())

    @property
    def digest(self) -> str:
        """SHA-256 of names, sizes and times: changes when the data does."""
        lines = (f"{name}\0{size}\0{time}\n" for name, (size, time) in sorted(self.files.items()))
        total = hashlib.sha256()
        for line in lines:
            total.update(line.encode(errors="surrogateescape"))
        return total.hexdigest()


def stage(source: str | Path, stage_to: str | Path) -> Path:
    """Copy the folder `source` under the node-local folder `stage_to` unless it is there; the copy's path.

    May be called by several processes of a node at once. Raises UserError for a source that is no folder, a
    place inside the source, or a disk that is too small; RunFailed where a copied file is not as the source.
    """
    source, stage_to = Path(source).resolve(), Path(stage_to).expanduser().resolve()
    if not source.is_dir():
        raise UserError(f"--data-dir {source}: no such folder")
    if stage_to == source or source in stage_to.parents:
        raise UserError(f"--stage-to {stage_to} lies inside the data set {source}; name another folder")
    target = stage_to / f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
    try:
        stage_to.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            target.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(f"--stage-to {stage_to}: cannot be written to ({error.strerror})") from error
    _check_owner(target)
    with _locked(target):
        launch = launch_id()
        if launch and _mark(target).get("launch") == launch:
            return target  # another rank of this run has compared copy and source a moment ago
        wanted = listing(source)
        if not wanted.files:
            raise UserError(f"--data-dir {source}: holds no file")
        (target / DONE).unlink(missing_ok=True)
        missing = _missing(target, wanted)
        if missing:
            _copy(source, target, wanted, missing)
        else:
            logger.info("%s is staged in %s", source, target)
        _check(target, wanted)
        mark = {"source": str(source), "digest": wanted.digest, "files": len(wanted.files), "launch": launch}
        write_json(target / DONE, mark)
    return target


def _check_owner(target: Path) -> None:
    """Raises UserError for a folder that somebody else made, or may write in: its files could be anything."""
    stat = os.lstat(target)
    ours = S_ISDIR(stat.st_mode) and stat.st_uid == os.geteuid()
    if not ours or stat.st_mode & (S_IWGRP | S_IWOTH):
        why = "other users may write in it: chmod go-w" if ours else "another user's, or no folder"
        raise UserError(f"--stage-to: {target} can be changed by others ({why}); or name another folder")


def _mark(target: Path) -> dict[str, Any]:
    """What the finished copy says of itself; empty where there is none."""
    try:
        return json.loads((target / DONE).read_text())
    except (OSError, ValueError):
        return {}


def listing(folder: Path, *, follow: bool = True) -> Listing:
    """All regular files under `folder`, links followed or left out; this module's own files left out.

    Raises UserError for a link to nothing, or back to a folder above.
    """
    found: dict[str, tuple[int, int]] = {}
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for root, folders, names in os.walk(folder, followlinks=follow):
        here = os.stat(root)
        known = above.pop(root, frozenset())
        if (here.st_dev, here.st_ino) in known:
            raise UserError(f"{root}: a link back to a folder above it; remove it")
        above |= {os.path.join(root, n): known | {(here.st_dev, here.st_ino)} for n in folders}
        for name in names:
            path = os.path.join(root, name)
            relative = os.path.relpath(path, folder)
            if relative in (DONE, JOURNAL) or relative.startswith(LOCK) or name.endswith(PART):
                continue
            try:
                stat = os.stat(path) if follow else os.lstat(path)
            except OSError as error:
                raise UserError(f"{path}: a broken link; repair or remove it") from error
            if S_ISREG(stat.st_mode) or not follow:
                found[relative] = (stat.st_size, stat.st_mtime_ns // 10**9)
    return Listing(files=found)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(target / LOCK, wait_s=None))
        except OSError as error:
            raise UserError(f"{target / LOCK}: cannot be used as the lock file ({error.strerror})") from error
        yield


def _missing(target: Path, wanted: Listing) -> list[str]:
    """Files of the source that the copy lacks, or has with other bytes, size or time; others are removed."""
    there = listing(target, follow=False).files
    for name in there.keys() - wanted.files.keys():
        (target / name).unlink()
    sums = _journal(target)
    alike = [
        n for n, stat in wanted.files.items() if there.get(n) == stat and sums.get(n, ("", 0))[0] == stat
    ]
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress(len(alike), label=f"checking {target.name}", unit="file") as bar,
    ):
        for name, found in zip(alike, pool.map(lambda name: checksum_of(target / name), alike)):
            bar.update(1)
            if found != sums[name][1]:
                logger.warning("%s: not the bytes that were copied; copied again", target / name)
                there.pop(name)
    good = {name for name in alike if name in there}
    return [name for name in wanted.files if name not in good]


def _journal(target: Path) -> dict[str, tuple[tuple[int, int], int]]:
    """By name: size and time of the source's file when it was copied, and the checksum of its bytes."""
    found = {}
    for line in read_jsonl(target / JOURNAL):
        with contextlib.suppress(LookupError, TypeError, ValueError):
            found[str(line["name"])] = (int(line["size"]), int(line["time"])), int(line["crc32"])
    return found


def _copy(source: Path, target: Path, wanted: Listing, missing: list[str]) -> None:
    """Copy the files `missing`, and note the checksum of each as soon as it is there."""
    size = sum(wanted.files[name][0] for name in missing)
    disk = shutil.disk_usage(target)
    spare = min(SPARE_BYTES, disk.total // 50)
    if size > disk.free - spare:
        raise UserError(
            f"--stage-to {target.parent}: {size / 1e9:.1f} GB to copy and {disk.free / 1e9:.1f} GB free, of "
            f"which {spare / 1e9:.1f} are kept free; name a larger disk or leave --stage-to out"
        )
    for folder in {os.path.dirname(name) for name in missing}:
        (target / folder).mkdir(parents=True, exist_ok=True)

    try:
        with (
            ThreadPoolExecutor(THREADS) as pool,
            Progress(len(missing), label=f"staging {source.name}", unit="file") as bar,
            open(target / JOURNAL, "a", encoding="utf-8", buffering=1) as journal,
        ):
            for name, total in zip(missing, pool.map(partial(_copy_file, source, target), missing)):
                size, time = wanted.files[name]
                record = {"name": name, "size": size, "time": time, "crc32": total}
                journal.write(json.dumps(record) + "\n")
                bar.update(1)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"--stage-to {target.parent}: the disk is full; free some or name another"
            ) from error
        raise RunFailed(f"{target}: copying failed ({error}); run again to go on") from error


def _copy_file(source: Path, target: Path, name: str) -> int:
    """Copy one file with its times, read the copy again and compare; under its own name only when whole.

    Returns its checksum.
    """
    aside = (target / name).with_name(Path(name).name + PART)
    wanted = 0
    with open(source / name, "rb") as original, open(aside, "wb") as copied:
        while block := original.read(BLOCK):
            copied.write(block)
            wanted = crc32(block, wanted)
    if checksum_of(aside) != wanted:
        raise OSError(f"{name}: the copy has other bytes than were written")
    shutil.copystat(source / name, aside)
    aside.replace(target / name)
    return wanted


def _check(target: Path, wanted: Listing) -> None:
    """Raises RunFailed unless the copy has every file of the source with its size and time, and no other."""
    copied = listing(target, follow=False).files
    wrong = [n for n in wanted.files.keys() | copied.keys() if wanted.files.get(n) != copied.get(n)]
    if wrong:
        raise RunFailed(
            f"{target}: {len(wrong)} files are not as in the source ({', '.join(sorted(wrong)[:3])}); did it "
            "change meanwhile? Run again to mend the copy"
        )
