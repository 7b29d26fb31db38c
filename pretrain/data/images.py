"""Image files: opened for their size, then decoded to 8-bit RGB, large JPEGs at a reduced size.

Conversions: every image becomes 8-bit RGB as `PIL.Image.convert("RGB")` makes it (an alpha channel is
dropped, CMYK and palettes are converted, EXIF rotation is not applied, as in the published pipelines); 16-bit
grey keeps its upper eight bits, where PIL (and torchvision with it) makes all above 255 white. Images of
32-bit integers or floats, of which nobody can tell what is white, are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from pretrain.common.errors import UserError

logger = logging.getLogger(__name__)

SIXTEEN_BIT_AS_I = ("PNG", "PPM")  # formats that have 16 bits at most, which PIL may open as mode I
TWELVE_BITS = 4096
SMALL_SIDE = 64  # px: an image set whose images all are at most this large is evaluated without cropping


class BrokenImage(UserError):
    """An image file that cannot be decoded; the message begins with its name."""


class OpenImage:
    """An image that is open: its size is known, its pixels are not decoded yet.

    `name` is what messages call it by, `advice` what they say can be done. Raises BrokenImage.
    """

    def __init__(self, file: str | Path | BinaryIO | Image.Image, name: str | Path, advice: str) -> None:
        self._name, self._advice = name, advice
        try:
            self._image = file if isinstance(file, Image.Image) else Image.open(file)
        except Exception as error:  # PIL's readers meet strange bytes with errors of every kind
            raise self._broken(error, file) from error

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole image, px."""
        return self._image.size

    def decode(self, least: tuple[int, int] | None = None) -> Image.Image:
        """8-bit RGB. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is no smaller than `least`.

        Raises BrokenImage.
        """
        try:
            if least is not None:
                self._image.draft(None, least)
            return to_rgb(self._image, self._name)
        except Exception as error:
            raise self._broken(error) from error

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(self, *_: object) -> None:
        self._image.close()

    def _broken(self, error: Exception, file: object = None) -> BrokenImage:
        if isinstance(error, FileNotFoundError):
            return BrokenImage(f"{self._name}: the file was removed after the folder was listed")
        reason = str(error) or type(error).__name__
        for named in (repr(str(self._name)), str(self._name), repr(file)):  # the message begins with the name
            reason = reason.replace(named, "")
        reason = " ".join(reason.split()).rstrip(": ")
        return BrokenImage(f"{self._name}: not a readable image ({reason}); {self._advice}")


def open_file(path: str | Path) -> OpenImage:
    """Open an image file. Raises BrokenImage naming it."""
    return OpenImage(path, path, "replace or remove the file")


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file to 8-bit RGB. Raises BrokenImage naming the file."""
    with open_file(path) as image:
        return image.decode()


def to_rgb(image: Image.Image, name: str | Path = "") -> Image.Image:
    """A PIL image as 8-bit RGB, see the module's first lines. Raises ValueError for 32 bits a channel."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BIT_AS_I)
    if image.mode in ("I", "F") and not deep:
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind}, PIL's mode {image.mode}; wanted 8 or 16 bits a channel")
    if not deep:
        return image.convert("RGB")
    levels = np.asarray(image).astype(np.uint32)
    if 0 < levels.max() < TWELVE_BITS:
        _warn_of_twelve_bits(Path(name))
    return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")


def _warn_of_twelve_bits(path: Path) -> None:
    if path.parent not in _warned:  # once a folder and process
        _warned.add(path.parent)
        logger.warning(
            "%s: a 16-bit image whose values stay below %d: are they 12-bit values? Of 16 bits the upper "
            "eight are kept, which leaves it nearly black; multiply its values by 16", path, TWELVE_BITS,
        )  # fmt: skip


_warned: set[Path] = set()


def common_small_side(count: int, open_image: Callable[[int], OpenImage]) -> int | None:
    """The side of the images where 32 of them spread over the set are all square, equal and small."""
    sizes: set[tuple[int, int]] = set()
    for i in range(0, count, max(1, count // 32)):
        try:
            with open_image(i) as image:
                sizes.add(image.size)
                largest = max(image.size)
        except BrokenImage:
            continue
        if len(sizes) > 1 or largest > SMALL_SIDE:
            return None
    width, height = sizes.pop() if sizes else (0, 1)
    return width if width == height else None
