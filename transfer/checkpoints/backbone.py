"""A backbone from a checkpoint file of any known writer, proved complete.

A reading is taken only when every parameter and buffer of the backbone is loaded exactly once and every other
tensor of its container is named as no backbone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of
from pretrain.common.terminal import printable
from transfer.checkpoints.formats import FOUND
from transfer.checkpoints.forward import Forward, build, forward_of
from transfer.checkpoints.other_files import what_instead
from transfer.checkpoints.reading import OWN_FORMAT, Reading, choose, read_all
from transfer.checkpoints.safe_load import RawFile, load_file
from transfer.checkpoints.search import containers
from transfer.options.weights import RAW_PIXELS, WeightsOptions
from transfer.zoo.download import located

if TYPE_CHECKING:
    from torch import nn

CLASSIFIERS = ("fc", "head", "classifier")  # as timm's and torchvision's networks call theirs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network that maps images to features, with where its weights came from."""

    model: nn.Module | None
    """N x 3 x H x W normalised images -> N x num_features, in eval mode; None: the pixels themselves."""
    arch: str | None
    """timm's name; None where there is none."""
    weights: dict[str, Any]
    """What a result says of the weights: path, sha256, format, branch (online or ema); of a ResNet from a
    file also stem (imagenet: 7x7, stride 2, max pooling; cifar: 3x3, stride 1, no pooling; others as
    `transfer.options.weights` has them), stem_padding, the effective zero padding of its convolution, and
    read_with, what was said or found of how to read it, where that is not the usual; of another network what
    it is built with (options: of timm.create_model; network: in words), and positions, how its writer
    resamples them."""
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
        """Name of the format that the file was read as, raw-pixels or module."""
        return self.weights["format"]

    @property
    def branch(self) -> str:
        """online or ema."""
        return self.weights["branch"]

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the file, or of a module's weights."""
        return self.weights["sha256"]

    @property
    def path(self) -> str:
        """The file as it was named, or a module's name."""
        return self.weights["path"]

    @property
    def stem(self) -> str | None:
        """imagenet, cifar or a variant of them; None for what is no ResNet from a file."""
        return self.weights.get("stem")

    @property
    def stem_padding(self) -> int | None:
        """Zero padding of the first convolution, px; None as for `stem`."""
        return self.weights.get("stem_padding")

    @property
    def key(self) -> str:
        """What identifies the weights in the feature cache."""
        how = self.weights.get("read_with")
        found = self.weights.get("network")
        return f"{self.sha256} {self.branch} {self.arch}" + "".join(
            f" {part}" for part in (found, how) if part
        )

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


def digest_of(module: nn.Module) -> str:
    """SHA-256 of the names and values of every parameter and buffer."""
    import torch  # here, as inspecting a file needs none of it

    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def backbone_of_module(module: nn.Module) -> Backbone:
    """A module of the user's own, N x 3 x H x W -> N x D, as a backbone; it is put into eval mode.

    Its weights go by a SHA-256 of their names and values.
    """
    name = type(module).__name__
    weights = {"path": name, "sha256": digest_of(module), "format": "module", "branch": "online"}
    heads = [n for n in CLASSIFIERS if hasattr(getattr(module, n, None), "out_features")]
    notes = [
        f"{name}: its last layer, {n}, looks like a classifier: what is evaluated are its scores, not the "
        "features before it; put torch.nn.Identity() in its place"
        for n in heads
    ]
    return Backbone(model=module.eval(), arch=name, weights=weights, notes=tuple(notes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a file's backbone is, before the network is built."""

    reading: Reading
    forward: Forward
    weights: dict[str, Any]
    metadata: dict[str, str]
    notes: tuple[str, ...]


def load_backbone(path: str | Path, asked: WeightsOptions | None = None, **options: Any) -> Backbone:
    """Load a backbone from a checkpoint, a file or zoo:NAME, as `asked`, or as the named `options` of
    WeightsOptions say.

    Raises UserError when the backbone is not complete, with what is missing, what is left over, and the
    options that take it.
    """
    unknown = sorted(set(options) - {f.name for f in dataclasses.fields(WeightsOptions)})
    if unknown:
        known = ", ".join(f.name for f in dataclasses.fields(WeightsOptions))
        raise UserError(f"load_backbone has no option {', '.join(unknown)}; there are {known}")
    asked = asked or WeightsOptions(**options)
    if asked.branch not in (None, "online", "ema"):
        raise UserError(f"--branch {asked.branch}: there are online and ema")
    file, asked, entry = located(path, asked)
    before = _identity(file)
    raw = load_file(file)
    loaded = load_found(find(raw, file, asked))
    if _identity(file) != before:
        raise UserError(
            f"{file} was replaced while it was read; wait for the run that writes it, or copy it first"
        )
    if entry is None:
        return loaded
    doubts = entry.doubts(loaded.arch, loaded.format)
    return dataclasses.replace(
        loaded, weights=loaded.weights | {"path": str(path)}, notes=(*loaded.notes, *doubts)
    )


def _identity(path: str | Path) -> tuple[int, ...]:
    """What changes when another file takes its place; nothing for no file."""
    try:
        stat = Path(path).stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def find(raw: RawFile, path: str | Path, asked: WeightsOptions) -> Found:
    """The backbone of the file that `asked` means, checked, not yet built. Raises UserError.

    A format of one's own that does not fit the file is told, and the file read without it: a suite has files
    of several writers.
    """
    readings = read_all(raw, asked)
    if asked.weights_format is not None and (unfit := _unfit(readings)) is not None:
        said = f"--weights-format {asked.weights_format} does not fit it: {unfit}"
        try:
            found = find(raw, path, dataclasses.replace(asked, weights_format=None))
        except UserError as error:
            raise UserError(f"{said} (`inspect FILE --keys` lists its tensors); without: {error}") from None
        return dataclasses.replace(
            found, notes=(*found.notes, f"{said}; it was read as {found.reading.format.name}")
        )
    if not readings:
        raise UserError(f"{path} holds no network of timm's: {what_instead(raw, containers(raw.value))}")
    try:
        reading = choose(readings, asked, Path(path))
    except UserError as error:
        raise _with_hints(error, raw, readings, asked, path) from None
    metadata = own_metadata(raw, reading.branch, path)
    check_metadata(metadata, path)
    forward = forward_of(reading, readings, raw, asked, metadata, path)
    weights: dict[str, Any] = {
        "path": str(path), "sha256": sha256_of(path), "format": reading.format.name, "branch": reading.branch,
    }  # fmt: skip
    if forward.stem is not None:
        weights |= {"stem": forward.stem, "stem_padding": forward.stem_padding}
    else:
        weights |= {"network": network_text(forward), "options": dict(forward.options)}
        weights |= {"positions": forward.positions} if forward.positions else {}
    layout = f"(sha256 {sha256_of(asked.weights_format)[:12]})" if asked.weights_format else ""
    how = " ".join(filter(None, (asked.read_with, layout, *forward.found)))
    if how:
        weights["read_with"] = how
    return Found(
        reading=reading, forward=forward, weights=weights, metadata=forward.metadata | metadata,
        notes=forward.notes,
    )  # fmt: skip


def _unfit(readings: list[Reading]) -> str | None:
    """Why no network of the file is complete in the one format that was asked for; None where one is."""
    own = [r for r in readings if r.format is not FOUND]
    if any(r.complete for r in own):
        return None
    if not own:
        return "no network lies at the places that it names"
    nearest = min(own, key=lambda r: r.faults)
    missing, left_over = len(nearest.network.match.missing), len(nearest.left_over)
    return nearest.reason or f"{missing} keys are missing and {left_over} left over"


def network_text(forward: Forward) -> str:
    """What a network that is no ResNet was built as beside its name, in words; "" for all as in its name."""
    said = dict(forward.options)
    words = []
    if "patch_size" in said:
        registers = said.get("reg_tokens", said.get("num_reg_tokens", 0))
        words = [
            f"patches of {said['patch_size']} px", f"{said['num_heads']} heads",
            "class token" if said.get("class_token", True) else "no class token",
            f"{registers} registers" if registers else "",
            "norm after the mean" if said.get("fc_norm") else "",
        ]  # fmt: skip
    if "img_size" in said:
        words.append(f"positions of {said['img_size']} px")
    if said.get("head_norm_first"):
        words.append("norm before the mean")
    if said.get("without"):
        words.append(f"no {said['without']}")
    return ", ".join(filter(None, words))


def _with_hints(
    error: UserError, raw: RawFile, readings: list[Reading], asked: WeightsOptions, path: str | Path
) -> UserError:
    """The error, and which architecture the file has where --arch or a rarer ResNet is the reason."""
    if asked.arch is not None:
        try:
            plain = dataclasses.replace(asked, arch=None)
            found = choose(read_all(raw, plain), plain, Path(path)).arch
        except UserError:
            return error
        return UserError(
            f"{path}: its backbone is a {found}, not a {asked.arch}: leave out --arch {asked.arch}"
        )
    if not any(r.network.complete for r in readings):
        said = what_instead(raw, containers(raw.value), readings[0].network)
        if said:
            return UserError(f"{error}\n  {said}")
    return error


def load_found(found: Found) -> Backbone:
    """The built network. Raises UserError for tensors that are no weights."""
    reading = found.reading
    beside = {
        f"{other.path}.{key}": f"in {other.path}, beside the {reading.branch} branch"
        for other in found.forward.beside
        for key in other.tensors
    }
    return Backbone(
        model=build(reading, found.forward), arch=reading.arch, weights=found.weights,
        metadata=found.metadata, used=reading.used, dropped=reading.dropped | beside, notes=found.notes,
    )  # fmt: skip


def numbers_text(values: Iterable[float]) -> str:
    """Numbers as metadata have them: "0.1,0.2,0.3"."""
    return ",".join(map(str, values))


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
    heads, ways = "a whole number", "bicubic, bicubic offset or bicubic antialias"
    for name, wanted in (
        ("stem_padding", whole), ("image_size", whole), ("mean", three), ("std", three), ("heads", heads),
        ("positions", ways),
    ):  # fmt: skip
        text = metadata.get(name)
        if text and not _fits(name, text):
            said = f"its metadata say {name}: {text[:80]!r}; wanted {wanted}: write the file anew"
            raise UserError(printable(f"{path}: {said}"))


def _fits(name: str, text: str) -> bool:
    if name == "positions":
        return text in ("bicubic", "bicubic offset", "bicubic antialias")
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        return False
    if name in ("mean", "std"):
        return len(numbers) == 3 and all(map(math.isfinite, numbers)) and (name == "mean" or min(numbers) > 0)
    return bool(re.fullmatch("[0-9]{1,5}", text)) and (name == "stem_padding" or numbers[0] > 0)
