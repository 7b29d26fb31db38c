"""ConvNeXt and ConvNeXt V2: timm's by keys and shapes, from the authors' names and from timm's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from transfer.checkpoints.families.match import Match, Options, Shape, compare, is_model, timm_shapes

PLACE = re.compile(r"(?P<prefix>(?:.*[./:])?)(?:downsample_layers\.0\.0|stem\.0)\.weight")
OWN = re.compile(r"(stem|stages|norm_pre|head\.norm)\.")
SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (40, (2, 2, 6, 2)): "atto", (48, (2, 2, 6, 2)): "femto", (64, (2, 2, 6, 2)): "pico",
    (80, (2, 2, 8, 2)): "nano", (96, (3, 3, 9, 3)): "tiny", (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base", (192, (3, 3, 27, 3)): "large", (256, (3, 3, 27, 3)): "xlarge",
    (352, (3, 3, 27, 3)): "huge",
}  # fmt: skip
"""Channels of the first stage and blocks of each -> the word of timm's name for it."""
_AUTHORS = (
    (r"^downsample_layers\.0\.", "stem."), (r"^downsample_layers\.(\d)\.(\d)", r"stages.\1.downsample.\2"),
    (r"^stages\.(\d)\.(\d{1,3})\.", r"stages.\1.blocks.\2."), (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."), (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"\.grn\.gamma$", ".mlp.grn.weight"), (r"^norm\.", "head.norm."),
    # pretraining's sparse convolutions (ConvNeXt-V2, utils.py remap_checkpoint_keys)
    (r"\.(?:ln|linear)\.(weight|bias)$", r".\1"), (r"\.kernel$", ".weight"),
)  # fmt: skip


def names(rests: list[str]) -> tuple[dict[str, str], str]:
    """Name behind the prefix -> timm's, and how they were spelt where not as timm's."""
    if "downsample_layers.0.0.weight" not in rests:
        return {rest: rest for rest in rests}, ""
    normal = next((r for r in rests if r in ("norm.weight", "norm.bias")), None)
    # VICRegL's network has neither layer scale nor GRN, and averages what its norm has normalised
    first = normal and not any(r.endswith((".gamma", ".grn.beta")) for r in rests)
    found = {}
    for rest in rests:
        new = rest
        for old, name in _AUTHORS:
            new = re.sub(old, name, new)
        found[rest] = re.sub(r"^head\.norm\.", "norm_pre.", new) if first else new
    return found, "the authors' names of a ConvNeXt"


def state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors -> timm's: GRN's as vectors, kernels of sparse convolutions as dense ones."""
    found = {}
    for key, value in tensors.items():
        if ".grn." in key or (key.endswith(".bias") and value.dim() > 1):
            value = value.reshape(-1)
        elif key.endswith(".conv_dw.weight") and value.dim() == 2:
            side = math.isqrt(value.shape[0])
            value = value.T.reshape(-1, 1, side, side).transpose(3, 2)
        elif ".downsample.1." in key and value.dim() == 3:
            side = math.isqrt(value.shape[0])
            value = value.permute(2, 1, 0).reshape(*value.shape[:0:-1], side, side).transpose(3, 2)
        found[key] = value
    return found


def match(shapes: Mapping[str, Shape], *, arch: str | None = None) -> Match:
    """The ConvNeXt with exactly these keys and shapes, else the nearest; `arch`: as the user says."""
    if arch is not None:
        return compare(shapes, timm_shapes(arch), arch)
    stem = shapes.get("stem.0.weight", ())
    if len(stem) != 4 or stem[1] != 3 or stem[2:] != (4, 4):
        return Match(arch=None, reason="a ConvNeXt whose stem is not one 4x4 convolution of RGB")
    depths = tuple(
        max((int(k.split(".")[3]) + 1 for k in shapes if k.startswith(f"stages.{i}.blocks.")), default=0)
        for i in range(4)
    )
    size = SIZES.get((stem[0], depths))
    if size is None:
        known = ", ".join(f"{name} {c} {d}" for (c, d), name in SIZES.items())
        return Match(
            arch=None,
            reason=f"a ConvNeXt of {stem[0]} channels and {depths} blocks, which timm has not ({known})",
        )
    version = "v2" if "stages.0.blocks.0.mlp.grn.weight" in shapes else ""
    name = f"convnext{version}_{size}"
    if not is_model(name):
        return Match(arch=None, reason=f"timm has no {name}")
    first = "norm_pre.weight" in shapes
    options: Options = (
        ("use_grn", bool(version)), ("head_norm_first", first),
        ("conv_mlp", len(shapes.get("stages.0.blocks.0.mlp.fc1.weight", ())) == 4),
    )  # fmt: skip
    notes = []
    if not version and not any(key.endswith(".gamma") for key in shapes):
        options += (("without", "layer scale"),)
    elif not first and "head.norm.weight" not in shapes:
        options += (("without", "final norm"),)
        notes.append(
            "no final norm in the file, as after FCMAE's pretraining: features are the last map's mean"
        )
    if first:
        notes.append("its final norm comes before the average, as in VICRegL's network")
    return compare(shapes, timm_shapes(name, options), name, options=options, notes=tuple(notes))
