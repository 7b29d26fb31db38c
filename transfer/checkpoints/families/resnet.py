"""Which timm ResNet has exactly these keys and shapes, or comes nearest."""

from __future__ import annotations

import dataclasses
import functools

from transfer.checkpoints.families.match import COUNTER, Match, Shape, compare, is_model, timm_shapes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the shapes of a ResNet."""

    depths: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    width: int = 64
    """Channels of a group in the first stage's 3x3 convolutions."""
    stem: tuple[int, ...] = ()
    """Channels of a deep stem's three convolutions; empty: one 7x7 convolution of 64."""
    pooled: bool = False
    """A shortcut pools before its convolution."""


_18, _34, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
_200 = (3, 24, 36, 3)
_DEEP, _WIDE, _TIERED = (32, 32, 64), (64, 64, 128), (24, 32, 64)
# What a file may be without --arch, most usual first; no two have the same keys and shapes.
ARCHS: dict[str, Plan] = {
    "resnet50": Plan(_34), "resnet18": Plan(_18, bottleneck=False), "resnet34": Plan(_34, bottleneck=False),
    "resnet101": Plan(_101), "resnet152": Plan(_152),
    "wide_resnet50_2": Plan(_34, width=128), "wide_resnet101_2": Plan(_101, width=128),
    "resnext50_32x4d": Plan(_34, groups=32, width=4), "resnext101_32x4d": Plan(_101, groups=32, width=4),
    "resnext101_32x8d": Plan(_101, groups=32, width=8), "resnext101_64x4d": Plan(_101, groups=64, width=4),
    "resnext101_32x16d": Plan(_101, groups=32, width=16), "resnet26": Plan(_18), "resnet200": Plan(_200),
    "resnet18d": Plan(_18, bottleneck=False, stem=_DEEP, pooled=True),
    "resnet34d": Plan(_34, bottleneck=False, stem=_DEEP, pooled=True),
    "resnet26d": Plan(_18, stem=_DEEP, pooled=True), "resnet50d": Plan(_34, stem=_DEEP, pooled=True),
    "resnet101d": Plan(_101, stem=_DEEP, pooled=True), "resnet152d": Plan(_152, stem=_DEEP, pooled=True),
    "resnet200d": Plan(_200, stem=_DEEP, pooled=True), "resnet50c": Plan(_34, stem=_DEEP),
    "resnet101c": Plan(_101, stem=_DEEP), "resnet152c": Plan(_152, stem=_DEEP),
    "resnet50s": Plan(_34, stem=_WIDE), "resnet101s": Plan(_101, stem=_WIDE),
    "resnet152s": Plan(_152, stem=_WIDE), "resnet50t": Plan(_34, stem=_TIERED, pooled=True),
    "resnet26t": Plan(_18, stem=_TIERED, pooled=True),
    "resnext50d_32x4d": Plan(_34, groups=32, width=4, stem=_DEEP, pooled=True),
}  # fmt: skip

OTHERS = (
    "seresnet50", "seresnet18", "seresnet34", "seresnet101", "seresnet152", "seresnext50_32x4d",
    "seresnext101_32x4d", "seresnet50t", "ecaresnet50d", "ecaresnet101d", "gcresnet50t", "skresnet18",
    "skresnet50", "resnet50_gn", "resnetrs50", "resnest50d", "res2net50_26w_4s", "res2net101_26w_4s",
)  # fmt: skip
"""Tried only to say that `--arch` reads the file."""

# timm's anti-aliased variants have no parameters of their own: the same file fits, only --arch can tell.
SAME_SHAPES = {
    "resnet18": ("resnetblur18",),
    "resnet50": ("resnetaa50", "resnetblur50"),
    "resnet34d": ("resnetaa34d",),
    "resnet50d": ("resnetaa50d", "resnetblur50d"),
    "resnet101d": ("resnetaa101d", "resnetblur101d"),
}


VOLUMES = "its convolutions are 3D, for videos or volumes"
_KINSHIP = {
    "layer1.0.prelu.weight": "an iresnet of face recognition, with PReLU and BatchNorm before a convolution",
    "layer1.0.bn1.IN.weight": "an IBN-Net, with instance beside batch normalisation",
}
"""Layers that only these networks have."""


def match_arch(shapes: dict[str, Shape], *, arch: str | None = None, hint: str | None = None) -> Match:
    """The architecture with exactly these keys and shapes, else the nearest one and the differences.

    `arch` is what the user says: nothing else is tried. `hint` is what the file says: tried first.
    """
    reason = _why_none(shapes)
    if reason:
        return Match(arch=None, reason=reason)
    if arch is not None:
        return compare_with(shapes, arch)
    counts = blocks(shapes)
    near = [name for name in ARCHS if blocks(arch_shapes(name)) == counts]
    if hint is not None and (hint in ARCHS or is_model(hint)):
        near.insert(0, hint)
    best = min((compare_with(shapes, name) for name in near), key=lambda match: match.faults, default=None)
    if best is None or best.faults:
        best = min((compare_with(shapes, name) for name in ARCHS), key=lambda match: match.faults)
    return best


def fitting_others(shapes: dict[str, Shape]) -> list[str]:
    """Which of timm's rarer ResNets have exactly these keys and shapes (counters apart)."""
    counts = blocks(shapes)
    return [
        name
        for name in OTHERS
        if is_model(name) and blocks(arch_shapes(name)) == counts and not compare_with(shapes, name).faults
    ]


def _why_none(shapes: dict[str, Shape]) -> str:
    if not any(key.startswith("layer1.") for key in shapes):
        return "no ResNet: there is no layer1"
    conv1 = shapes.get("conv1.weight")
    if conv1 is not None and len(conv1) == 5:
        return VOLUMES
    for layer, kind in _KINSHIP.items():
        if layer in shapes:
            return f"{kind}, which timm does not have"
    if shapes.get("layer1.0.conv3.weight", ())[2:] == (3, 3):
        return (
            "a ResNet-12 of few-shot learning, with three 3x3 convolutions a block, which timm does not have"
        )
    if conv1 is None or len(conv1) != 4:
        return ""
    if conv1[0] == 16 and not any(key.startswith("layer4.") for key in shapes):
        return "a CIFAR ResNet of three stages (ResNet-20, 32, 44, 56, 110), which timm does not have"
    if conv1[1] < 3:
        return f"conv1 takes {conv1[1]} channel(s) instead of RGB (CMC's networks see L or ab alone)"
    if conv1[1] != 3:
        return (
            f"conv1 takes {conv1[1]} channels instead of RGB, as networks for satellite bands do: keep those "
            "of its red, green and blue bands, conv1.weight[:, [r, g, b]], and save that"
        )
    if conv1[0] != 64:
        return (
            f"conv1 has {conv1[0]} channels instead of 64: a ResNet {conv1[0] / 64:g} times as wide, "
            "which timm does not have"
        )
    return ""


def compare_with(shapes: dict[str, Shape], arch: str) -> Match:
    """How `shapes` differ from timm's `arch`, with a CIFAR stem where conv1 is 3x3."""
    wanted = dict(arch_shapes(arch))
    cifar = shapes.get("conv1.weight", ())[2:] == (3, 3)
    if cifar and "conv1.weight" in wanted:
        wanted["conv1.weight"] = (*wanted["conv1.weight"][:2], 3, 3)
    return compare(shapes, wanted, arch, stem="cifar" if cifar else "imagenet")


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
    return _shapes_of(ARCHS[arch]) if arch in ARCHS else timm_shapes(arch)


def _shapes_of(plan: Plan) -> dict[str, Shape]:
    """The shapes by He et al. 2015 (https://arxiv.org/abs/1512.03385, table 1) under timm's names."""
    shapes: dict[str, Shape] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.{COUNTER}"] = ()

    if plan.stem:
        first, second, before = plan.stem
        shapes["conv1.0.weight"] = (first, 3, 3, 3)
        norm("conv1.1", first)
        shapes["conv1.3.weight"] = (second, first, 3, 3)
        norm("conv1.4", second)
        shapes["conv1.6.weight"] = (before, second, 3, 3)
    else:
        before = 64
        shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", before)
    for stage, depth in enumerate(plan.depths):
        planes = 64 << stage
        inner = planes * plan.width // 64 * plan.groups if plan.bottleneck else planes
        out = 4 * planes if plan.bottleneck else planes
        for index in range(depth):
            block = f"layer{stage + 1}.{index}"
            kernels = (
                ((inner, before, 1), (inner, inner // plan.groups, 3), (out, inner, 1))
                if plan.bottleneck
                else ((out, before, 3), (out, out, 3))
            )
            for i, (channels, inputs, size) in enumerate(kernels, 1):
                shapes[f"{block}.conv{i}.weight"] = (channels, inputs, size, size)
                norm(f"{block}.bn{i}", channels)
            if index == 0 and (stage > 0 or before != out):
                shapes[f"{block}.downsample.{int(plan.pooled)}.weight"] = (out, before, 1, 1)
                norm(f"{block}.downsample.{int(plan.pooled) + 1}", out)
            before = out
    return shapes
