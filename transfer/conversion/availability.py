"""Whether detectron2 is installed, and the configs by name; importing this imports no detectron2."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

from pretrain.common.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "detection_configs"
SOURCE = "git+https://github.com/facebookresearch/detectron2.git"


def find_config(file: str | Path) -> Path:
    """The file, also when named as in detection_configs/ (with or without .yaml)."""
    for path in (Path(file), CONFIGS / file, CONFIGS / f"{file}.yaml", CONFIGS / Path(file).name):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith("Base")))
    raise UserError(f"--config-file {file}: no such file; known names: {known}")


def need_detectron2(else_do: str = "") -> None:
    """Raises UserError where detectron2 cannot be imported; `else_do` names a way without it."""
    try:
        with warnings.catch_warnings():
            # detectron2 compiles two functions with it at import: nothing that a user could change
            warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
            importlib.import_module("detectron2")
            importlib.import_module("detectron2.modeling")  # and what it stands on: fvcore, iopath ...
    except ImportError as error:
        raise UserError(
            f"detectron2 is missing or incomplete here ({error}): install it with `make env`, or from its "
            f"authors' source with `make env DETECTRON2=source` (pip install --no-build-isolation '{SOURCE}')"
            + (f"; {else_do}" if else_do else "")
        ) from error
