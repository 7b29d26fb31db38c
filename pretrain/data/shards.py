"""WebDataset shards: where each image lies in them, and its bytes when asked for.

A shard is a tar file. The members whose names agree up to the first dot are one sample, here an image
(`KEY.jpg`) and its class (`KEY.cls`, a whole number); other fields are passed over. The images are in the
order of (class, name, shard), so neither the cut into shards nor a shuffle before writing them matters, and
each is read with one `pread` where it lies: order, workers, ranks and resumption are those of a folder of
files. What is saved is opening a file an image, which costs a shared disk more than reading it does.

All headers are read once; what they say is kept in the user's cache folder under a hash of the shards' names,
sizes and modification times, so that a changed shard is read anew. The library webdataset is not needed to
read, only to write shards: the tests write theirs with it and compare with what it reads.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.common.errors import UserError
from pretrain.common.progress import Progress
from pretrain.data.cache import cache_dir, load_arrays, one_at_a_time, packed, save_arrays, unpacked

logger = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and field, as webdataset.tariterators has it
META = re.compile(r"__[^/]*__($|/)")  # members that webdataset leaves out
LABEL = "cls"
OPEN_SHARDS = 256
COLUMNS = ("names", "labels", "shards", "offsets", "sizes")
MOST_CLASSES = 1 << 20
LABEL_BYTES = 32  # a whole number is shorter
HEADER_BYTES = 1 << 20  # more than any extended header that holds a name

Stamp = tuple[int, int]
Place = tuple[int, str, int, int, int]
"""(class, member's name, shard, offset, size in bytes): they sort into the order of the data set."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The images of some shards: N of them."""

    paths: list[Path]
    stamps: list[Stamp]
    """Size and modification time in ns of each shard when its headers were read."""
    names: list[str]
    labels_N: np.ndarray
    shard_N: np.ndarray
    offset_N: np.ndarray
    size_N: np.ndarray

    def key(self, i: int) -> str:
        """SHARD.tar/MEMBER of image `i`."""
        return f"{self.paths[self.shard_N[i]].name}/{self.names[i]}"

    def read(self, i: int) -> bytes:
        """The bytes of image `i`. Raises OSError for a shard that is gone, cut off or another by now."""
        shard = int(self.shard_N[i])
        size = int(self.size_N[i])
        file = _opened(self.paths[shard], self.stamps[shard])
        found = os.pread(file.fileno(), size, int(self.offset_N[i]))
        if len(found) < size:
            raise OSError(f"{len(found)} of {size} bytes are there")
        return found


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _opened(path: Path, stamp: Stamp) -> BinaryIO:
    """The shard, open for `pread`, which forked workers may share; closed when it falls out of the cache."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    if _stamp(os.fstat(file.fileno())) != stamp:
        file.close()
        raise OSError("the shard has changed since it was opened; start again")
    return file  # type: ignore[return-value]


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_size, stat.st_mtime_ns


def find_shards(root: Path, prefixes: Sequence[str]) -> list[Path]:
    """`root`/PREFIX-*.tar (or NAME-PREFIX-*.tar) of the first prefix that has any. Raises UserError."""
    for prefix in prefixes:
        found = {*root.glob(f"{prefix}-*.tar"), *root.glob(f"*-{prefix}-*.tar")}
        if found:
            return sorted(found)
    wanted = " or ".join(f"{prefix}-*.tar" for prefix in prefixes)
    packed = sorted(p.name for p in root.glob("*") if p.name.endswith((".tar.gz", ".tgz", ".tar.zst")))
    hint = f"; {packed[0]} is compressed, so that single images cannot be read: unpack it" if packed else ""
    raise UserError(f"{root}: holds no shard {wanted}{hint}")


def open_shards(paths: Sequence[Path], suffixes: frozenset[str]) -> Shards:
    """The images (members with one of `suffixes`) of `paths`, their headers read unless that was done before.

    Raises UserError for a shard that is cut off or damaged, a sample without class or image, no image at all.
    """
    stamps = [_stamp(path.stat()) for path in paths]
    said = "\n".join(f"{path.name}\0{size}\0{time}" for path, (size, time) in zip(paths, stamps))
    digest = hashlib.sha256(
        f"{FORMAT} {sorted(suffixes)}\n{said}".encode(errors="surrogateescape")
    ).hexdigest()
    kept = cache_dir() / "shards" / f"{digest[:32]}.npz"
    with one_at_a_time(kept):
        columns = load_arrays(kept, COLUMNS)
        if columns is None or not _fits(columns, len(paths)):
            columns = _columns(_places(paths, suffixes))
            save_arrays(kept, columns)
    names = unpacked(columns["names"])
    return Shards(
        paths=list(paths), stamps=stamps, names=names, labels_N=columns["labels"], shard_N=columns["shards"],
        offset_N=columns["offsets"], size_N=columns["sizes"],
    )  # fmt: skip


def _fits(columns: dict[str, np.ndarray], shards: int) -> bool:
    """Whether the columns that were kept belong together."""
    counts = {len(unpacked(columns["names"])), *(columns[name].size for name in COLUMNS[1:])}
    return (
        len(counts) == 1
        and all(columns[name].ndim == 1 for name in COLUMNS)
        and (columns["shards"].min() >= 0 and columns["shards"].max() < shards)
    )


def _columns(places: list[Place]) -> dict[str, np.ndarray]:
    labels, names, shards, offsets, sizes = zip(*places)
    return {
        "names": packed(list(names)), "labels": np.array(labels, np.int64),
        "shards": np.array(shards, np.int32), "offsets": np.array(offsets, np.int64),
        "sizes": np.array(sizes, np.int64),
    }  # fmt: skip


def _places(paths: Sequence[Path], suffixes: frozenset[str]) -> list[Place]:
    """Of all images, in the order of the data set."""
    places: list[Place] = []
    # One after another: tarfile's work is Python's own, and threads would only take turns at it.
    with Progress(len(paths), label=f"headers of {len(paths)} shards", unit="shard") as bar:
        for number, path in enumerate(paths):
            found = _scan(path, suffixes=suffixes)
            places += [(label, name, number, offset, size) for label, name, offset, size in found]
            bar.update(1)
    if not places:
        raise UserError(f"{paths[0].parent}: no sample in {len(paths)} shards")
    return sorted(places)


def _scan(path: Path, *, suffixes: frozenset[str]) -> list[tuple[int, str, int, int]]:
    """(class, name, offset, size) of each image of a shard. Raises UserError."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            tar = tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if not 0 <= member.size <= length - member.offset_data:
                    raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes")
                if "\0" in member.name:
                    raise tarfile.ReadError(f"a name with a NUL byte, {member.name[:60]!r}")
                match = NAME.fullmatch(member.name)
                if not member.isreg() or match is None or META.match(member.name):
                    continue
                key, field = match[1], match[2].lower()
                if field == LABEL:
                    text = os.pread(file.fileno(), min(member.size, LABEL_BYTES + 1), member.offset_data)
                    labels[key] = _label(text, f"{path}: {member.name}")
                elif f".{field}" in suffixes:
                    if key in images:
                        raise UserError(
                            f"{path}: sample {key} has two images, {images[key][0]} and {member.name}"
                        )
                    images[key] = member.name, member.offset_data, member.size
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a whole tar file ({error}); write or fetch it again") from error
        # tarfile takes a header that it cannot read for the end; the true end is a block of zeros.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path}: cut off or damaged after {len(images)} images (byte {tar.offset}); "
                "write or fetch it again"
            )
    for what, lost in (
        (f".{LABEL}", images.keys() - labels.keys()),
        ("image", labels.keys() - images.keys()),
    ):
        if lost:
            raise UserError(
                f"{path}: {len(lost)} of {len(images | labels)} samples have no {what} "
                f"({', '.join(sorted(lost)[:3])}); "
                f"wanted KEY.{LABEL} and one of KEY{', KEY'.join(sorted(suffixes))}"
            )
    return [(labels[key], *place) for key, place in images.items()]


class _Headers:
    """A shard as tarfile reads it: headers alone, none of a size that only an attack or damage has."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise OSError(f"a header of {size} bytes")
        return self._read(size)


def _label(text: bytes, where: str) -> int:
    try:
        label = int(text) if len(text) <= LABEL_BYTES else -1
    except ValueError:
        label = -1
    if not 0 <= label < MOST_CLASSES:
        raise UserError(
            f"{where}: wanted a class as a whole number from 0 to {MOST_CLASSES - 1}, got {text[:40]!r}"
        )
    return label
