"""A backbone from a checkpoint file of any known writer, proved complete.

The file is read as each format of `transfer.checkpoints.formats`. A reading is taken only when every
parameter and buffer of the backbone is loaded exactly once and every other tensor of its container is named
as no backbone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of
from pretrain.data.normalization import CIFAR_MEAN, CIFAR_STD
from transfer.checkpoints.architecture import COUNTER, SAME_SHAPES, blocks, match_arch
from transfer.checkpoints.formats import CMC, FOREIGN, OWN_BACKBONE, OWN_BACKBONE_EMA, OWN_RUN, Format, Place
from transfer.checkpoints.safe_load import RawFile, load_file

OWN_FORMAT = "intl-bench/"
BRANCHES = ("online", "ema")
RAW_PIXELS = "raw-pixels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network that maps images to features, with where its weights came from."""

    model: nn.Module | None
    """N x 3 x H x W normalised images -> N x num_features, in eval mode; None: the pixels themselves."""
    arch: str | None
    """timm's name; None where there is none."""
    weights: dict[str, Any]
    """What a result says of the weights: path, sha256, format, branch (online or ema); of a ResNet from a
    file also stem (imagenet: 7x7, stride 2, max pooling; cifar: 3x3, stride 1, no pooling) and stem_padding,
    the effective zero padding of its convolution."""
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is known of its training: image_size, mean, std, source ..."""
    used: dict[str, str] = dataclasses.field(default_factory=dict)
    """Key in the file -> key in the model."""
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    """Key in the file -> why it is no part of this backbone."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, for the reader to check."""

    def __repr__(self) -> str:
        return f"Backbone({self.arch}, {self.format}, {self.branch}, sha256 {self.sha256[:12]})"

    @property
    def format(self) -> str:
        return self.weights["format"]

    @property
    def branch(self) -> str:
        return self.weights["branch"]

    @property
    def sha256(self) -> str:
        return self.weights["sha256"]

    @property
    def path(self) -> str:
        return self.weights["path"]

    @property
    def stem(self) -> str | None:
        return self.weights.get("stem")

    @property
    def stem_padding(self) -> int | None:
        return self.weights.get("stem_padding")

    @property
    def key(self) -> str:
        """What identifies the weights in the feature cache."""
        return f"{self.sha256} {self.branch} {self.arch}"

    def network(self) -> Any:
        """The model. Raises UserError for raw pixels, which have none."""
        if self.model is None:
            raise UserError(f"{RAW_PIXELS} have no backbone")
        return self.model


def raw_pixels() -> Backbone:
    """The pixels themselves in place of features: what a backbone has to beat."""
    digest = hashlib.sha256(RAW_PIXELS.encode()).hexdigest()
    weights = {"path": RAW_PIXELS, "sha256": digest, "format": RAW_PIXELS, "branch": "online"}
    return Backbone(model=None, arch=None, weights=weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The file read as `format`: one branch at one place."""

    format: Format
    branch: str
    place: Place
    arch: str | None
    """The architecture, or the nearest one where something is missing, left over or wrong."""
    stem: str
    tensors: dict[str, Tensor]
    """Key in the model -> tensor."""
    used: dict[str, str]
    dropped: dict[str, str]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    wrong: tuple[str, ...]
    reason: str
    """Why the file can not be of this format at all."""
    counters_missing: bool

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.left_over) + len(self.wrong) + bool(self.reason)

    @property
    def complete(self) -> bool:
        return self.faults == 0


def load_backbone(path: str | Path, *, arch: str | None = None, branch: str = "online") -> Backbone:
    """Load the backbone of `branch` ("online" or "ema") from a checkpoint of any known format.

    `arch` names a timm ResNet where several have the same shapes. Raises UserError when the backbone is not
    complete, with what is missing, what is left over and the nearest known format.
    """
    if branch not in BRANCHES:
        raise UserError(f"--branch {branch}: there are online and ema")
    before = _identity(path)
    raw = load_file(path)
    loaded = load_reading(raw, read_all(raw, arch=arch), path, arch=arch, branch=branch)
    if _identity(path) != before:
        raise UserError(
            f"{path} was replaced while it was read; wait for the run that writes it, or copy it first"
        )
    return loaded


def _identity(path: str | Path) -> tuple[int, ...]:
    """What changes when another file takes its place; nothing for no file."""
    try:
        stat = Path(path).stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def load_reading(
    raw: RawFile, readings: list[Reading], path: str | Path, *, arch: str | None, branch: str
) -> Backbone:
    """The backbone of `branch` by the complete one of `readings`; raises UserError as `load_backbone`."""
    try:
        reading = choose(readings, branch, Path(path))
    except UserError as error:
        if arch is None:
            raise
        try:
            found = choose(read_all(raw), branch, Path(path)).arch
        except UserError:
            raise error from None
        raise UserError(
            f"{path}: its backbone is a {found}, not a {arch}: leave out --arch {arch}"
        ) from error
    metadata = own_metadata(raw, branch, path)
    check_metadata(metadata, path)
    model = _build(reading, metadata)
    assert reading.arch is not None
    if reading.stem == "cifar" and reading.format in FOREIGN:  # the notes say so
        metadata |= {"mean": numbers_text(CIFAR_MEAN), "std": numbers_text(CIFAR_STD)}
    weights = {
        "path": str(path), "sha256": sha256_of(path), "format": reading.format.name, "branch": branch,
        "stem": reading.stem, "stem_padding": int(_first_conv(model).padding[0]),
    }  # fmt: skip
    return Backbone(
        model=model, arch=reading.arch, weights=weights, metadata=metadata, used=reading.used,
        dropped=reading.dropped, notes=tuple(filter(None, notes_of(reading, readings, raw, arch))),
    )  # fmt: skip


def numbers_text(values: Iterable[float]) -> str:
    """Numbers as metadata have them: "0.1,0.2,0.3"."""
    return ",".join(map(str, values))


# ------------------------------------------------------------------ reading the file as each format


def read_all(raw: RawFile, *, arch: str | None = None) -> list[Reading]:
    """Every reading that finds at least one residual block where its format has the backbone.

    A file that says it is this project's is read as nothing else.
    """
    value, hint = raw.value, None
    formats: tuple[Format, ...] = (*FOREIGN, CMC)
    if raw.metadata.get("format", "").startswith(OWN_FORMAT):
        held = raw.metadata.get("branch", "online")
        formats = (OWN_BACKBONE,) if held == "online" else (OWN_BACKBONE_EMA,)
        hint = raw.metadata.get("arch")
    elif isinstance(value, dict):
        if str(value.get("format", "")).startswith(OWN_FORMAT):
            formats = (OWN_RUN,)
        named = value.get("arch", "")  # MoCo's and timm's training scripts write it beside the weights
        hint = named if isinstance(named, str) and "resne" in named else None
    readings = []
    for format_ in formats:
        for branch in BRANCHES:
            places = format_.online if branch == "online" else format_.ema
            for place in dict.fromkeys(_place(value, p) for p in places):
                container = _container(value, place.container)
                if container is not None:
                    reading = _read(format_, branch, place, container, arch, hint)
                    reading.dropped.update(_elsewhere(format_, branch, place, value))
                    readings.append(reading)
    return [r for r in readings if any(blocks(dict.fromkeys(r.tensors, ())))]


def _elsewhere(format_: Format, branch: str, place: Place, value: Any) -> dict[str, str]:
    """The other branch's tensors where it has a container of its own, and what they are."""
    other, places = ("ema", format_.ema) if branch == "online" else ("online", format_.online)
    found = {}
    for there in dict.fromkeys(_place(value, p) for p in places):
        container = _container(value, there.container)
        if container is None or not there.container or there.container == place.container:
            continue
        heads = [(prefix, f"EMA {why}" if other == "ema" else why) for prefix, why in format_.drop]
        for key in (key for key, held in container.items() if isinstance(held, Tensor)):
            why = _longest(unwrap(str(key)), ((there.prefix, f"{other} branch"), *heads))
            found[f"{there.container}.{key}"] = why or f"beside the {other} branch"
    return found


def _place(value: Any, place: Place) -> Place:
    """The place, or the file's top where the state dict was saved without its usual container."""
    flat = _container(value, "") is not None
    return Place("", place.prefix) if flat and place.container in ("state_dict", "model") else place


def _container(value: Any, dotted: str) -> dict[Any, Any] | None:
    for key in filter(None, dotted.split(".")):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
        return value
    return None


def unwrap(key: str) -> str:
    """The key without DDP's `module` and torch.compile's `_orig_mod`, wherever they stand."""
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _read(
    format_: Format, branch: str, place: Place, container: dict[Any, Any], arch: str | None, hint: str | None
) -> Reading:
    """Sort the container's keys into backbone, named drops and the rest; find the architecture."""
    used: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    left_over: list[str] = []
    other_branches = [
        (p.prefix, f"{name} branch")
        for name, places in (("online", format_.online), ("ema", format_.ema))
        for p in places
        if p.prefix and p.prefix != place.prefix and place.container in (p.container, "") and name != branch
    ]
    names = {key: unwrap(str(key)) for key in container}
    for key, name in names.items():
        no_part = _longest(name, (*format_.drop, *other_branches), longer_than=len(place.prefix))
        if not isinstance(container[key], Tensor):
            dropped[key] = "not a tensor"
        elif no_part:
            dropped[key] = no_part
        elif name.startswith(place.prefix):
            target = _renamed(name.removeprefix(place.prefix), format_.rename)
            if target in tensors:
                left_over.append(f"{key} (a second {target})")
            else:
                used[key], tensors[target] = target, container[key]
        else:
            shorter = _longest(name, (*format_.drop, *other_branches))
            if shorter:
                dropped[key] = shorter
            else:
                left_over.append(str(key))
    match = match_arch({key: tuple(t.shape) for key, t in tensors.items()}, arch=arch, hint=hint)
    file_key = {target: key for key, target in used.items()}
    reason = match.reason
    if format_.needs and not any(name.startswith(format_.needs) for name in names.values()):
        reason = reason or f"a file of {format_.name} has {' or '.join(format_.needs)}"
    return Reading(
        format=format_,
        branch=branch,
        place=place,
        arch=match.arch,
        stem=match.stem,
        tensors=tensors,
        used=used,
        dropped=dropped,
        missing=match.missing,
        left_over=(*left_over, *(file_key[key] for key in match.extra)),
        wrong=match.wrong,
        reason=reason,
        counters_missing=match.counters_missing,
    )


def _longest(name: str, prefixes: Iterable[tuple[str, str]], *, longer_than: int = -1) -> str:
    """What the longest prefix of `name` stands for; "" when none fits."""
    fitting = [(len(p), why) for p, why in prefixes if len(p) > longer_than and name.startswith(p)]
    return max(fitting)[1] if fitting else ""


def _renamed(name: str, rename: tuple[tuple[str, str], ...]) -> str:
    for old, new in rename:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


# ------------------------------------------------------------------ choosing one and building it


def choose(readings: list[Reading], branch: str, path: Path) -> Reading:
    """The complete reading of `branch`. Several count as one when they load the same tensors alike."""
    complete = [r for r in readings if r.complete]
    fitting = [r for r in complete if r.branch == branch]
    if not fitting and complete:
        other = complete[0]
        raise UserError(
            f"{path} ({other.format.name}) has no {branch} branch, but a complete {other.branch} one: "
            f"take it with --branch {other.branch}"
        )
    if not fitting:
        raise UserError(_incomplete(readings, branch, path))
    if len({(r.place.container, *sorted(r.used.items())) for r in fitting}) > 1:
        found = "; ".join(
            f"{r.format.name}: {r.place.container or 'top'} {r.place.prefix or '(bare)'}" for r in fitting
        )
        raise UserError(
            f"{path} is ambiguous, several places could be its {branch} branch ({found}); "
            "save the one you mean as a file of its own, or take another --branch"
        )
    return max(
        fitting,
        key=lambda r: (len(set(r.dropped.values())), r.stem == "cifar" and bool(r.format.cifar_padding)),
    )


def _incomplete(readings: list[Reading], branch: str, path: Path) -> str:
    if not readings:
        return (
            f"{path} holds no ResNet where any known format has one; `python -m transfer inspect` shows "
            "what is in the file, `python -m transfer formats` what can be read"
        )
    nearest = min(readings, key=lambda r: (r.faults - 0.5 * (r.branch == branch), -len(r.used)))
    lines = [
        f"{path}: the backbone is not complete. Nearest known format: {nearest.format.name}, "
        f"{nearest.branch} branch, {nearest.arch or 'no known architecture'}",
        *faults_of(nearest),
    ]
    return "\n  ".join(lines)


def faults_of(reading: Reading, limit: int = 8) -> list[str]:
    """What keeps the reading from being complete, a line a kind, at most `limit` keys each."""
    lines = [reading.reason] if reading.reason else []
    kinds = (("missing", reading.missing), ("left over", reading.left_over), ("wrong shape", reading.wrong))
    for kind, keys in kinds:
        if keys:
            more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
            lines.append(f"{kind}: {', '.join(keys[:limit])}{more}")
    return [printable(line) for line in lines]


def printable(text: str) -> str:
    """Without control characters: a key from a stranger's file must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def notes_of(reading: Reading, readings: list[Reading], raw: RawFile, arch: str | None) -> list[str]:
    """What a user should know about this reading, the other `readings` of the file being these."""
    notes = [reading.format.note]
    alike = [
        r.format
        for r in readings
        if r.complete
        and r.format is not reading.format
        and (r.branch, r.used) == (reading.branch, reading.used)
    ]
    if alike:
        notes.append(f"fits as well, with the same tensors: {', '.join(f.name for f in alike)}")
    if reading.stem == "cifar" and reading.format in FOREIGN:
        paddings = {f.name: f.cifar_padding for f in (reading.format, *alike)}
        known = ", ".join(f"{name} has {padding}" for name, padding in paddings.items() if padding)
        notes.append(
            f"3x3 stem without pooling, effective padding {reading.format.cifar_padding or 1} assumed "
            f"({known or 'the usual one'}): the file cannot tell"
        )
        mean, std = (", ".join(f"{v:.4f}" for v in values) for values in (CIFAR_MEAN, CIFAR_STD))
        notes.append(
            f"CIFAR's mean ({mean}) and standard deviation ({std}) assumed where --mean and --std give none: "
            "the file cannot tell"
        )
    twins = SAME_SHAPES.get(reading.arch or "", ())
    if twins and arch is None and "conv1.weight" not in reading.tensors:
        notes.append(f"{', '.join(twins)} have the same shapes; --arch names one of them")
    if reading.counters_missing:
        notes.append(
            f"no {COUNTER} in the file (PyTorch before 0.4.1): set to 0; evaluation does not use them"
        )
    halves = {str(t.dtype).removeprefix("torch.") for t in reading.tensors.values() if t.is_floating_point()}
    if halves != {"float32"}:
        notes.append(f"stored as {', '.join(sorted(halves))}, used as float32")
    if raw.placeholders:
        notes.append(f"named in the file, not loaded and not needed: {', '.join(raw.placeholders)}")
    return notes


def own_metadata(raw: RawFile, branch: str, path: str | Path) -> dict[str, str]:
    """What this project's own files say about themselves; empty for others."""
    if raw.metadata.get("format", "").startswith(OWN_FORMAT):
        return raw.metadata
    value = raw.value
    if not isinstance(value, dict) or not str(value.get("format", "")).startswith(OWN_FORMAT):
        return {}
    config = value.get("config") or {}
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: its config is a {type(config).__name__}, wanted the run's settings by name: the file "
            "is damaged or another program's; take the run's backbone.safetensors"
        )
    trained = bool(value.get("step"))
    found: dict[str, Any] = {
        k: config[k] for k in ("arch", "stem", "dataset", "epochs", "seed") if k in config
    }
    found |= {k: ",".join(map(str, _listed(config[k]))) for k in ("mean", "std") if k in config}
    sizes = _listed(config.get("view_sizes") or None)
    found |= {"image_size": config.get("eval_size") or sizes[0], "step": value.get("step")}
    found |= {"source": "INTL pretraining" if trained else "random initialisation", "branch": branch}
    return {"format": str(value["format"]), **{k: str(v) for k, v in found.items() if v is not None}}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_metadata(metadata: dict[str, str], path: str | Path) -> None:
    """Raises UserError for metadata that an evaluation cannot go by."""
    whole, three = "a whole number of px", "three numbers, such as 0.5,0.5,0.5"
    for name, wanted in (("stem_padding", whole), ("image_size", whole), ("mean", three), ("std", three)):
        text = metadata.get(name)
        if text and not _fits(name, text):
            said = f"its metadata say {name}: {text[:80]!r}; wanted {wanted}: write the file anew"
            raise UserError(printable(f"{path}: {said}"))


def _fits(name: str, text: str) -> bool:
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        return False
    if name in ("mean", "std"):
        return len(numbers) == 3 and all(map(math.isfinite, numbers)) and (name == "mean" or min(numbers) > 0)
    return text.isdigit() and (name == "stem_padding" or numbers[0] > 0)


def _build(reading: Reading, metadata: dict[str, str]) -> nn.Module:
    """The model with the reading's tensors, loaded strictly."""
    from pretrain.model import build_backbone

    assert reading.arch is not None
    for key, value in reading.tensors.items():
        if value.is_floating_point() and not math.isfinite(value.detach().sum(dtype=torch.float64)):
            raise UserError(
                f"{key} of the {reading.branch} branch holds NaN or infinity; take an earlier checkpoint"
            )
        if not value.is_floating_point() and not key.endswith(COUNTER):
            raise UserError(
                f"{key} is {value.dtype}: quantised weights cannot be judged; give the float ones"
            )
    if "conv1.weight" in reading.tensors:
        model: nn.Module = build_backbone(reading.arch, stem=reading.stem, num_classes=0)
    else:
        model = timm.create_model(reading.arch, num_classes=0)  # a deep stem, timm's own
    if reading.stem == "cifar":
        padding = int(metadata.get("stem_padding") or reading.format.cifar_padding or 1)
        _first_conv(model).padding = (padding, padding)
    state = dict(reading.tensors)
    if reading.counters_missing:
        state |= {key: torch.zeros_like(t) for key, t in model.state_dict().items() if key.endswith(COUNTER)}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _first_conv(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))
