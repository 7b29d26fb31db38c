"""Locks between processes: one at a time holds a lock file, and the others are told who does.

The kernel's lock (flock), which it takes from a process that dies. Where a file system has none, a file
created exclusively, whose holder renews its lease: a holder that died on this machine is noticed at once, one
elsewhere when its lease has not been renewed for LEASE_S.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLease, Timeout

from pretrain.common.files import write_json

logger = logging.getLogger(__name__)

LEASE_S = 60.0
POLL_S = 0.2
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock: enough to tell its process from another that has its number later."""

    host: str
    pid: int
    started: str
    """Its start in clock ticks after boot, and the boot's own id; "" where the system says neither."""
    since: str
    """UTC, ISO 8601."""
    command: str

    @staticmethod
    def here() -> Holder:
        """This process, from now on."""
        return Holder(
            host=os.uname().nodename, pid=os.getpid(), started=process_start(os.getpid()),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"), command=_command(),
        )  # fmt: skip

    @property
    def is_here(self) -> bool:
        """Whether its process is there, on this machine."""
        return (
            self.host == os.uname().nodename and _lives(self.pid) and self.started == process_start(self.pid)
        )

    def __str__(self) -> str:
        gone = self.host == os.uname().nodename and not self.is_here
        note = "; it has ended, and one that it started still holds on" if gone else ""
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since}{note})"


class Held(Exception):
    """The lock is another process's; `by` is None where that did not say who it is."""

    def __init__(self, path: Path, by: Holder | None) -> None:
        super().__init__(f"{path} is held by {by or 'another process'}")
        self.by = by


@contextlib.contextmanager
def hold(path: str | Path, *, wait_s: float | None = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for as long as the block lasts. Raises Held after `wait_s` (None: never).

    Processes that are started meanwhile do not hold it. The file stays: waiters share it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: FileLock | SoftFileLease = FileLock(path, fallback_to_soft=False)
    try:
        _acquire(lock, path, wait_s)
    except Held:
        raise
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        lock = SoftFileLease(f"{path}.lease", lease_duration=LEASE_S, on_compromise=_lost)
        _acquire(lock, path, _until_expired(path, wait_s))
    try:
        with contextlib.suppress(OSError):  # on a full disk: it only helps others to know
            write_json(_note(path), asdict(Holder.here()))
        yield
    finally:
        with contextlib.suppress(OSError):
            _note(path).unlink(missing_ok=True)
        lock.release()


def holder(path: str | Path) -> Holder | None:
    """Who holds the lock file `path`, by its own account; None where nobody does or that is not known."""
    if not Path(path).exists() and not Path(f"{path}.lease").exists():
        return None
    try:
        with hold(path):
            return None  # its process was killed, and the number may be another's by now
    except Held as held:
        return held.by
    except OSError:
        return None


def _acquire(lock: FileLock | SoftFileLease, path: Path, wait_s: float | None) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        by = read_note(path)
        if wait_s == 0:
            raise Held(path, by) from None
        logger.info("waiting for %s, which %s holds", path, by or "another process")
        try:
            lock.acquire(timeout=-1 if wait_s is None else wait_s, poll_interval=POLL_S)
        except Timeout:
            raise Held(path, read_note(path)) from None


def _until_expired(path: Path, wait_s: float | None) -> float | None:
    """Long enough to see whether a holder on another machine still renews its lease."""
    by = read_note(path)
    if wait_s is None or (by is not None and by.is_here):
        return wait_s
    return max(wait_s, LEASE_S * 1.25)


def _lost(what: Any) -> None:
    logger.error(
        "%s was lost (%s): was this process stopped for %d s? Another may go on in its folder; end this one",
        what.lock_file, what.reason, LEASE_S,
    )  # fmt: skip


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.by")


def read_note(path: Path) -> Holder | None:
    """What the holder of a lock wrote beside it; it may be of one that was killed."""
    try:
        said = json.loads(_note(path).read_text(encoding="utf-8"))
        words = {k: str(said[k]) for k in ("host", "started", "since", "command")}
        return Holder(pid=int(said["pid"]), **words)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def process_start(pid: int) -> str:
    """What tells process `pid` from a later one of that number: boot id and start. "" where it is unknown,
    and for a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    state, *numbers = stat.rpartition(")")[2].split()
    return "" if state == "Z" else f"{numbers[18]} {boot}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _command() -> str:
    """The command in words: `transfer knn`, `pretrain`."""
    main = sys.modules.get("__main__")
    package = (getattr(main, "__package__", None) or Path(sys.argv[0] or "python").stem).partition(".")[0]
    word = next((w for w in sys.argv[1:2] if w.isidentifier() or "-" in w[1:-1]), "")
    return f"{package} {word}".strip() if not word.startswith("-") else package
