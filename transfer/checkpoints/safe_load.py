"""Tensors and plain values from a stranger's checkpoint file; nothing in it is run.

Every pickle, in a zip or bare, is read by `InertUnpickler`, never by torch.load, so that no version of torch
decides what is run or allocated. Tensors are views of the mapped file; a zip's checksums are compared.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import mmap
import struct
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pretrain.common.errors import UserError
from pretrain.common.files import NoFile, regular
from transfer.checkpoints.inert_pickle import InertUnpickler
from transfer.checkpoints.inert_values import Global, Placeholder, Refused, Storage, with_tensors
from transfer.checkpoints.other_files import folder_is, what_else

__all__ = ["Placeholder", "RawFile", "load_file"]

LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""0x1950a86a20f9469cfc6c as pickled: torch.save before 1.6 begins with it, after a few bytes of protocol."""
MAX_PICKLE_BYTES = 1 << 28
MAX_SAFETENSORS_HEADER = 100_000_000  # the limit of the safetensors library
SPARSE_FROM = 1 << 30

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawFile:
    """What a file holds: `value`, safetensors' `metadata`, and the globals that became placeholders."""

    value: Any
    metadata: dict[str, str]
    container: str
    """safetensors, zip, legacy or pickle: how the file is packed."""
    placeholders: tuple[str, ...] = ()
    """Names of the globals that were neither imported nor called, sorted."""


def load_file(path: str | Path) -> RawFile:
    """Read `path`, however it is packed. Raises UserError for what is no checkpoint or not safe to read."""
    path = Path(path)
    if not path.exists():
        there = [p.name for p in islice(path.parent.glob("*"), 1000)] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        raise UserError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    if path.is_dir():
        raise UserError(f"{path} {folder_is(path)}")
    try:
        regular(path)
    except NoFile as error:
        raise UserError(str(error)) from error
    stat = path.stat()
    if stat.st_size > SPARSE_FROM and 0 < stat.st_blocks * 512 < stat.st_size // 8:
        raise UserError(
            f"{path} is mostly a hole: {stat.st_size} bytes long, {stat.st_blocks * 512} of them written. "
            "Its download was cut off; fetch it again"
        )
    with open(path, "rb") as file:
        head = file.read(512)
    try:
        if _is_safetensors(path, head):
            return _load_safetensors(path)
        for container, fits, read in (
            ("zip", head.startswith(b"PK\x03\x04"), _read_zip),
            ("legacy", LEGACY_MAGIC in head[:30], _read_legacy),
            ("pickle", head.startswith(b"\x80"), _read_plain),
        ):
            if fits:
                value, names = read(path)
                return RawFile(
                    value=with_tensors(value),
                    metadata={}, container=container, placeholders=tuple(sorted(names)),
                )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # a broken file fails in many places of three libraries; none of them is ours
        said = str(error)[:300] or type(error).__name__
        raise UserError(
            f"{path} cannot be read safely: {said}. "
            "It is damaged or no checkpoint; compare its size with the published one and download it again"
        ) from error
    raise UserError(f"{path} is no checkpoint that can be read safely: {what_else(path, head)}")


def _read_zip(path: Path) -> tuple[Any, set[str]]:
    """torch.save since 1.6: a zip of data.pkl and one uncompressed record a storage."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos = archive.infolist()
        records = {info.filename: info for info in infos}
        twice = [name for name, n in Counter(info.filename.lower() for info in infos).items() if n > 1]
        if twice:
            raise Refused(f"its archive holds {twice[0][:80]!r} more than once (capitals do not count)")
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in records):
            raise UserError(
                f"{path} is a TorchScript archive, a program rather than weights: in Python, "
                "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'weights.pth'), where you "
                "trust it; then give weights.pth"
            )
        if len(pickles) != 1:
            npz = any(name.endswith(".npy") for name in records)
            raise UserError(
                f"{path} is a zip archive, but not one that torch.save wrote: no data.pkl in it"
                + (
                    "; it is NumPy's .npz: save its arrays as a dict with torch.save"
                    if npz
                    else "; unpack it and name the weight file in it"
                )
            )
        root = pickles[0].removesuffix("data.pkl")
        # torch.serialization.set_crc32_options(False) leaves every checksum 0
        checked = any(info.CRC for info in infos)
        mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        storages: dict[str, torch.UntypedStorage] = {}

        def start_of(info: zipfile.ZipInfo) -> int:
            """Where the record's data begin: after the local header, its name and its extra field."""
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if start + info.file_size > path.stat().st_size:
                raise Refused(f"record {info.filename[:80]!r} reaches beyond the end of the file")
            return start

        def compare(info: zipfile.ZipInfo, data: Any) -> None:
            if checked and zlib.crc32(data) != info.CRC:
                raise Refused(f"the checksum of its record {info.filename[:80]!r} does not match its content")

        def record(info: zipfile.ZipInfo) -> bytes:
            file.seek(start_of(info))
            data = file.read(info.file_size)
            compare(info, data)
            return data

        order = records.get(f"{root}byteorder")
        if order is not None and (order.compress_type != zipfile.ZIP_STORED or order.file_size > 16):
            raise Refused("its byteorder is compressed or longer than any checkpoint's")
        if order is not None and record(order).strip() != sys.byteorder.encode():
            raise UserError(f"{path} was written on a machine of another byte order")
        main = records[pickles[0]]
        if main.compress_type != zipfile.ZIP_STORED or main.file_size > MAX_PICKLE_BYTES:
            raise Refused("its data.pkl is compressed or larger than any checkpoint's")

        def find_storage(pid: Any) -> Storage:
            dtype, key, numel, _ = _check_pid(pid, 5)
            info = records.get(f"{root}data/{key}")
            if info is None:
                raise Refused(f"storage {key!r} is not in the archive")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != numel * dtype.itemsize:
                raise Refused(
                    f"storage {key!r} says {numel * dtype.itemsize} bytes, the archive {info.file_size}"
                )
            if key not in storages and numel:
                start = start_of(info)
                data = mapped[start : start + info.file_size]
                if checked:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        compare(info, torch.empty(0, dtype=torch.uint8).set_(data).numpy())  # type: ignore[call-overload]
                storages[key] = _aligned(data, start)
            return Storage(storages.get(key, torch.UntypedStorage(0)), dtype, numel)

        text = record(main)
        unpickler = InertUnpickler(io.BytesIO(text), find_storage, len(text))
        return unpickler.load(), unpickler.placeholders


def _read_plain(path: Path) -> tuple[Any, set[str]]:
    """A bare pickle: detectron2's weights are such files. It has no storages, only NumPy arrays."""

    def no_storage(_: Any) -> Storage:
        raise Refused("a storage in a plain pickle")

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        unpickler = InertUnpickler(view, no_storage, len(view))
        return unpickler.load(), unpickler.placeholders


def _read_legacy(path: Path) -> tuple[Any, set[str]]:
    """torch.save before 1.6: pickles of magic number, version, system, value, storage keys; data."""
    size = path.stat().st_size
    pickled = min(size, MAX_PICKLE_BYTES)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        storages: dict[str, Storage] = {}
        placeholders: set[str] = set()

        def find_storage(pid: Any) -> Storage:
            dtype, key, numel, part = _check_pid(pid, 6)
            if numel * dtype.itemsize > size:
                raise Refused(f"storage {key!r} says {numel * dtype.itemsize} bytes, the file has {size}")
            known = storages.setdefault(key, Storage(None, dtype, numel))
            if (known.dtype, known.numel) != (dtype, numel):
                raise Refused(f"storage {key!r} is described in two ways")
            if part is None:
                return known
            if not isinstance(part, tuple) or len(part) != 3 or any(type(n) is not int for n in part[1:]):
                raise Refused(f"storage {key!r} has a part that is not one")
            _, start, length = part
            if start < 0 or length < 0 or start + length > numel:
                raise Refused(f"a part of storage {key!r} reaches beyond it")
            step = dtype.itemsize
            data = None if known.data is None else known.data[start * step : (start + length) * step]
            return Storage(data, dtype, length)

        def load() -> Any:
            unpickler = InertUnpickler(view, find_storage, pickled)
            value = unpickler.load()
            placeholders.update(unpickler.placeholders)
            return value

        for _ in range(3):
            load()
        start_of_value = view.tell()
        load()  # sizes that lie end here, before anything is made
        keys = load()
        if not isinstance(keys, list) or {str(k) for k in keys} != set(storages):
            raise Refused("its list of storages does not match its tensors")
        position = view.tell()
        mapped = torch.UntypedStorage.from_file(str(path), False, size)
        for key in map(str, keys):
            known = storages[key]
            end = position + 8 + known.numel * known.dtype.itemsize
            if end > size or struct.unpack("<q", view[position : position + 8])[0] != known.numel:
                raise Refused(f"storage {key!r} is cut off or of another length than its tensors say")
            storages[key] = Storage(
                _aligned(mapped[position + 8 : end], position + 8), known.dtype, known.numel
            )
            position = end
        view.seek(start_of_value)
        return load(), placeholders


def _aligned(data: torch.UntypedStorage, start: int) -> torch.UntypedStorage:
    """A storage at an odd place of the mapped file is copied: kernels expect aligned elements."""
    return data if start % 16 == 0 else data.clone()


def _check_pid(pid: Any, length: int) -> tuple[torch.dtype, str, int, Any]:
    """dtype, key, elements and, in old files, the part of a storage's description."""
    if not isinstance(pid, tuple) or len(pid) != length or not isinstance(pid[1], Global):
        raise Refused("a storage whose description has another form")
    kind, type_, key, _, numel, *rest = pid
    module, _, name = type_.name.rpartition(".")
    if kind != "storage" or module not in ("torch", "torch.storage") or name not in _STORAGE_DTYPES:
        raise Refused(f"a storage of unknown type {type_.name}")
    if type(numel) is not int or numel < 0 or not isinstance(key, (str, int)):
        raise Refused("a storage whose length is no number")
    return _STORAGE_DTYPES[name], str(key)[:100], numel, rest[0] if rest else None


def _is_safetensors(path: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little") if len(head) > 8 else 0
    return 0 < length <= min(MAX_SAFETENSORS_HEADER, path.stat().st_size) and head[8:9] == b"{"


def _load_safetensors(path: Path) -> RawFile:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as file:
        metadata = {str(k): str(v) for k, v in (file.metadata() or {}).items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return RawFile(value=tensors, metadata=metadata, container="safetensors")
