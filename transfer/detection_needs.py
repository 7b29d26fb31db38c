"""A command that needs detectron2 asks here before its work: silence, or how to install it."""

from __future__ import annotations

import importlib
import warnings

from pretrain.cli import UserError

SOURCE = "git+https://github.com/facebookresearch/detectron2.git"


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
