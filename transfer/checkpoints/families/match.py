"""An architecture, and how keys and shapes differ from it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

from pretrain.common.errors import UserError

Shape = tuple[int, ...]
COUNTER = "num_batches_tracked"
Options = tuple[tuple[str, Any], ...]
"""Keyword arguments of timm.create_model beside the name, as pairs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """An architecture and how the shapes differ from it; without any difference it is the one."""

    arch: str | None
    stem: str = "imagenet"
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    reason: str = ""
    """Why it can be none of timm's networks."""
    question: str = ""
    """What the keys cannot tell and decides the features: the options that say it."""
    counters_missing: bool = False
    """BatchNorm's counters are not all there, as in files of PyTorch before 0.4.1."""
    options: Options = ()
    """What timm.create_model gets beside the name and num_classes=0."""
    notes: tuple[str, ...] = ()
    """What was assumed of it."""

    @property
    def faults(self) -> int:
        """How many keys are missing, left over or of a wrong shape; 0: it is this architecture."""
        return len(self.missing) + len(self.extra) + len(self.wrong) + bool(self.reason)


def compare(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], arch: str, **more: Any) -> Match:
    """How `shapes` differ from those `wanted` by `arch`; counters may be missing."""
    return Match(
        arch=arch,
        missing=tuple(key for key in wanted if key not in shapes and not key.endswith(COUNTER)),
        extra=tuple(key for key in shapes if key not in wanted),
        wrong=tuple(
            f"{key} is {spell(shapes[key])}, {arch} has {spell(wanted[key])}"
            for key in wanted
            if key in shapes and shapes[key] != wanted[key]
        ),
        counters_missing=any(key.endswith(COUNTER) and key not in shapes for key in wanted),
        **more,
    )


def spell(shape: Shape) -> str:
    """64x3x7x7."""
    return "x".join(map(str, shape)) or "a scalar"


def is_model(name: str) -> bool:
    """Whether timm has an architecture of this name."""
    import timm  # seconds: not where a ResNet's shapes are known without it

    return bool(timm.is_model(name))


@functools.lru_cache(maxsize=64)
def timm_shapes(arch: str, options: Options = ()) -> dict[str, Shape]:
    """Key -> shape of timm's `arch` without its classifier. Raises UserError for a name that timm lacks."""
    return {key: tuple(value.shape) for key, value in on_paper(arch, options).state_dict().items()}


def features_of(arch: str, options: Options = ()) -> int:
    """Number of features of timm's `arch`."""
    return int(on_paper(arch, options).num_features)


def created(arch: str, options: Options) -> Any:
    """timm's `arch` without its classifier, for a file to fill.

    `without` among the options is this project's: a ConvNeXt without its layer scale or its final norm.
    """
    import timm
    import torch

    said = dict(options)
    without = said.pop("without", "")
    filled: dict[str, Any] = (
        {"weight_init": "skip"} if "embed_dim" in said else {}
    )  # of a ViT; seconds for a large one
    model: Any = timm.create_model(arch, num_classes=0, **said, **filled)
    if without == "final norm":
        model.head.norm = torch.nn.Identity()
    elif without == "layer scale":
        for stage in model.stages:
            for block in stage.blocks:
                block.gamma = None
    return model


def on_paper(arch: str, options: Options = ()) -> Any:
    """timm's `arch` without its classifier and without memory for its parameters. Raises UserError for a name
    that timm lacks."""
    import timm
    import torch

    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--arch {arch}: timm has no such model{hint}")
    try:
        with torch.device("meta"):
            return created(arch, options)
    except RuntimeError:  # it reads values of tensors while it is built, and those on paper have none
        return created(arch, options).to("meta")
