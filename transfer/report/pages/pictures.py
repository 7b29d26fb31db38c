"""Pictures made small enough for a page, as bytes and as data URIs."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pretrain.common.files import regular
from transfer.report.evidence.collect import Picture

MAX_SIDE = 1200
MAX_BYTES = 300_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture as the report carries it."""

    name: str
    """File name under OUTPUT/pictures."""
    section: str = "studies"
    caption: str
    data: bytes
    mime: str
    width: int
    height: int

    @property
    def uri(self) -> str:
        """The bytes as a data URI."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"


def load(pictures: Sequence[Picture], *, per_folder: int) -> tuple[list[Shown], list[str]]:
    """The first `per_folder` pictures of each folder, and what was left out or could not be read."""
    shown: list[Shown] = []
    problems: list[str] = []
    by_folder: dict[Path, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_folder[picture.path.parent].append(picture)
    for folder, found in by_folder.items():
        for picture in found[:per_folder]:
            try:
                shown.append(_prepare(picture, f"{len(shown):03d}"))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                problems.append(f"{picture.path}: not a readable picture ({error})")
        if len(found) > per_folder:
            problems.append(
                f"{folder}: {len(found) - per_folder} more pictures not shown (--pictures shows more)"
            )
    return shown, problems


def _prepare(picture: Picture, number: str) -> Shown:
    """The file itself where it is small, else a JPEG of at most MAX_SIDE pixels."""
    raw = regular(picture.path).read_bytes()
    if picture.path.suffix.lower() == ".svg":
        width, height = _size_of_svg(raw)
        return Shown(
            name=f"{number}.svg", caption=picture.caption, data=raw, mime="image/svg+xml", width=width,
            height=height, section=picture.section,
        )  # fmt: skip
    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        width, height = image.size
        mime = Image.MIME.get(image.format or "", "")
        if len(raw) > MAX_BYTES or max(image.size) > MAX_SIDE or mime not in ("image/png", "image/jpeg"):
            image = image.convert("RGB")
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            width, height = image.size
            raw, mime = encode(image, "JPEG"), "image/jpeg"
    suffix = ".jpg" if mime == "image/jpeg" else ".png"
    return Shown(
        name=number + suffix, caption=picture.caption, data=raw, mime=mime, width=width, height=height,
        section=picture.section,
    )  # fmt: skip


def _size_of_svg(raw: bytes) -> tuple[int, int]:
    """Width and height of the view box. As an <img> an SVG runs no script and loads nothing."""
    box = re.search(rb'viewBox="[\d.+-]+[ ,]+[\d.+-]+[ ,]+([\d.]+)[ ,]+([\d.]+)"', raw)
    if b"<svg" not in raw or box is None:
        raise ValueError("no SVG with a view box")
    return round(float(box[1])), round(float(box[2]))


def encode(image: Image.Image, form: str) -> bytes:
    """PNG or JPEG bytes, the same for the same pixels."""
    out = io.BytesIO()
    image.save(out, form, **({"quality": 88} if form == "JPEG" else {"optimize": True}))
    return out.getvalue()
