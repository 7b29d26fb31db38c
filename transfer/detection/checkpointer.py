"""Weights into a detector, every tensor accounted for.

detectron2 only warns when weights do not match and trains from scratch. Here the tensors that a backbone file
cannot hold are named, everything else must load.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from pretrain.common.errors import UserError
from pretrain.common.files import atomic_path, write_text
from transfer.conversion.weights_file import read_pickle

# New in a detector that starts from a backbone file.
HEADS = re.compile(
    r"(proposal_generator\.|roi_heads\.(box_head|box_predictor|mask_head)\.|roi_heads\.res5\.norm\."
    r"|backbone\.fpn_(lateral|output)\d\.|pixel_(mean|std)$)"
)
# Counters that no computation reads; frozen BatchNorm has none, older files neither.
COUNTERS = re.compile(r".*\.num_batches_tracked$")
# Files of the Caffe2 model zoo fold BatchNorm's statistics into its weight and bias, and hold the classifier.
CAFFE2_MISSING = re.compile(r".*\.running_(mean|var)$")
CAFFE2_EXTRA = re.compile(r"(fc1000\.|stem\.fc\.|stem\.conv1\.bias$)")


class StrictCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer that raises UserError on any tensor missing, left over or of another shape,
    reads safely, and writes atomically."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._caffe2 = False
        self._whole = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load `path`; what the file holds beside the model is returned."""
        self._path = path
        return super().load(path, *args, **kwargs)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write `name`.pth whole or not at all, then point `last_checkpoint` at it."""
        if not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        with atomic_path(Path(self.save_dir) / f"{name}.pth") as aside:
            torch.save({**data, **kwargs}, aside)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> Any:
        if filename.endswith(".pkl"):
            read_pickle(filename)  # refuses a file that would run code, before detectron2 opens it
        content = super()._load_file(filename)
        self._caffe2 = content.get("__author__") == "Caffe2"
        self._whole = any(k.startswith("proposal_generator.") for k in content["model"])
        return content

    def _torch_load(self, f: str) -> Any:
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise UserError(f"{f}: not a checkpoint that loads safely ({error})") from error

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing = [
            k for k in incompatible.missing_keys
            if not COUNTERS.match(k)
            and (self._whole or not HEADS.match(k))
            and not (self._caffe2 and CAFFE2_MISSING.match(k))
        ]  # fmt: skip
        extra = [
            k for k in incompatible.unexpected_keys
            if not COUNTERS.match(k) and not (self._caffe2 and CAFFE2_EXTRA.match(k))
        ]  # fmt: skip
        shapes = [f"{k} {tuple(a)} for {tuple(b)}" for k, a, b in incompatible.incorrect_shapes]
        if missing or extra or shapes:
            found = [
                f"{len(names)} {what} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
                for what, names in (
                    ("not in the file", missing),
                    ("unknown to the model", extra),
                    ("of another shape", shapes),
                )
                if names
            ]  # fmt: skip
            raise UserError(
                f"{self._path} does not fit the config's model; tensors: {'; '.join(found)}. Use the config "
                "of this architecture, or ask for --random-init"
            )
        incompatible.missing_keys.clear()
        incompatible.unexpected_keys.clear()
        return incompatible


def local_path(weights: str) -> str:
    """MODEL.WEIGHTS as a file on this machine: a path as it is, detectron2:// and https:// downloaded."""
    try:
        path = PathManager.get_local_path(weights)
    except Exception as error:
        raise UserError(f"MODEL.WEIGHTS {weights}: could not be fetched ({error})") from error
    if not Path(path).is_file():
        raise UserError(f"MODEL.WEIGHTS {weights}: no such file; write one with `python -m transfer convert`")
    return path


def record_of(weights: str) -> dict[str, Any] | None:
    """What `convert` recorded in a .pkl, or a run of this project in its .pth; None for other files."""
    path = local_path(weights)
    if path.endswith(".pkl"):
        return read_pickle(path).get("origin")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint that loads safely ({error})") from error
    return content.get("run", {}).get("origin")
