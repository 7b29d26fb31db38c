"""Arrays that are slow to compute, kept in the user's cache folder and checked when they are read back."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import numpy as np

from pretrain.common.files import atomic_path
from pretrain.common.locks import hold

BLOCK = 1 << 20  # bytes


def cache_dir() -> Path:
    """Where data sets fetched by this project are kept: $INTL_BENCH_DATA, else the user's cache folder."""
    own = os.environ.get("INTL_BENCH_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else cache / "intl-bench"


@contextlib.contextmanager
def one_at_a_time(kept: Path) -> Iterator[None]:
    """One process at a time; the others wait and find the work done. Without a writable cache, all work."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(hold(kept.with_suffix(".lock"), wait_s=None))
        yield


def save_arrays(kept: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` to `kept`, where that is possible."""
    with contextlib.suppress(OSError), atomic_path(kept) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(kept: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The arrays of `kept`; None where it is missing or damaged: the zip holds a checksum of each array."""
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def checksum_of(path: Path) -> int:
    """CRC-32 of a file's bytes, read block by block. Raises OSError."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total = crc32(block, total)
    return total


def packed(names: list[str]) -> np.ndarray:
    """Names as one array of bytes, which loads in a moment; none may hold a NUL."""
    return np.frombuffer("\0".join(names).encode(errors="surrogateescape"), np.uint8)


def unpacked(names: np.ndarray) -> list[str]:
    """The names of `packed`."""
    return names.tobytes().decode(errors="surrogateescape").split("\0") if names.size else []
