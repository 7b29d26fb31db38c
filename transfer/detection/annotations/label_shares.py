"""A share of a set's labels: which images of a COCO annotation file are trained on.

BASE.DRAW@PERCENT is a part of the data set BASE, of which N images are listed and M have an object to train
on. Both draws are those of published lists, which follow from COCO's file by a rule:

DRAW a number, its seed: the lists that semi-supervised detection reports on, there called folds 1 to 5 of 1,
2, 5 and 10 % (instances_train2017.1@10). Of the file's order int(PERCENT / 100 · N) images are drawn with
replacement and kept once, so that fewer remain
(https://github.com/google-research/ssl_detection/blob/00d52272f61b56eade8d5ace18213cba6c74f6d8/prepare_datasets/prepare_coco_data.py).

DRAW `first`: the first int(PERCENT / 100 · M) by rising id, as in SoCo's Mini COCO of 5 and 10 %
(https://github.com/hologerry/detectron2/blob/0de67f85b11786f111da3f8b2976fe70ddc97601/detectron2/data/build.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.common.errors import UserError

FORM = re.compile(r"(.+)\.(\d+|first)@(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class LabelShare:
    """A part of the set `base`, as its name says."""

    name: str
    base: str
    draw: str
    """The seed of the draw, or `first`."""
    percent: float

    def keep(self, content: dict[str, Any], usable: set[Any]) -> str:
        """Leave the share's images and their annotations alone in an annotation file's content; returns a
        note. `usable`: ids of the images with an object to train on. Raises UserError where none is left."""
        images = content["images"]
        if self.draw == "first":
            ids = sorted(usable)
            kept = set(ids[: int(self.percent / 100 * len(ids))])
        else:
            drawn = np.random.RandomState(int(self.draw)).choice(
                len(images), size=int(self.percent / 100 * len(images))
            )
            kept = {images[i]["id"] for i in drawn}
        if not kept:
            raise UserError(f"data set {self.name!r}: {self.percent:g} % of {len(images)} images are none")
        content["images"] = [i for i in images if i["id"] in kept]
        content["annotations"] = [a for a in content.get("annotations", []) if a["image_id"] in kept]
        return f"of the {len(images)} images of {self.base}"


def share_of(name: str) -> LabelShare | None:
    """The share of labels that a data set's name asks for; None for a whole set. Raises UserError for more
    than there is."""
    match = FORM.fullmatch(name)
    if match is None:
        return None
    base, draw, percent = match.groups()
    if not 0 < float(percent) <= 100 or (draw.isdigit() and int(draw) >= 2**32):
        raise UserError(
            f"data set {name!r}: wanted BASE.SEED@PERCENT or BASE.first@PERCENT, a percentage above 0 and at "
            "most 100, and a seed of 32 bits"
        )
    return LabelShare(name=name, base=base, draw=draw, percent=float(percent))


def percent_of(names: Iterable[str]) -> float:
    """The share of the labels that training sets of these names have, percent; 100 where it differs."""
    shares = {share.percent if (share := share_of(name)) else 100.0 for name in names}
    return shares.pop() if len(shares) == 1 else 100.0


def labelled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Which images a share came to: their number, and the SHA-256 of their sorted ids, one a line."""
    ids = "\n".join(map(str, sorted(r["image_id"] for r in records)))
    return {"images": len(records), "ids_sha256": hashlib.sha256(ids.encode()).hexdigest()}
