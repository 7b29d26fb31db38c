"""Convert a checkpoint to detectron2 weights (.pkl), proved equal; and back.

detectron2 names a ResNet's layers its own way but computes the same functions, so a conversion is a renaming.
It is proved on the file that was written: detectron2 loads it by its own checkpointer, every tensor of its
backbone must be matched, and every stage must compute what timm's computes. A failed proof writes nothing.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import atomic_path, sha256_of
from transfer.conversion.availability import need_detectron2
from transfer.conversion.layout import from_detectron2, shape_of, to_detectron2
from transfer.conversion.weights_file import read_detectron2, write_pickle
from transfer.options import ConvertSettings, parse

logger = logging.getLogger(__name__)

UNPROVED = "or convert with --no-verify: unproved, and recorded so in the file"


def convert(settings: ConvertSettings) -> dict[str, Any]:
    """Convert, prove, then put the file in its place; returns what was recorded in it."""
    if settings.verify:
        need_detectron2(UNPROVED)
    from transfer.checkpoints.backbone import load_backbone

    loaded = load_backbone(settings.weights, arch=settings.arch, branch=settings.branch)
    weights = to_detectron2(loaded.network().state_dict())
    origin: dict[str, Any] = {
        "path": str(settings.weights), "sha256": loaded.sha256, "format": loaded.format,
        "branch": loaded.branch, "arch": loaded.arch, "metadata": dict(loaded.metadata),
        "options": shape_of(weights).options(), "verified": settings.verify,
    }  # fmt: skip
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
    state = from_detectron2(source)
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
    if settings.verify:
        from transfer.conversion.proof import prove_state

        prove_state(model, {k: torch.from_numpy(np.array(v)) for k, v in backbone.items()})
    metadata = {
        "format": "intl-bench/1", "arch": arch, "stem": "imagenet", "source": "detectron2",
        "origin_sha256": sha256_of(settings.weights), "verified": str(settings.verify).lower(),
    }  # fmt: skip
    with atomic_path(settings.output) as aside:
        write_safetensors(aside, {k: v.contiguous() for k, v in state.items()}, metadata)
    return metadata


def main(argv: list[str]) -> int | None:
    """`python -m transfer convert`."""
    settings: ConvertSettings = parse("convert", argv)
    wanted = ".safetensors" if settings.reverse else ".pkl"
    if settings.output.suffix != wanted:
        raise UserError(f"--output {settings.output}: wanted a file name that ends in {wanted}")
    if settings.reverse:
        metadata = convert_back(settings)
        print(f"{settings.output}: {metadata['arch']} under timm's keys")
        return None
    origin = convert(settings)
    proof = (
        f"proved equal in detectron2 (largest difference {origin['difference']:.1e} of a stage's scale)"
        if settings.verify
        else "NOT verified"
    )
    print(f"{settings.output}: {origin['arch']} ({origin['format']}, {origin['branch']} branch), {proof}")
    print("  " + " ".join(f"{k} {v}" for k, v in origin["options"].items()))
    return None
