"""Images that cannot be read, of whatever kind, are one line that names them; 12 bits in 16 are told."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data import images
from pretrain.data.datasets import open_dataset
from pretrain.data.images import BrokenImage, open_file, read_image


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((1 + 3 * min(width, 8)) * min(height, 8)))
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + b"".join(more)
        + _chunk(b"IDAT", rows)
        + _chunk(b"IEND", b"")
    )


BAD = {
    "bomb.png": _png(20_000, 20_000),  # 400 megapixels
    "text.png": _png(8, 8, _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20)))),
    "cut.png": _png(8, 8)[:45],
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html>",
    "head.bmp": b"BM" + bytes(30),
    "tiff.tif": b"II*\0" + struct.pack("<IHHHII", 8, 1, 256, 12, 1, 0xFFFFFF),
    "webp.webp": b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8),
    "huge.ppm": b"P6 99999999999 99999999999 255\n",
    "odd.ppm": b"P6 8 x8 255\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_bad_file_is_one_line_with_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(BrokenImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a readable image (") and message.count(name) == 1
    assert "\n" not in message and "image ()" not in message


def test_a_folder_of_bad_files_opens(tmp_path: Path) -> None:
    for name, data in BAD.items():
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / name).write_bytes(data)
    data = open_dataset("imagefolder", tmp_path, "train")
    assert len(data) == len(BAD)


def test_twelve_bits_are_told_once_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images._warned.clear()
    for name, top in (("a", 4095), ("b", 4000), ("full", 65535), ("black", 0)):
        Image.fromarray(np.array([[0, top]], np.uint16)).save(tmp_path / f"{name}.png")
    for name in ("full", "black"):
        read_image(tmp_path / f"{name}.png")
    assert caplog.text == ""
    for name in ("a", "b"):
        assert np.asarray(read_image(tmp_path / f"{name}.png"))[0, :, 0].tolist() == [0, 15]
    assert caplog.text.count("12-bit") == 1 and f"{tmp_path}/a.png" in caplog.text


def test_the_size_is_known_before_the_pixels_are(tmp_path: Path) -> None:
    Image.effect_noise((160, 80), 40).save(tmp_path / "a.jpg")
    with open_file(tmp_path / "a.jpg") as image:
        assert image.size == (160, 80)
        assert image.decode((40, 20)).size == (40, 20)
    with open_file(tmp_path / "a.jpg") as image:
        assert image.decode((50, 20)).size == (80, 40)  # no smaller than asked for
    assert read_image(tmp_path / "a.jpg").size == (160, 80)
