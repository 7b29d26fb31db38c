"""Files of detectron2 weights, read without running anything in them, and written."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.common.errors import UserError

AUTHOR = "intl-bench"


class _PlainUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain values; anything else in the file is refused, never called."""

    ALLOWED = frozenset({
        ("collections", "OrderedDict"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"), ("numpy.core.numeric", "_frombuffer"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")
        return super().find_class(module, name)


def read_pickle(path: str | Path) -> dict[str, Any]:
    """The content of a detectron2 .pkl file, if it holds arrays and plain values only; else UserError."""
    try:
        content = _PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; write one with `python -m transfer convert`") from error
    except Exception as error:
        raise UserError(f"{path}: not a pickle of arrays ({error}); convert a checkpoint afresh") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, wanted a dict of arrays")
    return content


def read_detectron2(path: str | Path) -> dict[str, Any]:
    """The state dict in a detectron2 .pkl or .pth file, loaded without running anything from it."""
    if Path(path).suffix == ".pkl":
        content = read_pickle(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file") from error
        except Exception as error:
            raise UserError(f"{path}: not a checkpoint that loads safely ({error})") from error
    return content.get("model", content)


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
