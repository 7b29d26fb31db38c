"""Which timm ResNet has exactly these keys and shapes, or comes nearest."""

from __future__ import annotations

import dataclasses
import difflib
import functools

import timm
import torch

from pretrain.common.errors import UserError

Shape = tuple[int, ...]
COUNTER = "num_batches_tracked"

# What a file may be without --arch, most usual first; no two have the same keys and shapes.
ARCHS = (
    "resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d", "resnext101_32x16d",
    "resnet26", "resnet200", "resnet18d", "resnet34d", "resnet26d", "resnet50d", "resnet101d", "resnet152d",
    "resnet200d", "resnet50c", "resnet101c", "resnet152c", "resnet50s", "resnet101s", "resnet152s",
    "resnet50t", "resnet26t", "resnext50d_32x4d",
)  # fmt: skip

# timm's anti-aliased variants have no parameters of their own: the same file fits, only --arch can tell.
SAME_SHAPES = {
    "resnet18": ("resnetblur18",),
    "resnet50": ("resnetaa50", "resnetblur50"),
    "resnet34d": ("resnetaa34d",),
    "resnet50d": ("resnetaa50d", "resnetblur50d"),
    "resnet101d": ("resnetaa101d", "resnetblur101d"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """An architecture and how the shapes differ from it; without any difference it is the one."""

    arch: str | None
    stem: str = "imagenet"
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    reason: str = ""
    """Why it can be none of timm's ResNets."""
    counters_missing: bool = False
    """None of BatchNorm's counters is there, as in files of PyTorch before 0.4.1."""

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.wrong) + bool(self.reason)


def match_arch(shapes: dict[str, Shape], *, arch: str | None = None, hint: str | None = None) -> Match:
    """The architecture with exactly these keys and shapes, else the nearest one and the differences.

    `arch` is what the user says: nothing else is tried. `hint` is what the file says: tried first.
    """
    reason = _why_none(shapes)
    if reason:
        return Match(arch=None, reason=reason)
    if arch is not None:
        return compare(shapes, arch)
    counts = blocks(shapes)
    near = [name for name in ARCHS if blocks(arch_shapes(name)) == counts]
    if hint is not None and timm.is_model(hint):
        near.insert(0, hint)
    best = min((compare(shapes, name) for name in near), key=lambda match: match.faults, default=None)
    if best is None or best.faults:
        best = min((compare(shapes, name) for name in ARCHS), key=lambda match: match.faults)
    return best


def _why_none(shapes: dict[str, Shape]) -> str:
    if not any(key.startswith("layer1.") for key in shapes):
        return "no ResNet: there is no layer1"
    conv1 = shapes.get("conv1.weight")
    if conv1 is None or len(conv1) != 4:
        return ""
    if conv1[1] != 3:
        return f"conv1 takes {conv1[1]} channel(s) instead of RGB (CMC's networks see L or ab alone)"
    if conv1[0] != 64:
        return (
            f"conv1 has {conv1[0]} channels instead of 64: a ResNet {conv1[0] / 64:g} times as wide, "
            "which timm does not have"
        )
    return ""


def compare(shapes: dict[str, Shape], arch: str) -> Match:
    """How `shapes` differ from timm's `arch`, with a CIFAR stem where conv1 is 3x3."""
    wanted = dict(arch_shapes(arch))
    cifar = shapes.get("conv1.weight", ())[2:] == (3, 3)
    if cifar and "conv1.weight" in wanted:
        wanted["conv1.weight"] = (*wanted["conv1.weight"][:2], 3, 3)
    counters_missing = not any(key.endswith(COUNTER) for key in shapes)
    if counters_missing:
        wanted = {key: shape for key, shape in wanted.items() if not key.endswith(COUNTER)}
    return Match(
        arch=arch,
        stem="cifar" if cifar else "imagenet",
        missing=tuple(key for key in wanted if key not in shapes),
        extra=tuple(key for key in shapes if key not in wanted),
        wrong=tuple(
            f"{key} is {spell(shapes[key])}, {arch} has {spell(wanted[key])}"
            for key in wanted
            if key in shapes and shapes[key] != wanted[key]
        ),
        counters_missing=counters_missing,
    )


def blocks(shapes: dict[str, Shape]) -> tuple[int, ...]:
    """Blocks of each stage, by the highest index: (3, 4, 6, 3) for ResNet-50."""
    counts = [0, 0, 0, 0]
    for key in shapes:
        stage, _, rest = key.partition(".")
        index = rest.partition(".")[0]
        if stage in ("layer1", "layer2", "layer3", "layer4") and index.isdecimal() and len(index) < 4:
            counts[int(stage[-1]) - 1] = max(counts[int(stage[-1]) - 1], int(index) + 1)
    return tuple(counts)


@functools.cache
def arch_shapes(arch: str) -> dict[str, Shape]:
    """Key -> shape of timm's `arch` without its classifier. Raises UserError for a name that timm lacks."""
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models("*resne*"), n=3) or ARCHS[:3]
        raise UserError(f"--arch {arch}: timm has no such model; did you mean {' or '.join(near)}?")
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=0)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def spell(shape: Shape) -> str:
    """64x3x7x7."""
    return "x".join(map(str, shape)) or "a scalar"
