"""Convert a checkpoint to detectron2 weights (.pkl), proved equal; and back.

detectron2 names a ResNet's layers its own way but computes the same functions, so a conversion is a renaming.
It is proved on the file that was written: detectron2 loads it by its own checkpointer, every tensor of its
backbone must be matched, and every stage must compute what timm's computes. A failed proof writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.checkpoint import FORMAT
from pretrain.common.errors import UserError
from pretrain.common.files import atomic_path, sha256_of
from pretrain.common.output_folder import need_space, output_file
from transfer.conversion.availability import need_detectron2
from transfer.conversion.layout import from_detectron2, shape_of, to_detectron2
from transfer.conversion.weights_file import AUTHOR, read_detectron2, read_pickle, write_pickle
from transfer.options.commands import parse
from transfer.options.weights import ConvertSettings

logger = logging.getLogger(__name__)

UNPROVED = "or convert with --no-verify: unproved, and recorded so in the file"


def convert(settings: ConvertSettings) -> dict[str, Any]:
    """Convert, prove, then put the file in its place; returns what was recorded in it."""
    if settings.verify:
        need_detectron2(UNPROVED)
    from transfer.checkpoints.backbone import load_backbone

    loaded = load_backbone(settings.weights, settings)
    if loaded.stem is None:
        raise UserError(
            f"{settings.weights} is a {loaded.arch}; only ResNets are converted for detectron2. Evaluate it "
            "with knn or linear"
        )
    if loaded.stem != "imagenet" or settings.last_stride == 1:
        asked = "--last-stride 1" if loaded.stem == "imagenet" else f"a {loaded.stem} stem"
        raise UserError(
            f"{settings.weights} has {asked}, of which detectron2's ResNet has no counterpart: it has "
            "a 7x7 convolution (a CIFAR stem 3x3), max pooling and a last stage of stride 2. Evaluate it "
            "with knn or linear"
        )
    network: Any = loaded.network()
    in_1x1 = network.layer2[0].conv1.stride == (2, 2) and hasattr(network.layer2[0], "conv3")
    weights = to_detectron2(network.state_dict())
    origin: dict[str, Any] = {
        "path": str(settings.weights), "sha256": loaded.sha256, "format": loaded.format,
        "branch": loaded.branch, "arch": loaded.arch, "metadata": dict(loaded.metadata),
        "options": shape_of(weights).options(stride_in_1x1=in_1x1), "verified": settings.verify,
    }  # fmt: skip
    need_space(settings.output, sum(w.nbytes for w in weights.values()), "the weights")
    with atomic_path(settings.output) as aside:
        candidate = aside.with_suffix(".pkl")  # DetectionCheckpointer goes by the suffix
        try:
            write_pickle(candidate, weights, origin)
            if settings.verify:
                from transfer.conversion.proof import prove

                logger.info("proving in detectron2 that %s computes the same", settings.output)
                origin["difference"] = prove(loaded.network(), candidate)
                write_pickle(candidate, weights, origin)
            candidate.replace(aside)
        finally:
            candidate.unlink(missing_ok=True)
    return origin


def convert_back(settings: ConvertSettings) -> dict[str, Any]:
    """From a detectron2 file to timm's keys in a .safetensors file, proved the same way."""
    if settings.verify:
        need_detectron2(UNPROVED)
    import timm

    from pretrain.checkpoint import write_safetensors

    source = read_detectron2(settings.weights)
    said = _recorded(source)
    for name in ("stride_in_1x1", "channels"):
        if getattr(settings, name) is not None:
            said[name] = getattr(settings, name)
    state = from_detectron2(source["model"])
    backbone = to_detectron2(state)
    shape = shape_of(backbone)
    arch = settings.arch or shape.timm_arch()
    model = timm.create_model(arch, num_classes=0).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(
            f"{settings.weights}: does not fill timm's {arch}: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} too many ({', '.join(unexpected[:3])})"
        )
    in_1x1 = _stride_in_1x1(model, said, settings)
    if "channels" not in said:
        raise UserError(
            f"{settings.weights} does not say in which order its network sees colours (BGR in detectron2's "
            "own weights, RGB in most self-supervised ones): say --channels bgr or --channels rgb"
        )
    if settings.verify:
        from transfer.conversion.proof import prove_state

        arrays = {k: torch.from_numpy(np.array(v)) for k, v in backbone.items()}
        prove_state(model, arrays, stride_in_1x1=in_1x1)
    if said["channels"] == "bgr":
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    metadata: dict[str, str] = {
        "format": FORMAT, "arch": arch, "stem": "imagenet", "source": "detectron2",
        "origin_sha256": sha256_of(settings.weights), "verified": str(settings.verify).lower(),
        "stride_in_1x1": str(in_1x1).lower(),
    }  # fmt: skip
    metadata |= {name: said[name] for name in ("mean", "std") if name in said}
    need_space(settings.output, sum(v.nbytes for v in state.values()), "the weights")
    with atomic_path(settings.output) as aside:
        write_safetensors(aside, {k: v.contiguous() for k, v in state.items()}, metadata)
    return metadata


def _stride_in_1x1(model: Any, said: Mapping[str, Any], settings: ConvertSettings) -> bool:
    """Where the stride lies, put into the model. Raises UserError where nothing says it."""
    if not hasattr(model.layer2[0], "conv3"):
        return False
    if "stride_in_1x1" not in said:
        raise UserError(
            f"{settings.weights} does not say where its bottlenecks have their stride: in the "
            "1x1 convolutions (detectron2's default and its own weights) or not (torchvision's and "
            "self-supervised networks): say --stride-in-1x1 true or false"
        )
    if said["stride_in_1x1"]:
        for layer in (model.layer2, model.layer3, model.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return bool(said["stride_in_1x1"])


def _recorded(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of `convert` or of a detection run here says: stride_in_1x1, channels, mean, std."""
    said: dict[str, Any] = {}
    origin, run = content.get("origin"), content.get("run")
    if isinstance(origin, dict) and isinstance(origin.get("options"), dict):
        said = {
            "stride_in_1x1": origin["options"].get("MODEL.RESNETS.STRIDE_IN_1X1", False),
            "channels": "rgb",  # `convert` turns the first convolution of other networks
        }
        metadata = origin.get("metadata")
        if isinstance(metadata, dict):
            said |= {name: str(metadata[name]) for name in ("mean", "std") if name in metadata}
    values = run.get("settings") if isinstance(run, dict) else None
    if isinstance(values, dict) and "INPUT.FORMAT" in values:
        turned = values["INPUT.FORMAT"] == "BGR"
        said = {
            "stride_in_1x1": values.get("MODEL.RESNETS.STRIDE_IN_1X1", True),
            "channels": "bgr" if turned else "rgb",
        }
        for name, key in (("mean", "MODEL.PIXEL_MEAN"), ("std", "MODEL.PIXEL_STD")):
            numbers = [float(v) / 255 for v in values.get(key) or ()]
            if len(numbers) == 3:
                said[name] = ",".join(f"{v:.6g}" for v in (numbers[::-1] if turned else numbers))
    return said


def main(argv: list[str]) -> int | None:
    """`python -m transfer convert`."""
    settings: ConvertSettings = parse("convert", argv)
    wanted = ".safetensors" if settings.reverse else ".pkl"
    if settings.output.suffix != wanted:
        raise UserError(f"--output {settings.output}: wanted a file name that ends in {wanted}")
    with output_file(settings.output, earlier=_wrote_back if settings.reverse else _wrote):
        _convert(settings)
    return None


def _wrote(file: Path) -> bool:
    try:
        return read_pickle(file).get("__author__") == AUTHOR
    except UserError:
        return False


def _wrote_back(file: Path) -> bool:
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get("source") == "detectron2"
    except Exception:
        return False


def _convert(settings: ConvertSettings) -> None:
    if settings.reverse:
        metadata = convert_back(settings)
        print(f"{settings.output}: {metadata['arch']} under timm's keys")
        return
    origin = convert(settings)
    proof = (
        f"proved equal in detectron2 (largest difference {origin['difference']:.1e} of a stage's scale)"
        if settings.verify
        else "NOT verified"
    )
    print(f"{settings.output}: {origin['arch']} ({origin['format']}, {origin['branch']} branch), {proof}")
    print("  " + " ".join(f"{k} {v}" for k, v in origin["options"].items()))
