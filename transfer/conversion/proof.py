"""The proof of a conversion: the largest difference between timm's and detectron2's features."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.common.errors import UserError
from transfer.conversion.layout import shape_of
from transfer.conversion.weights_file import read_pickle

STAGES = ("stem", "res2", "res3", "res4", "res5")
TOLERANCE = 1e-5  # of a stage's largest absolute value; on a CPU in float32 the difference is 0


def prove(timm_model: nn.Module, path: str | Path) -> float:
    """Load `path` (a .pkl) into detectron2's ResNet by DetectionCheckpointer and compare with `timm_model`.

    Returns the largest difference relative to its stage's scale. Raises UserError when a backbone tensor of
    detectron2's model is not in the file, the file holds one that the model lacks, or features differ.
    """
    from detectron2.checkpoint import DetectionCheckpointer

    content = read_pickle(path)
    backbone = _detectron2_backbone(content["origin"]["options"])
    checkpointer = DetectionCheckpointer(backbone)
    outcome: list[list[str]] = []
    load_model = checkpointer._load_model

    def note(checkpoint: dict[str, object]) -> object:
        incompatible = load_model(checkpoint)
        wrong = [str(shape) for shape in incompatible.incorrect_shapes]
        outcome.append([*incompatible.missing_keys, *incompatible.unexpected_keys, *wrong])
        return incompatible

    checkpointer._load_model = note  # type: ignore[method-assign]
    with _quiet():
        checkpointer.load(str(path))
    if outcome[0]:
        raise UserError(
            f"detectron2 does not match {len(outcome[0])} tensors ({', '.join(outcome[0][:4])}): "
            "nothing was written"
        )
    return _compare(timm_model, backbone)


def prove_state(timm_model: nn.Module, weights: dict[str, Tensor], *, stride_in_1x1: bool = False) -> float:
    """The same for detectron2-named tensors in memory."""
    backbone = _detectron2_backbone(shape_of(weights).options(stride_in_1x1=stride_in_1x1))
    backbone.load_state_dict(weights, strict=True)
    return _compare(timm_model, backbone)


def _detectron2_backbone(options: dict[str, object]) -> nn.Module:
    """detectron2's ResNet that returns every stage, with BatchNorm that can be trained."""
    try:
        from detectron2.config import get_cfg
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.backbone.resnet import build_resnet_backbone
    except ImportError as error:
        raise UserError(
            f"detectron2 is not installed ({error}), so the conversion cannot be proved: install it as the "
            "README says, or write an unproved file with --no-verify"
        ) from error
    cfg = get_cfg()
    cfg.merge_from_list([v for pair in options.items() for v in pair])
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


@torch.no_grad()
def _compare(timm_model: Any, backbone: nn.Module) -> float:
    """The largest |timm - detectron2| of any stage, relative to the stage's largest value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 64, 96, generator=generator)
    device = next(timm_model.parameters()).device
    was_training = timm_model.training
    timm_model.cpu().eval()
    theirs = backbone(x)
    y = timm_model.maxpool(timm_model.act1(timm_model.bn1(timm_model.conv1(x))))
    ours = {"stem": y}
    for stage, layer in zip(STAGES[1:], ("layer1", "layer2", "layer3", "layer4")):
        y = getattr(timm_model, layer)(y)
        ours[stage] = y
    timm_model.to(device).train(was_training)
    worst = 0.0
    for stage in STAGES:
        if ours[stage].shape != theirs[stage].shape:
            raise UserError(
                f"{stage}: timm gives {tuple(ours[stage].shape)}, detectron2 {tuple(theirs[stage].shape)}; "
                "this network is no plain ResNet, nothing was written"
            )
        scale = ours[stage].abs().max().item() or 1.0
        difference = (ours[stage] - theirs[stage]).abs().max().item() / scale
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"{stage}: detectron2's features differ from timm's by {difference:.1e} of their scale "
                f"(at most {TOLERANCE:.0e} is allowed); nothing was written"
            )
        worst = max(worst, difference)
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep detectron2's loading messages, which the proof puts into one sentence, off the screen."""
    loggers = [logging.getLogger(n) for n in ("fvcore.common.checkpoint", "detectron2.checkpoint")]
    loggers.append(logging.getLogger("detectron2.checkpoint.c2_model_loading"))
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
