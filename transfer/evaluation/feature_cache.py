"""Features on disk: parts while they are being made, then one file, each checked when it is read back.

`parts-<hash>/` holds the parts that are done. A part's name is a hash of the network, the transform and the
files it covers, and a part ends where a file's name says so: when an image is added, removed or mended, the
parts without it stay what they are. `<hash>/` holds features.npy (float32, one row for each readable image)
and meta.json, which has its checksum and the images that could not be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from pretrain.common.errors import RunFailed, is_disk_full
from pretrain.common.files import atomic_path, write_json
from pretrain.common.locks import hold
from pretrain.common.output_folder import need_space
from pretrain.data.cache import checksum_of, load_arrays
from pretrain.data.datasets import KEEP_BYTES, ImageDataset
from pretrain.data.folders import stats_of

logger = logging.getLogger(__name__)

PART = 4096  # images, on average
FORMAT = 2
HEADER = 128  # bytes of an .npy header of two dimensions
PART_ARRAYS = ("features", "broken", "messages")

Broken = dict[int, str]
"""Position in the data set of each image that could not be read, and why."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images `start` to `stop` - 1 of those asked for."""

    start: int
    stop: int
    file: Path


@dataclass(frozen=True, kw_only=True)
class FeatureFolder:
    """Where the features of some images by one extractor are, or will be."""

    folder: Path
    parts: list[Part]
    meta: dict[str, Any] = field(repr=False)

    @staticmethod
    def of(cache: Path, meta: dict[str, Any], data: ImageDataset, indices: np.ndarray) -> FeatureFolder:
        """`meta` names network and transform; what the images are is added to it here."""
        whole = len(indices) == len(data)
        network = json.dumps(meta, sort_keys=True).encode()
        kind = hashlib.sha256(network + f"{data.name} {data.split} {whole}".encode()).hexdigest()[:32]
        meta = meta | {
            "dataset": data.name, "split": data.split, "data": data.fingerprint, "n": len(indices),
            "indices": hashlib.sha256(np.ascontiguousarray(indices, np.int64).tobytes()).hexdigest(),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache / f"parts-{kind}"
        parts = [
            Part(start=a, stop=b, file=folder / f"{hashlib.sha256(network + said).hexdigest()[:32]}.npz")
            for a, b, said in _cut(data, indices)
        ]
        return FeatureFolder(folder=cache / key, parts=parts, meta=meta)

    @property
    def file(self) -> Path:
        """The finished features, N x D float32."""
        return self.folder / "features.npy"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time makes the same features; a second waits and finds them made."""
        for folder in (self.folder, *{part.file.parent for part in self.parts}):
            folder.mkdir(parents=True, exist_ok=True)
        with hold(self.parts[0].file.parent / "lock", wait_s=None):
            yield

    def check_space(self, width: int) -> None:
        """Raises UserError where the disk has no room for what is missing: parts, then the whole."""
        missing = sum(part.stop - part.start for part in self.parts if not part.file.exists())
        need_space(self.folder, 4 * width * (missing + self.meta["n"]), "features, in --cache-dir")

    def broken(self, data: ImageDataset) -> Broken | None:
        """The unreadable images of finished features; None where there are none, or they are damaged.

        Reads the whole file for its checksum. An image that was unreadable and has changed since counts as
        damage: it is tried again.
        """
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            found: Broken = {int(i): str(message) for i, message in meta["broken"].items()}
            rows, checksum = meta["n"] - len(found), meta["crc32"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            rows = checksum = None
            found = {}
        features = mapped(self.file)
        if features is None or features.shape[0] != rows or checksum_of(self.file) != checksum:
            logger.warning("%s is damaged or cut off; its features are made again", self.file)
            return None
        return found if _still_broken(data, found) else None

    def write_part(self, part: Part, rows: Sequence[np.ndarray], broken: Broken, width: int) -> None:
        """`rows` of the readable images of `part`, in order, and its broken ones by position."""
        features = np.concatenate([np.zeros((0, width), np.float32), *rows])
        messages = np.frombuffer(json.dumps(list(broken.values())).encode(), np.uint8)
        with self.disk_full(), atomic_path(part.file) as aside, open(aside, "wb") as file:
            np.savez(
                file, features=features, broken=np.array(list(broken), np.int64), messages=messages
            )  # fmt: skip

    def join(self, data: ImageDataset, width: int) -> Broken | None:
        """All parts in order into one file, then without them.

        None where parts are missing or damaged: those are removed, to be made again.
        """
        broken: Broken = {}
        lost = False
        aside = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
        try:
            with self.disk_full(), open(aside, "wb") as file:
                file.write(bytes(HEADER))
                for part in self.parts:
                    found = self._read(part, width)
                    if found is None or not _still_broken(data, found[1]):
                        part.file.unlink(missing_ok=True)
                        lost = True
                    elif not lost:
                        file.write(np.ascontiguousarray(found[0]).data)
                        broken |= found[1]
                if lost:
                    return None
                file.seek(0)
                shape = (self.meta["n"] - len(broken), width)
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
                assert file.tell() == HEADER
                file.flush()
                os.fsync(file.fileno())
            checksum = checksum_of(aside)
            os.replace(aside, self.file)
        finally:
            aside.unlink(missing_ok=True)
        said = {str(i): message for i, message in broken.items()}
        write_json(self.folder / "meta.json", self.meta | {"crc32": checksum, "broken": said})
        for old in self.parts[0].file.parent.glob("*.npz"):
            old.unlink(missing_ok=True)
        return broken

    def _read(self, part: Part, width: int) -> tuple[np.ndarray, Broken] | None:
        arrays = load_arrays(part.file, PART_ARRAYS)
        if arrays is None:
            if part.file.exists():
                logger.warning("%s is damaged; its features are made again", part.file)
            return None
        messages = json.loads(arrays["messages"].tobytes())
        broken = dict(zip(arrays["broken"].tolist(), messages))
        wanted = (part.stop - part.start - len(broken), width)
        if arrays["features"].shape != wanted or arrays["features"].dtype != np.float32:
            logger.warning("%s holds %s features, wanted %s", part.file, arrays["features"].shape, wanted)
            return None
        return arrays["features"], broken

    @contextlib.contextmanager
    def disk_full(self) -> Iterator[None]:
        """Raises RunFailed, with one line, for a full disk."""
        try:
            yield
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise RunFailed(
                f"{self.folder.parent}: the disk is full; the finished parts are kept: free some space and "
                "run the same command again, or name another --cache-dir"
            ) from error


def _cut(data: ImageDataset, indices: np.ndarray) -> Iterator[tuple[int, int, bytes]]:
    """Start and stop of each part, and what says which images, in which state, it covers.

    A part ends after an image whose name has a certain hash, or is long enough: what changes before it does
    not move its end.
    """
    if data.pixels is not None:
        said = f"{data.fingerprint} {hashlib.sha256(indices.tobytes()).hexdigest()}"
        for start in range(0, len(indices), PART):
            yield start, min(start + PART, len(indices)), f"{said} {start}".encode()
        return
    stats_N2 = np.ascontiguousarray(data.stats_N2[indices], np.int64)
    names: list[bytes] = []
    start = 0
    for at, i in enumerate(indices.tolist(), 1):
        names.append(data.key(i).encode(errors=KEEP_BYTES))
        mixed = crc32(names[-1]) * 2_654_435_761 % 2**32  # a checksum's own bits follow a running number's
        if at == len(indices) or len(names) == 2 * PART or mixed < 2**32 // PART:
            yield start, at, b"\0".join(names) + stats_N2[start:at].tobytes()
            names, start = [], at


def _still_broken(data: ImageDataset, broken: Broken) -> bool:
    """Whether the files that could not be read are as they were then: they may have been mended in place."""
    if data.files is None or not broken:
        return True
    at = list(broken)
    if max(at) >= len(data):
        return False
    return bool(np.array_equal(stats_of(data.root, [data.files[i] for i in at]), data.stats_N2[at]))


def mapped(file: Path) -> np.ndarray | None:
    """features.npy, memory-mapped read-only; None where it is missing, cut off or no such array."""
    try:
        features = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features if features.ndim == 2 and features.dtype == np.float32 else None
