"""A checkpoint file of any known writer enters; a timm ResNet leaves, proved complete, with what was found.

A file is tried as every format of `transfer.formats`. It is taken as one only when each parameter and buffer
of the backbone is loaded exactly once and every other tensor of its container is named as no backbone.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from pretrain.cli import UserError
from pretrain.files import sha256_of
from transfer.formats import FORMATS, Format, Place
from transfer.safe_load import RawFile, load_file

Branch = Literal["online", "ema"]
OWN_FORMAT = "intl-bench/1"
COUNTER = "num_batches_tracked"

# Architectures that a file may be without --arch, most usual first. No two have the same shapes.
ARCHS = (
    "resnet50", "resnet18", "resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d", "resnext101_32x16d",
    "resnet26", "resnet200", "resnet18d", "resnet34d", "resnet26d", "resnet50d", "resnet101d", "resnet152d",
    "resnet200d", "resnet50c", "resnet101c", "resnet152c", "resnet50s", "resnet101s", "resnet152s",
    "resnet50t", "resnet26t", "resnext50d_32x4d",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A backbone and where each of its tensors came from."""

    model: nn.Module
    """timm ResNet without a classifier, in eval mode: images N x 3 x H x W to features N x num_features."""
    format: str
    branch: str
    arch: str
    stem: str
    """imagenet: 7x7, stride 2, max pooling. cifar: 3x3, stride 1, none."""
    stem_padding: int
    """Effective zero padding of the stem's convolution."""
    sha256: str
    used: dict[str, str]
    """Key in the file -> key in the model."""
    dropped: dict[str, str]
    """Key in the file -> why it is no part of this backbone."""
    metadata: dict[str, str]
    """Of this project's files: image_size, mean, std, source, ... Empty for others."""
    path: str
    notes: tuple[str, ...] = ()
    """What was assumed, for a reader to check."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One reading of the file: as `format`, its `branch` at `place`."""

    format: Format
    branch: str
    place: Place
    arch: str | None
    stem: str
    used: dict[str, str]
    dropped: dict[str, str]
    tensors: dict[str, Tensor]
    missing: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    reason: str = ""
    """Why no known architecture can be meant at all."""
    counters_missing: bool = False

    @property
    def complete(self) -> bool:
        return not (self.missing or self.left_over or self.wrong or self.reason)

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.left_over) + len(self.wrong) + bool(self.reason)


def load_state(path: str | Path) -> Any:
    """The object in a checkpoint file, read safely: containers, tensors, plain values, inert placeholders."""
    return load_file(path).value


def load_backbone(path: str | Path, *, arch: str | None = None, branch: str = "online") -> Loaded:
    """Load the backbone of `branch` from a checkpoint of any known format.

    `arch` names a timm ResNet where several have the same shapes. Raises UserError with what is missing, what
    is left over and the nearest known format when the backbone is not complete.
    """
    if branch not in ("online", "ema"):
        raise UserError(f"branch {branch!r}: there are online and ema")
    path = Path(path)
    raw = load_file(path)
    own = _own(raw, branch, path)
    if own is not None:
        raw, metadata, format_name = own
        attempts = [_attempt(_OWN, branch, _OWN.online[0], raw.value, arch or metadata.get("arch"))]
    else:
        metadata, format_name = {}, ""
        attempts = read_all(raw.value, arch=arch)
    chosen = _choose(attempts, branch, path)
    stem_padding, padding_note = _stem_padding(chosen, metadata)
    model = _build(chosen, stem_padding)
    notes = [chosen.format.note, padding_note]
    if chosen.counters_missing:
        notes.append(
            f"no {COUNTER} in the file (PyTorch before 0.4.1): counters set to 0, unused in eval mode"
        )
    if raw.placeholders:
        notes.append(f"not loaded from the file, and not needed: {', '.join(raw.placeholders)}")
    assert chosen.arch is not None
    return Loaded(
        model=model,
        format=format_name or chosen.format.name,
        branch=branch,
        arch=chosen.arch,
        stem=chosen.stem,
        stem_padding=int(_first_conv(model).padding[0]),
        sha256=sha256_of(path),
        used=chosen.used,
        dropped=chosen.dropped,
        metadata=metadata,
        path=str(path),
        notes=tuple(note for note in notes if note),
    )


_OWN = Format(
    name="this project",
    online=(Place(container="", prefix=""),),
    drop=(),
)


def _own(raw: RawFile, branch: str, path: Path) -> tuple[RawFile, dict[str, str], str] | None:
    """This project's checkpoint.pt or backbone.safetensors as bare keys and metadata; None for other files."""
    value = raw.value
    if raw.metadata.get("format") == OWN_FORMAT:
        held = raw.metadata.get("branch", "online")
        if held != branch:
            raise UserError(f"{path} holds the {held} branch alone; ask for it with --branch {held}")
        return raw, raw.metadata, "this project, backbone file"
    if not (isinstance(value, dict) and str(value.get("format", "")).startswith("intl-bench/")):
        return None
    state = value.get("model") if branch == "online" else value.get("ema")
    if not isinstance(state, dict):
        raise UserError(
            f"{path} has no {branch} branch" + ("; use --branch online" if branch == "ema" else "")
        )
    config = value.get("config") or {}
    metadata = {
        "format": str(value["format"]), "source": "INTL pretraining", "branch": branch,
        **{k: str(config[k]) for k in ("arch", "stem", "dataset", "epochs", "seed") if k in config},
        **{k: str(v) for k, v in (value.get("metadata") or {}).items()},
        **{k: str(value[k]) for k in ("step", "epoch") if k in value},
    }  # fmt: skip
    bare = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return dataclasses.replace(raw, value=bare), metadata, "this project, training checkpoint"


# ---------------------------------------------------------------- reading a file as each format


def read_all(value: Any, *, arch: str | None = None) -> list[Attempt]:
    """Every reading of the loaded object that has at least one tensor where the format expects the backbone."""
    attempts = []
    hint = arch or _recorded_arch(value)
    for format_ in FORMATS:
        for branch, places in (("online", format_.online), ("ema", format_.ema)):
            for place in places:
                container = _container(value, place.container)
                if container is not None:
                    attempts.append(
                        _attempt(format_, branch, place, container, hint, forced=arch is not None)
                    )
    return [a for a in attempts if a.used]


def _container(value: Any, dotted: str) -> dict[str, Any] | None:
    for key in filter(None, dotted.split(".")):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
        return value
    return None


def _recorded_arch(value: Any) -> str | None:
    """The architecture that MoCo's and timm's training scripts write beside the weights."""
    name = value.get("arch") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name.startswith(("resnet", "resnext", "wide_resnet")) else None


def unwrap(key: str) -> str:
    """The key without DDP's `module` and torch.compile's `_orig_mod`, wherever they stand."""
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _attempt(
    format_: Format,
    branch: str,
    place: Place,
    container: dict[str, Any],
    arch: str | None,
    *,
    forced: bool = True,
) -> Attempt:
    """Sort the container's keys into backbone, named drops and the rest, and compare with architectures."""
    used: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    left_over: list[str] = []
    others = [(p.prefix, name) for name, places in (("online", format_.online), ("ema", format_.ema))
              for p in places if p.prefix and p.prefix != place.prefix]  # fmt: skip
    seen: set[str] = set()
    for key, value in container.items():
        name = unwrap(str(key))
        seen.add(name)
        reason = _reason(name, format_.drop)
        if not isinstance(value, Tensor):
            dropped[key] = "not a tensor"
        elif reason:
            dropped[key] = reason
        elif name.startswith(place.prefix) and not _reason(name, others, longer_than=place.prefix):
            target = _renamed(name.removeprefix(place.prefix), format_.rename)
            if target in tensors:
                left_over.append(f"{key} (a second {target})")
            else:
                used[key], tensors[target] = target, value
        elif _reason(name, others):
            dropped[key] = f"{_reason(name, others)} branch"
        else:
            left_over.append(str(key))
    found = match_arch({k: tuple(t.shape) for k, t in tensors.items()}, arch, forced=forced)
    reason = found.reason
    if format_.needs and not any(name.startswith(format_.needs) for name in seen):
        reason = reason or f"none of {', '.join(format_.needs)} is in it"
    back = {target: key for key, target in used.items()}
    return Attempt(
        format=format_, branch=branch, place=place, arch=found.arch, stem=found.stem, used=used, dropped=dropped,
        tensors=tensors, missing=found.missing,
        left_over=(*left_over, *(back[k] for k in found.extra)), wrong=found.wrong, reason=reason,
        counters_missing=found.counters_missing,
    )  # fmt: skip


def _reason(name: str, prefixes: Any, longer_than: str = "") -> str:
    """What the longest of `prefixes` that `name` starts with stands for; "" when there is none."""
    fitting = [(p, why) for p, why in prefixes if name.startswith(p) and len(p) > len(longer_than)]
    return max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else ""


def _renamed(name: str, rename: tuple[tuple[str, str], ...]) -> str:
    for old, new in rename:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# ---------------------------------------------------------------- which architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchMatch:
    """The architecture nearest to some shapes, and what differs from it."""

    arch: str | None
    stem: str = "imagenet"
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    reason: str = ""
    counters_missing: bool = False

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.wrong)


def match_arch(shapes: dict[str, tuple[int, ...]], arch: str | None, *, forced: bool = True) -> ArchMatch:
    """The architecture with exactly these keys and shapes, else the nearest with the differences.

    `arch` is tried first; with `forced` it is tried alone.
    """
    conv1 = shapes.get("conv1.weight") or shapes.get("conv1.0.weight")
    if not any(key.startswith("layer1.") for key in shapes):
        return ArchMatch(arch=None, reason="no ResNet: no layer1 in it")
    if conv1 is not None and len(conv1) == 4 and conv1[1] != 3:
        return ArchMatch(
            arch=None, reason=f"conv1 takes {conv1[1]} channel(s), not RGB (CMC splits L and ab)"
        )
    if "conv1.weight" in shapes and conv1 is not None and conv1[0] != 64:
        return ArchMatch(
            arch=None,
            reason=f"conv1 has {conv1[0]} channels: a ResNet {conv1[0] / 64:g} times as wide (w{conv1[0] // 64}), "
            "which timm does not have",
        )
    stem = "cifar" if conv1 is not None and "conv1.weight" in shapes and conv1[2:] == (3, 3) else "imagenet"
    if forced and arch is not None:
        return _compare(shapes, arch, stem)
    blocks = _blocks(shapes)
    near = [name for name in ARCHS if _blocks(arch_shapes(name)) == blocks]
    if arch in timm.list_models() and arch not in near:
        near.insert(0, arch)
    best = min((_compare(shapes, name, stem) for name in near or ARCHS), key=lambda match: match.faults)
    if best.faults and near:
        best = min((_compare(shapes, name, stem) for name in ARCHS), key=lambda match: match.faults)
    return best


def _blocks(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Blocks a stage, by the highest index: (3, 4, 6, 3) for ResNet-50."""
    counts = [0, 0, 0, 0]
    for key in shapes:
        stage, _, rest = key.partition(".")
        index = rest.partition(".")[0]
        if stage[:-1] == "layer" and stage[-1:] in "1234" and index.isdecimal() and len(index) < 4:
            counts[int(stage[-1]) - 1] = max(counts[int(stage[-1]) - 1], int(index) + 1)
    return tuple(counts)


@functools.cache
def arch_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of timm's `arch` without a classifier."""
    if arch not in timm.list_models():
        raise UserError(f"--arch {arch}: timm has no such model; some it has: {', '.join(ARCHS[:8])}")
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=0)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _compare(shapes: dict[str, tuple[int, ...]], arch: str, stem: str) -> ArchMatch:
    wanted = dict(arch_shapes(arch))
    if stem == "cifar" and "conv1.weight" in wanted:
        wanted["conv1.weight"] = (*wanted["conv1.weight"][:2], 3, 3)
    counters_missing = not any(key.endswith(COUNTER) for key in shapes)
    if counters_missing:
        wanted = {key: shape for key, shape in wanted.items() if not key.endswith(COUNTER)}
    return ArchMatch(
        arch=arch,
        stem=stem,
        missing=tuple(key for key in wanted if key not in shapes),
        extra=tuple(key for key in shapes if key not in wanted),
        wrong=tuple(
            f"{key} is {_times(shapes[key])}, {arch} has {_times(wanted[key])}"
            for key in wanted
            if key in shapes and shapes[key] != wanted[key]
        ),
        counters_missing=counters_missing,
    )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


# ---------------------------------------------------------------- choosing and building


def _choose(attempts: list[Attempt], branch: str, path: Path) -> Attempt:
    """The one reading that is complete; several are one when they load the same tensors to the same places."""
    complete = [a for a in attempts if a.complete]
    fitting = [a for a in complete if a.branch == branch]
    if not fitting:
        if complete:
            others = " or ".join(sorted({a.branch for a in complete}))
            raise UserError(
                f"{path} ({complete[0].format.name}) has no complete {branch} branch, but {others}; "
                f"ask for it with --branch {complete[0].branch}"
            )
        raise UserError(_incomplete(attempts, branch, path))
    readings = {(a.place.container, *sorted(a.used.items())) for a in fitting}
    if len(readings) > 1:
        found = "; ".join(
            f"{a.format.name} at {a.place.container or 'the top'} {a.place.prefix}" for a in fitting
        )
        raise UserError(f"{path} holds several backbones that could be the {branch} branch: {found}; "
                        "save the one you mean as a file of its own, or name another --branch")  # fmt: skip
    return max(fitting, key=lambda a: len(a.dropped))


def _incomplete(attempts: list[Attempt], branch: str, path: Path) -> str:
    if not attempts:
        return (
            f"{path} holds no ResNet at a place of any known format; `python -m transfer formats` lists them, "
            "`python -m transfer inspect` shows what the file holds"
        )
    nearest = min(attempts, key=lambda a: (a.faults - 0.5 * (a.branch == branch), -len(a.used)))
    lines = [
        f"{path}: the backbone is not complete. Nearest known format: {nearest.format.name}, "
        f"{nearest.branch} branch, {nearest.arch or 'no known architecture'}"
    ]
    if nearest.reason:
        lines.append(f"  {nearest.reason}")
    for title, keys in (
        ("missing", nearest.missing),
        ("left over", nearest.left_over),
        ("wrong", nearest.wrong),
    ):
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            lines.append(f"  {title}: {', '.join(keys[:8])}{more}")
    return "\n".join(lines)


def _stem_padding(chosen: Attempt, metadata: dict[str, str]) -> tuple[int | None, str]:
    """Effective padding of a 3x3 stem and what to say about it; None: as this project builds the stem."""
    if chosen.stem == "imagenet" or chosen.format is _OWN:
        return (int(metadata["stem_padding"]) if "stem_padding" in metadata else None), ""
    padding = chosen.format.cifar_padding
    if padding is None:
        return 1, "3x3 stem: padding 1 assumed, as usual; the file cannot tell"
    writer = chosen.format.name
    return padding, f"3x3 stem: effective padding {padding}, as {writer} builds it; the file cannot tell"


def _build(chosen: Attempt, stem_padding: int | None) -> nn.Module:
    from pretrain.model import build_backbone

    assert chosen.arch is not None
    for key, value in chosen.tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"{key} of the file holds NaN or infinity: the training that wrote it diverged")
    if "conv1.weight" in chosen.tensors:
        model: nn.Module = build_backbone(chosen.arch, stem=chosen.stem, num_classes=0)
    else:
        model = timm.create_model(chosen.arch, num_classes=0)  # a deep stem, timm's own
    if chosen.stem == "cifar" and stem_padding is not None:
        _first_conv(model).padding = (stem_padding, stem_padding)
    state = dict(chosen.tensors)
    if chosen.counters_missing:
        state |= {k: torch.zeros_like(v) for k, v in model.state_dict().items() if k.endswith(COUNTER)}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _first_conv(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))
