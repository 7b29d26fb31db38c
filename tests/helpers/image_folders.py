"""Small folders of images, out of larger ones."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_first(source: Path, target: Path, count: int) -> None:
    """Of each class folder in `source` the first `count` files, into a folder of that name in `target`."""
    for kind in sorted(source.iterdir()):
        (target / kind.name).mkdir(parents=True)
        for file in sorted(kind.iterdir())[:count]:
            shutil.copyfile(file, target / kind.name / file.name)
