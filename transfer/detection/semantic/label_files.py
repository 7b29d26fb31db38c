"""Label masks: grey or palette PNGs whose pixels are class numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from pretrain.common.errors import UserError
from pretrain.common.files import NoFile, regular

THREADS = 8
MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes of images with one number a pixel; P holds numbers into a palette, which are the labels."""


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    """A mask whose header has been read. Raises UserError for what is none, or shows other labels than it
    holds."""
    try:
        with Image.open(regular(file)) as image:
            if image.mode not in MODES:
                raise UserError(
                    f"{file} is an image of colours ({image.mode}); wanted class numbers in a grey or "
                    "palette PNG. One that was read and saved as RGB has lost them: take the original"
                )
            _refuse_scaled(file, image)
            if (way := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
                raise UserError(f"{file} is turned by its EXIF orientation ({way}): save it upright")
            yield image
    except NoFile as error:
        raise UserError(str(error)) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is not a readable mask ({error})") from error


def counts_of(file: str) -> tuple[np.ndarray, np.ndarray]:
    """The labels of a mask file and the pixels of each. Raises UserError as `read_labels`."""
    with _opened(file) as image:
        if image.mode in ("L", "P"):  # ten times faster than of an array
            counts = np.array(image.histogram())
            return counts.nonzero()[0], counts[counts > 0]
        return np.unique(_labels(image), return_counts=True)


def read_labels(file: str, dtype: Any = None, **_: Any) -> np.ndarray:
    """The labels of a mask file, height x width, a palette's numbers and not its colours.

    Raises UserError for an image of colours, which holds no class numbers.
    """
    with _opened(file) as image:
        return _labels(image, dtype)


def _labels(image: Image.Image, dtype: Any = None) -> np.ndarray:
    if image.mode in ("1", "I;16"):  # bool and uint16, which neither PyTorch nor OpenCV resizes
        dtype = dtype or (np.uint8 if image.mode == "1" else np.int32)
    return np.array(image, dtype=dtype)


def _refuse_scaled(file: str, image: Image.Image) -> None:
    """Pillow stretches grey of 2 and 4 bits to 0 to 255: a label 1 would read as 85 or 17."""
    if image.format == "PNG" and image.mode == "L":
        with open(file, "rb") as raw:
            depth = raw.read(25)[-1]  # behind signature, kind of the first chunk, width and height
        if depth < 8:
            raise UserError(f"{file} holds {depth} bits a pixel of grey; save its labels in 8 bits")


def size_of(file: str) -> tuple[int, int]:
    """Width and height from a mask's header. Raises UserError for what is no mask."""
    with _opened(file) as image:
        return image.size


def sizes_of(files: Sequence[str]) -> list[tuple[int, int]]:
    """Width and height of each."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(size_of, files, chunksize=64))


def check_masks(name: str, records: Sequence[Mapping[str, Any]], *, classes: int, ignored: int) -> np.ndarray:
    """Decode every mask; pixels of each class in all of them.

    Raises UserError for labels that are neither a class nor `ignored`, and where nothing is labelled.
    """

    def counted(record: Mapping[str, Any]) -> tuple[np.ndarray, dict[int, int]]:
        labels, counts = counts_of(record["sem_seg_file_name"])
        pixels = np.zeros(classes, np.int64)
        known = (labels >= 0) & (labels < classes)
        pixels[labels[known]] = counts[known]
        return pixels, {int(v): int(n) for v, n in zip(labels[~known], counts[~known]) if v != ignored}

    pixels_K, faults = np.zeros(classes, np.int64), []
    with ThreadPoolExecutor(THREADS) as pool:
        for record, (pixels, beyond) in zip(records, pool.map(counted, records, chunksize=8)):
            pixels_K += pixels
            faults += [(record["sem_seg_file_name"], beyond)] if beyond else []
    if faults:
        file, beyond = faults[0]
        values = sorted({v for _, found in faults for v in found})
        say = f"{', '.join(map(str, values[:5]))}{' ...' if len(values) > 5 else ''}"
        mend = (
            f"if its pixels are to be left out, add MODEL.SEM_SEG_HEAD.IGNORE_VALUE {values[0]}, else "
            if len(values) == 1 else ""
        )  # fmt: skip
        raise UserError(
            f"{name}: {len(faults)} of {len(records)} masks hold labels beyond 0 to {classes - 1} and the "
            f"ignored {ignored}: {say}, first in {file}; {mend}set MODEL.SEM_SEG_HEAD.NUM_CLASSES"
        )
    if not pixels_K.any():
        raise UserError(f"{name}: no pixel of its {len(records)} masks is labelled")
    return pixels_K
