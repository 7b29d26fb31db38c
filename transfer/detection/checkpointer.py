"""Weights into a detector, every tensor accounted for.

detectron2 only warns when weights do not match and trains from scratch. Here the tensors that a backbone file
cannot hold are named, everything else must load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from pretrain.common.errors import UserError
from pretrain.common.files import atomic_path, write_text
from transfer.checkpoints.backbone import load_backbone
from transfer.checkpoints.safe_load import load_file
from transfer.conversion.weights_file import read_pickle

# New in a detector that starts from a backbone file: of R-CNNs, Cascade R-CNN and RetinaNet.
HEADS = re.compile(
    r"(proposal_generator\.|roi_heads\.(box_head|box_predictor|mask_head|keypoint_head)\.|head\."
    r"|roi_heads\.res5\.norm\.|sem_seg_head\.|backbone\.(fpn_(lateral|output)\d|top_block\.p\d)\.|pixel_(mean|std)$)"
)
# New in one that starts from a detector of other categories: as many outputs as there are categories.
PREDICTORS = re.compile(
    r"(roi_heads\.(box_predictor|mask_head\.predictor|keypoint_head\.score_lowres)|head\.(cls_score|bbox_pred)"
    r"|sem_seg_head\.(auxiliary\.)?predictor)\."
)
DETECTOR = ("proposal_generator.", "roi_heads.box_predictor", "head.cls_score", "sem_seg_head.")
"""Beginnings of names that a whole detector has and a backbone has not."""
BACKBONE = ("backbone.bottom_up.", "backbone.res2.", "res2.")
"""The same of a backbone."""
# Counters that no computation reads; frozen BatchNorm has none, older files neither.
COUNTERS = re.compile(r".*\.num_batches_tracked$")
# Files of the Caffe2 model zoo fold BatchNorm's statistics into its weight and bias, and hold the classifier.
CAFFE2_MISSING = re.compile(r".*\.running_(mean|var)$")
CAFFE2_EXTRA = re.compile(r"(fc1000\.|stem\.conv1\.bias$)")
# The projector, which the field's converters leave in, renamed as all that is in no layer
# (https://github.com/facebookresearch/moco/blob/132aea9/detection/convert-pretrain-to-detectron2.py).
PROJECTOR = re.compile(r"stem\.(fc|projection_head|projector|head)\.")


class StrictCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer that raises UserError on any tensor missing, left over or of another shape,
    reads safely, and writes atomically.

    `run`: the record that every file gets. `newest`: whether what is saved is where the run goes on from.
    `other_categories`: a detector's predictors may have another number of outputs, and then start anew; their
    names are in `anew` after loading.
    """

    def __init__(
        self, *args: Any, run: Mapping[str, Any] | None = None, newest: bool = True,
        other_categories: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.run, self.newest, self.other_categories = run, newest, other_categories
        self.anew: list[str] = []
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
        if self.run is not None:
            data["run"] = dict(self.run)
        with atomic_path(Path(self.save_dir) / f"{name}.pth") as aside:
            torch.save({**data, **kwargs}, aside)
        if self.newest:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write `last_checkpoint` whole or not at all; detectron2 does not."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> Any:
        if filename.endswith(".pkl"):
            read_pickle(filename)  # refuses a file that would run code, before detectron2 opens it
        content = super()._load_file(filename)
        self._caffe2 = content.get("__author__") == "Caffe2"
        self._whole = any(k.startswith(DETECTOR) for k in content["model"])
        return content

    def _torch_load(self, f: str) -> Any:
        return load_file(f).value

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
            if not COUNTERS.match(k) and not PROJECTOR.match(k)
            and not (self._caffe2 and CAFFE2_EXTRA.match(k))
        ]  # fmt: skip
        other = [k for k, _, _ in incompatible.incorrect_shapes]
        self.anew = [k for k in other if self._whole and self.other_categories and PREDICTORS.match(k)]
        shapes = [
            f"{k} {tuple(a)} for {tuple(b)}"
            for k, a, b in incompatible.incorrect_shapes
            if k not in self.anew
        ]
        missing = [k for k in missing if k not in self.anew]
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
                "of the architecture that the file holds"
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
    content = _read(local_path(weights))
    return content.get("origin") or content.get("run", {}).get("origin")


def run_of(weights: str) -> dict[str, Any]:
    """The record of the run that trained a detector: settings, protocol, seed; empty for other files."""
    return _read(local_path(weights)).get("run", {})


def _read(path: str) -> dict[str, Any]:
    """The content of a .pkl or .pth file of detectron2. Raises UserError, with what to do, for another."""
    pickled, content = path.endswith(".pkl"), None
    try:
        content = read_pickle(path) if pickled else load_file(path).value
        names = content.get("model", content).keys()
        if any(str(name).startswith(DETECTOR + BACKBONE) for name in names):
            return content
        error: Exception | str = "none of its tensors has a name of detectron2's"
    except Exception as caught:
        error = caught
    try:
        found = load_backbone(path)
    except UserError as why:
        if pickled and content is not None:
            return content  # with Detectron's own names, which detectron2 translates
        raise UserError(
            f"MODEL.WEIGHTS {path}: no detector or backbone of detectron2 ({error}), nor anything that "
            f"`python -m transfer convert` can take as it is: {why}"
        ) from None
    new = f"{Path(path).stem}{'_detectron2' if pickled else ''}.pkl"
    note = next((f" ({n})" for n in found.notes if "--branch" in n), "")
    raise UserError(
        f"MODEL.WEIGHTS {path} is a {found.format} checkpoint of a {found.arch}, not yet in detectron2's "
        f"layout: run `python -m transfer convert --weights {path} --output {new}` first{note}, then give "
        f"MODEL.WEIGHTS {new}"
    )
