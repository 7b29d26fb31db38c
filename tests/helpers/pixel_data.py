"""A small data set with label masks: coloured rectangles, whose class is their colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[20, 20, 20], [220, 40, 40], [40, 200, 60], [50, 70, 220]], np.uint8)
IGNORED = 255


def write_pixels(folder: Path, count: int, *, seed: int = 0, sides: tuple[int, int] = (52, 44)) -> Path:
    """`folder`/images/*.jpg and masks/*.png of classes 0 to 3 (a palette PNG, as VOC's), a border of 255."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    width, height = sides
    for number in range(count):
        labels = np.zeros((height, width), np.uint8)
        for label in (1, 2, 3):
            top, left = rng.integers(0, height - 16), rng.integers(0, width - 16)
            labels[top : top + 18, left : left + 18] = label
        Image.fromarray(COLOURS[labels]).save(folder / "images" / f"{number}.jpg", quality=95)
        labels[:2] = IGNORED
        mask = Image.fromarray(labels, mode="P")
        mask.putpalette(list(COLOURS.ravel()) + [224] * (768 - COLOURS.size))
        mask.save(folder / "masks" / f"{number}.png")
    return folder
