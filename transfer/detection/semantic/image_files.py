"""Image files, checked before training as detectron2 will read them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.data import detection_utils
from PIL import ExifTags, Image

from pretrain.common.errors import UserError
from pretrain.common.files import NoFile, regular

logger = logging.getLogger(__name__)

SAMPLED_IMAGES = 32  # of each set, decoded before training; the headers of all are read
HEADER_THREADS = 8


def check_images(name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """The header of every image, and the whole of a sample, as detectron2 will read them."""
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        seen = list(pool.map(_header, records, chunksize=64))
    faults = [fault for fault, _ in seen if fault]
    if faults:
        more = f" ({len(faults)} of {len(records)} images)" if len(faults) > 1 else ""
        raise UserError(f"{name}: {faults[0]}{more}")
    turned = sum(turned for _, turned in seen)
    if turned:
        logger.warning(
            "%s: %d of %d images are turned by their EXIF orientation, as detectron2 turns them: masks must "
            "be of the turned images", name, turned, len(records),
        )  # fmt: skip
    for record in records[:: max(1, len(records) // SAMPLED_IMAGES)]:
        try:
            detection_utils.read_image(record["file_name"], "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{record['file_name']}: not a readable image ({error}); replace it") from error


def _header(record: Mapping[str, Any]) -> tuple[str, bool]:
    """What an image's header says: why detectron2 would fail on it or misread it, empty where it would not;
    and whether it is turned by its EXIF orientation in a way that a mask's size does not show."""
    file = record["file_name"]
    try:
        with Image.open(regular(file)) as image:
            size, mode = image.size, image.mode
            way = image.getexif().get(ExifTags.Base.Orientation, 1)
    except FileNotFoundError:
        return f"{file} is missing", False
    except NoFile as error:
        return str(error), False
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{file} is not a readable image ({error})", False
    if mode[0] in "IF":
        why = "has more than 8 bits a pixel, of which detectron2 makes white: convert it to 8 bits"
        return f"{file} {why}", False
    turned = way in (5, 6, 7, 8)
    shown = size[::-1] if turned else size
    said = (record.get("width", shown[0]), record.get("height", shown[1]))
    if said == shown:
        hidden = way in (2, 3, 4) or (turned and size[0] == size[1])
        return "", hidden and "sem_seg_file_name" in record
    wanted = f"its annotation says {said[0]} x {said[1]}"
    if turned:
        return (
            f"{file} is shown as {shown[0]} x {shown[1]} by its EXIF orientation, {wanted}: detectron2 turns "
            "such images, and wants annotations of the turned one"
        ), False
    return f"{file} is {shown[0]} x {shown[1]}, {wanted}", False
