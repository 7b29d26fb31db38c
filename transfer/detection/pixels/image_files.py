"""Image files, checked before training as detectron2 will read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.data import detection_utils
from PIL import ExifTags, Image

from pretrain.common.errors import UserError

SAMPLED_IMAGES = 32  # of each set, decoded before training; the headers of all are read
HEADER_THREADS = 8


def check_images(name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """The header of every image, and the whole of a sample, as detectron2 will read them."""
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        faults = [fault for fault in pool.map(_fault_of_header, records, chunksize=64) if fault]
    if faults:
        more = f" ({len(faults)} of {len(records)} images)" if len(faults) > 1 else ""
        raise UserError(f"{name}: {faults[0]}{more}")
    for record in records[:: max(1, len(records) // SAMPLED_IMAGES)]:
        try:
            detection_utils.read_image(record["file_name"], "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{record['file_name']}: not a readable image ({error}); replace it") from error


def _fault_of_header(record: Mapping[str, Any]) -> str | None:
    """Why detectron2 would fail on an image or misread it, seen from its header; None where it would not."""
    file = record["file_name"]
    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        return f"{file} is missing"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{file} is not a readable image ({error})"
    if mode[0] in "IF":
        return f"{file} has more than 8 bits a pixel, of which detectron2 makes white: convert it to 8 bits"
    shown = size[::-1] if turned else size
    said = (record.get("width", shown[0]), record.get("height", shown[1]))
    if said == shown:
        return None
    wanted = f"its annotation says {said[0]} x {said[1]}"
    if turned:
        return (
            f"{file} is shown as {shown[0]} x {shown[1]} by its EXIF orientation, {wanted}: detectron2 turns "
            "such images, and wants annotations of the turned one"
        )
    return f"{file} is {shown[0]} x {shown[1]}, {wanted}"
