"""Files with damage that their readers have to notice."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path


def spoilt(path: Path, record: str) -> Path:
    """The zip with the latter half of one record zeroed in place; its checksums stay what they were."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(record)
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + sum(struct.unpack("<HH", data[info.header_offset + 26 :][:4]))
    data[start + info.file_size // 2 : start + info.file_size] = bytes(info.file_size - info.file_size // 2)
    path.write_bytes(data)
    return path
