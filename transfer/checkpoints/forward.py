"""How a network computes: stem, strides, colours, and what the file cannot tell.

The same keys and shapes fit several forward passes. What the user says goes first, then what the file says;
what is assumed is noted each time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pretrain.common.errors import UserError
from pretrain.data.normalization import CIFAR_MEAN, CIFAR_STD
from transfer.checkpoints.families.match import COUNTER, Options, created
from transfer.checkpoints.families.resnet import ARCHS, SAME_SHAPES
from transfer.checkpoints.families.vit import MANY_HEADS, heads_of, many_heads_possible
from transfer.checkpoints.formats import OWN
from transfer.checkpoints.reading import Reading
from transfer.checkpoints.safe_load import RawFile
from transfer.checkpoints.search import Container
from transfer.options.weights import WeightsOptions

if TYPE_CHECKING:
    from torch import nn

STEMS = {
    "imagenet": (2, True), "imagenet-nopool": (2, False), "cifar": (1, False), "cifar-pool": (1, True),
    "cifar-stride2": (2, False), "cifar-stride2-pool": (2, True),
}  # fmt: skip
"""Name -> stride of the first convolution, and whether a 3x3 max-pool of stride 2 follows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """What decides how the tensors are computed with."""

    stem: str | None
    """None for what is no ResNet, as stem_padding."""
    stem_padding: int | None
    stride_in_1x1: bool = False
    last_stride: int = 2
    channels: str = "rgb"
    found: tuple[str, ...] = ()
    """What the file itself says, spelt as the option would be."""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    """Mean and standard deviation of the images, where the file or the usage of its writers has them."""
    notes: tuple[str, ...] = ()
    options: Options = ()
    """What timm.create_model gets for a network that is no ResNet."""
    positions: str | None = None
    """How its writer resamples a ViT's positions; None where it has none to resample."""
    beside: tuple[Container, ...] = ()
    """Other containers of the file with a network of the same kind."""


def forward_of(
    reading: Reading, readings: list[Reading], raw: RawFile, asked: WeightsOptions, own: dict[str, str],
    path: str | Path,
) -> Forward:  # fmt: skip
    """How the network of `reading` computes. Raises UserError where fitting formats disagree on it."""
    foreign = reading.format not in OWN
    notes = [reading.format.note, _same_tensors(reading, readings)]
    if reading.network.dialect:
        notes.append(f"its layers are named otherwise: {reading.network.dialect}")
    if reading.network.container.module:
        notes.append("a whole pickled module: its tensors were read, its code was not run")
    if reading.family != "resnet":
        return _other(reading, readings, raw, asked, own, path, notes)
    if asked.heads is not None:
        raise UserError(f"--heads {asked.heads}: {path} holds a {reading.arch}, which has none")
    stem = _stem(reading, asked, path)
    padding = _padding(reading, readings, asked, own, path)
    said = _record(raw)
    found = []
    metadata: dict[str, str] = {}
    basic = reading.arch in ARCHS and not ARCHS[str(reading.arch)].bottleneck
    in_1x1 = asked.stride_in_1x1
    if in_1x1 is None:
        styles = set(re.findall(r"\bstyle\s*=\s*['\"](pytorch|caffe)['\"]", said))
        if len(styles) > 1:
            raise UserError(
                f"{path}: its own settings name both styles, pytorch and caffe: say --stride-in-1x1 true or "
                "false"
            )
        in_1x1 = (styles == {"caffe"} or own.get("stride_in_1x1") == "true") and not basic
        if in_1x1:
            found.append("--stride-in-1x1 true")
            notes.append("the file says that its stride lies in the 1x1 convolutions (style caffe)")
    elif in_1x1 and basic:
        raise UserError(f"--stride-in-1x1 true: a {reading.arch} has no 1x1 convolutions but its shortcuts")
    channels = asked.channels
    if channels is None and re.search(r"\b(to_rgb|bgr_to_rgb)\s*=\s*False", said):
        channels = "bgr"
        found.append("--channels bgr")
        notes.append("the file says that its images were BGR; the first convolution's channels were turned")
    numbers = _preprocessing(said)
    if numbers:
        mean, std = (n[::-1] if channels == "bgr" else n for n in numbers)
        metadata |= {"mean": _text(mean), "std": _text(std)}
        notes.append("mean and standard deviation of the images as the file says")
    if foreign and stem.startswith("cifar"):
        notes += _cifar_notes(reading, readings, asked, padding)
        if not numbers:
            metadata |= {"mean": _text(CIFAR_MEAN), "std": _text(CIFAR_STD)}
    if foreign:
        notes.append(_assumed(reading, asked, bool(said), basic))
    return Forward(
        stem=stem, stem_padding=padding, stride_in_1x1=in_1x1, last_stride=asked.last_stride or 2,
        channels=channels or "rgb", found=tuple(found), metadata=metadata,
        notes=tuple(filter(None, [*notes, *_of_the_file(reading, raw)])), beside=_beside(reading, readings),
    )  # fmt: skip


def _of_the_file(reading: Reading, raw: RawFile) -> list[str]:
    notes = []
    if reading.network.match.counters_missing:
        notes.append(f"no {COUNTER} in part of the file: set to 0; evaluation does not use them")
    halves = {str(t.dtype).removeprefix("torch.") for t in reading.tensors.values() if t.is_floating_point()}
    if halves != {"float32"}:
        notes.append(f"stored as {', '.join(sorted(halves))}, used as float32")
    if raw.placeholders:
        shown = ", ".join(raw.placeholders[:12]) + (" ..." if len(raw.placeholders) > 12 else "")
        notes.append(f"named in the file, not loaded and not needed: {shown}")
    return notes


def _beside(reading: Reading, readings: list[Reading]) -> tuple[Container, ...]:
    here = reading.network.container
    beside = {r.network.container.path: r.network.container for r in readings if r.network.complete}
    return tuple(c for c in beside.values() if c.path and c.path != here.path)


def _other(
    reading: Reading, readings: list[Reading], raw: RawFile, asked: WeightsOptions, own: dict[str, str],
    path: str | Path, notes: list[str],
) -> Forward:  # fmt: skip
    """How a network that is no ResNet computes. Raises UserError for what its keys leave open."""
    for name in ("stem", "stem_padding", "stride_in_1x1", "last_stride"):
        if getattr(asked, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for ResNets; {path} holds a {reading.arch}")
    match = reading.network.match
    if match.question and asked.arch is None and not own:
        raise UserError(f"{path}: {match.question}")
    options = dict(match.options)
    said = asked.heads or int(own.get("heads", 0))
    if said and not heads_of(match) and asked.arch is None:
        raise UserError(f"--heads {said}: {path} holds a {reading.arch}, whose heads its name says")
    position = reading.tensors.get("pos_embed")
    if said:
        options["num_heads"] = said
    elif many_heads_possible(match, position) or (
        reading.format.many_heads == "always" and heads_of(match) in (3, 6)
    ):
        if not reading.format.many_heads:
            raise UserError(
                f"{path}: a {reading.arch} with fixed positions has {heads_of(match)} heads a block, or "
                f"{MANY_HEADS}, as MoCo v3's: the file does not tell; say --heads {heads_of(match)} or "
                f"--heads {MANY_HEADS}"
            )
        options["num_heads"] = MANY_HEADS
    if options.get("num_heads") and options.get("embed_dim", 0) % options["num_heads"]:
        raise UserError(f"--heads {said}: the width of {reading.arch} is no multiple of it")
    positions = None
    if position is not None:
        positions = own.get("positions") or reading.format.positions
        if options.get("reg_tokens") and reading.format.name.startswith("DINOv2"):
            positions = "bicubic antialias"  # dinov2/hub/backbones.py: of those with registers
        notes.append(
            f"for images of another size its positions are resampled {positions} unless the protocol says "
            "otherwise"
        )
    if asked.channels is None:
        notes.append("assumed, as the file cannot tell: RGB (--channels), epsilons as in timm")
    metadata = {}
    if options.get("img_size"):
        patch = options.get("patch_size", 16)
        metadata["image_size"] = str(min(options["img_size"], round(224 / patch) * patch))
    return Forward(
        stem=None, stem_padding=None, channels=asked.channels or "rgb", metadata=metadata,
        options=tuple(options.items()), positions=positions,
        notes=tuple(filter(None, [*notes, *match.notes, *_of_the_file(reading, raw)])),
        beside=_beside(reading, readings),
    )  # fmt: skip


def _fitting(reading: Reading, readings: list[Reading]) -> list[Reading]:
    """Readings that load the same tensors alike, this one first; it alone where the file names its writer."""
    if reading.marked:
        return [reading]
    return [reading] + [
        r for r in readings if r.complete and r is not reading and r.network is reading.network
        and r.branch == reading.branch and r.exact == reading.exact
    ]  # fmt: skip


def _same_tensors(reading: Reading, readings: list[Reading]) -> str:
    names = dict.fromkeys(r.format.name for r in _fitting(reading, readings)[1:])
    names.pop(reading.format.name, None)
    return f"fits as well, with the same tensors: {', '.join(names)}" if names else ""


def _stem(reading: Reading, asked: WeightsOptions, path: str | Path) -> str:
    if asked.stem is None:
        return reading.stem
    if asked.stem.startswith("cifar") != (reading.stem == "cifar"):
        size = "3x3" if reading.stem == "cifar" else "7x7, or a deep stem"
        raise UserError(f"--stem {asked.stem}: the first convolution of {path} is {size}")
    return asked.stem


def _padding(
    reading: Reading, readings: list[Reading], asked: WeightsOptions, own: dict[str, str], path: str | Path
) -> int:
    """Zero padding of the first convolution: as said, as recorded, as the fitting writers agree."""
    if reading.stem != "cifar":
        if asked.stem_padding is not None:
            raise UserError(f"--stem-padding {asked.stem_padding}: {path} has no 3x3 stem")
        return 3 if "conv1.weight" in reading.tensors else 1
    if asked.stem_padding is not None:
        return asked.stem_padding
    if own.get("stem_padding"):
        return int(own["stem_padding"])
    known = {r.format.name: r.format.cifar_padding or 1 for r in _fitting(reading, readings)}
    if len(set(known.values())) > 1:
        writers = ", ".join(f"{name} ({padding})" for name, padding in known.items())
        raise UserError(
            f"{path}: the padding of its 3x3 stem decides the features, and the file does not tell it: it "
            f"fits {writers}. Say --stem-padding 1 or --stem-padding 2"
        )
    return next(iter(known.values()))


def _cifar_notes(reading: Reading, readings: list[Reading], asked: WeightsOptions, padding: int) -> list[str]:
    notes = []
    if asked.stem_padding is None:
        known = {r.format.name: r.format.cifar_padding for r in _fitting(reading, readings)}
        writers = ", ".join(f"{name} has {p}" for name, p in known.items() if p)
        notes.append(
            f"3x3 stem, effective padding {padding} assumed ({writers or 'the usual one'}; --stem-padding): "
            "the file cannot tell"
        )
    if asked.stem is None:
        notes.append(
            "3x3 stem of stride 1 without pooling assumed; does yours pool or stride? --stem cifar-pool, "
            "cifar-stride2 or cifar-stride2-pool: the file cannot tell"
        )
    mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (CIFAR_MEAN, CIFAR_STD))
    notes.append(
        f"CIFAR's mean ({mean}) and standard deviation ({std}) assumed where --mean and --std give none: "
        "the file cannot tell"
    )
    return notes


def _assumed(reading: Reading, asked: WeightsOptions, recorded: bool, basic: bool) -> str:
    """One line of what the keys cannot tell and nobody said."""
    twins = SAME_SHAPES.get(reading.arch or "", ())
    parts = []
    if twins and asked.arch is None:
        same = f"{', '.join(twins)} {'has' if len(twins) == 1 else 'have'}"
        parts.append(f"no anti-aliasing ({same} the same shapes; --arch names one of them)")
    if not basic and asked.stride_in_1x1 is None and not recorded:
        parts.append("stride in the 3x3 convolutions (--stride-in-1x1)")
    if asked.last_stride is None:
        parts.append("last stage of stride 2, no dilation (--last-stride)")
    if asked.channels is None and not recorded:
        parts.append("RGB (--channels)")
    parts += ["epsilon 1e-5 of BatchNorm"] if parts else []
    return f"assumed, as the file cannot tell: {', '.join(parts)}" if parts else ""


def _record(raw: RawFile) -> str:
    """OpenMMLab's own settings of the run, as text; "" for other files."""
    meta = raw.value.get("meta") if isinstance(raw.value, dict) else None
    texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, dict) else []
    return "\n".join(text[:1_000_000] for text in texts if isinstance(text, str))


def _preprocessing(said: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of images from 0 to 1 in OpenMMLab's settings, where they are told once."""
    out = []
    for name in ("mean", "std"):
        found = {
            tuple(float(n) for n in re.findall(r"[\d.]+(?:e-?\d+)?", text))
            for text in re.findall(rf"\b{name}\s*=\s*[\[(]([\d.,\s e-]{{5,200}})[\])]", said)
        }
        if len(found) != 1 or len(next(iter(found))) != 3:
            return None
        out.append([n / 255 for n in next(iter(found))])
    return (out[0], out[1]) if min(out[1]) > 0 else None


def _text(values: Any) -> str:
    return ",".join(str(v) for v in values)


# ------------------------------------------------------------------ building it


def check(reading: Reading) -> None:
    """Raises UserError for tensors that are no weights."""
    for key, value in reading.tensors.items():
        if value.is_quantized or (not value.is_floating_point() and not key.endswith(COUNTER)):
            raise UserError(
                f"{key} is {value.dtype}: quantised weights cannot be judged; give the float ones"
            )
        if value.is_floating_point() and not math.isfinite(value.detach().sum(dtype=torch.float64)):
            raise UserError(
                f"{key} of the {reading.branch} branch holds NaN or infinity; take an earlier checkpoint"
            )


def build(reading: Reading, forward: Forward) -> nn.Module:
    """The network with the reading's tensors, loaded strictly, in eval mode."""
    from pretrain.network.model import build_backbone

    assert reading.arch is not None
    check(reading)
    if reading.family != "resnet":
        return _build_other(reading, forward)
    if "conv1.weight" in reading.tensors:
        model: Any = build_backbone(reading.arch, stem=reading.stem, num_classes=0)
    else:
        import timm

        model = timm.create_model(reading.arch, num_classes=0)  # a deep stem, timm's own
    _set_stem(model, reading, forward)
    _set_strides(model, reading, forward)
    return _filled(model, reading, forward)


def _build_other(reading: Reading, forward: Forward) -> nn.Module:
    model = created(str(reading.arch), forward.options)
    periods = reading.tensors.get("rope.periods")
    if periods is not None:  # timm computes them, in a finer format than the file may have them in
        model.rope.periods.copy_(periods)
    return _filled(model, reading, forward)


def _filled(model: Any, reading: Reading, forward: Forward) -> nn.Module:
    state = {key: value for key, value in reading.tensors.items() if key != "rope.periods"}
    state |= {
        k: torch.zeros_like(t)
        for k, t in model.state_dict().items()
        if k.endswith(COUNTER) and k not in state
    }
    if forward.channels == "bgr":
        first = next(k for k, t in model.state_dict().items() if t.dim() == 4 and t.shape[1] == 3)
        state[first] = state[first].flip(1)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _set_stem(model: Any, reading: Reading, forward: Forward) -> None:
    stride, pooled = STEMS[str(forward.stem)]
    if reading.stem == "cifar":
        model.conv1.stride = (stride, stride)
        model.conv1.padding = (forward.stem_padding, forward.stem_padding)
        model.maxpool = torch.nn.MaxPool2d(3, 2, 1) if pooled else torch.nn.Identity()
    elif not pooled:
        model.maxpool = torch.nn.Identity()


def _set_strides(model: Any, reading: Reading, forward: Forward) -> None:
    first_blocks = [getattr(model, f"layer{i}")[0] for i in (2, 3, 4)]
    if forward.stride_in_1x1:
        for block in first_blocks:
            if not hasattr(block, "conv3") or block.conv2.stride != (2, 2):
                raise UserError(f"--stride-in-1x1 true: a {reading.arch} has no stride that could lie there")
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    if forward.last_stride == 1:
        block = first_blocks[-1]
        if getattr(block, "aa", None) is not None and not isinstance(block.aa, torch.nn.Identity):
            raise UserError(f"--last-stride 1: not for a {reading.arch}, whose stride lies in its pooling")
        for module in block.modules():
            if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
                module.stride = (1, 1)
        shortcut = block.downsample
        if isinstance(shortcut[0], torch.nn.AvgPool2d):
            shortcut[0] = torch.nn.Identity()
