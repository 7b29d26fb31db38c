"""Files of detectron2 weights, read without running anything in them, and written."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.common.errors import UserError
from transfer.checkpoints.safe_load import load_file

AUTHOR = "intl-bench"


def read_pickle(path: str | Path) -> dict[str, Any]:
    """The content of a detectron2 .pkl file, arrays as tensors, if it holds arrays and plain values only.

    Raises UserError for any other file: detectron2 reads a .pkl with Python's own pickle, which runs what the
    file names.
    """
    raw = load_file(path)
    if raw.container != "pickle" or raw.placeholders:
        named = (
            f" (it asks for {', '.join(raw.placeholders[:3])}, which could run code)"
            if raw.placeholders
            else ""
        )
        raise UserError(f"{path}: not a pickle of arrays{named}; convert a checkpoint afresh")
    if not isinstance(raw.value, dict):
        raise UserError(f"{path}: holds a {type(raw.value).__name__}, wanted a dict of arrays")
    return raw.value


def read_detectron2(path: str | Path) -> dict[str, Any]:
    """The content of a detectron2 .pkl or .pth file, read without running anything from it.

    Raises UserError where it is none.
    """
    content = read_pickle(path) if Path(path).suffix == ".pkl" else load_file(path).value
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, wanted a dict of tensors")
    return content if isinstance(content.get("model"), dict) else {"model": content}


def write_pickle(path: str | Path, weights: Mapping[str, np.ndarray], origin: Mapping[str, Any]) -> None:
    """Write what DetectionCheckpointer reads. The names lack the prefix that they have inside a detector
    (`backbone.bottom_up.`, `roi_heads.` for res5 of a C4 one), so it must match them by suffix."""
    content = {
        "model": dict(weights),
        "__author__": AUTHOR,
        "matching_heuristics": True,
        "origin": dict(origin),
    }
    with open(path, "wb") as file:
        pickle.dump(content, file)
