"""A checked copy of a data set on this node's own disk.

The first process of a node copies while the others wait for its lock; who comes later finds the copy done. A
copy that was cut off goes on with the files that are missing. The copy lies in DIR/<name>-<hash of the source
path>, its file times are those of the source, so cached features stay valid, and it counts as done only when
every file of the source is there with its size.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from typing import Any
from zlib import crc32

from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import write_json
from pretrain.common.progress import Progress

logger = logging.getLogger(__name__)

DONE = ".staged.json"
LOCK = ".staging.lock"
PART = ".staging-part"
BLOCK = 1 << 20
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
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--stage-to {stage_to}: cannot be written to ({error.strerror})") from error
    with _locked(target):
        launch = _launch()
        if launch and _mark(target).get("launch") == launch:
            return target  # another rank of this run has compared copy and source a moment ago
        wanted = listing(source)
        if not wanted.files:
            raise UserError(f"--data-dir {source}: holds no file")
        if _mark(target).get("digest") == wanted.digest == listing(target).digest:
            logger.info("%s is staged in %s", source, target)
        else:
            (target / DONE).unlink(missing_ok=True)
            _copy(source, target, wanted)
            _check(target, wanted)
        mark = {"source": str(source), "digest": wanted.digest, "files": len(wanted.files), "launch": launch}
        write_json(target / DONE, mark)
    return target


def _launch() -> str:
    """What the ranks of one run have in common and no other run has; "" with one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ.get(name, "-") for name in names)


def _mark(target: Path) -> dict[str, Any]:
    """What the finished copy says of itself; empty where there is none."""
    try:
        return json.loads((target / DONE).read_text())
    except (OSError, ValueError):
        return {}


def listing(folder: Path) -> Listing:
    """All regular files under `folder`, links followed; this module's own files left out."""
    found: dict[str, tuple[int, int]] = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = os.path.join(root, name)
            relative = os.path.relpath(path, folder)
            if relative in (DONE, LOCK) or name.endswith(PART):
                continue
            try:
                stat = os.stat(path)
            except FileNotFoundError as error:
                raise UserError(f"{path}: a link to nothing; repair it or take it away") from error
            found[relative] = (stat.st_size, stat.st_mtime_ns // 10**9)
    return Listing(files=found)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time; the system takes the lock from one that is killed."""
    with open(target / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process stages into %s; waiting", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(source: Path, target: Path, wanted: Listing) -> None:
    """Copy what is missing or different, take away what the source no longer has."""
    there = listing(target).files
    for name in there.keys() - wanted.files.keys():
        (target / name).unlink()
    missing = [name for name, stat in wanted.files.items() if there.get(name) != stat]
    size = sum(wanted.files[name][0] for name in missing)
    disk = shutil.disk_usage(target)
    spare = min(SPARE_BYTES, disk.total // 50)
    if size > disk.free - spare:
        raise UserError(
            f"--stage-to {target.parent}: {size / 1e9:.1f} GB to copy and {disk.free / 1e9:.1f} GB free, of "
            f"which {spare / 1e9:.1f} are to stay so; name a larger disk or leave --stage-to out"
        )
    for folder in {os.path.dirname(name) for name in missing}:
        (target / folder).mkdir(parents=True, exist_ok=True)

    try:
        with (
            ThreadPoolExecutor(THREADS) as pool,
            Progress(len(missing), label=f"staging {source.name}", unit="file") as bar,
        ):
            for _ in pool.map(partial(_copy_file, source, target), missing):
                bar.update(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--stage-to {target.parent}: the disk is full; free some or name another"
            ) from error
        raise RunFailed(f"{target}: copying failed ({error}); run again to go on") from error


def _copy_file(source: Path, target: Path, name: str) -> None:
    """Copy one file with its times, read the copy again and compare; under its own name only when whole."""
    aside = (target / name).with_name(Path(name).name + PART)
    with open(source / name, "rb") as original, open(aside, "wb") as copied:
        wanted = 0
        while block := original.read(BLOCK):
            copied.write(block)
            wanted = crc32(block, wanted)
    with open(aside, "rb") as copied:
        got = 0
        while block := copied.read(BLOCK):
            got = crc32(block, got)
    if got != wanted:
        raise OSError(f"{name}: the copy has other bytes than were written")
    shutil.copystat(source / name, aside)
    aside.replace(target / name)


def _check(target: Path, wanted: Listing) -> None:
    """Raises RunFailed unless the copy has every file of the source with its size and time, and no other."""
    copied = listing(target).files
    wrong = [n for n in wanted.files.keys() | copied.keys() if wanted.files.get(n) != copied.get(n)]
    if wrong:
        raise RunFailed(
            f"{target}: {len(wrong)} files are not as in the source ({', '.join(sorted(wrong)[:3])}); did it "
            "change meanwhile? Run again to mend the copy"
        )
