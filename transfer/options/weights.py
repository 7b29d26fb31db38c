"""How a checkpoint file is read, and of the commands that do no more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

RAW_PIXELS = "raw-pixels"
"""In place of a file: the pixels themselves."""


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """How to read a checkpoint where the file does not say it all (docs/reading_checkpoints.md)."""

    branch: Literal["online", "ema"] | None = None
    """Which backbone, where the file holds two; default: online, of zoo:NAME the one that is published."""
    arch: str | None = None
    """timm's name, where several architectures have the same shapes."""
    container: str | None = None
    """Where in the file the tensors lie: keys joined by dots, such as model.ema; "." for the file's top."""
    prefix: str | None = None
    """What the backbone's keys begin with, such as model.resnet. ("." for nothing)."""
    drop: str | None = None
    """Beginnings of keys that are no part of the backbone: --drop model.fc.,model.neck."""
    stem: (
        Literal["imagenet", "imagenet-nopool", "cifar", "cifar-pool", "cifar-stride2", "cifar-stride2-pool"]
        | None
    ) = None
    """imagenet: 7x7, stride 2, max-pool; imagenet-nopool; cifar: 3x3, stride 1, no pool; cifar-pool,
    cifar-stride2, cifar-stride2-pool."""
    stem_padding: int | None = None
    """Zero padding of a 3x3 stem, in pixels: 1, or 2 in INTL's and solo-learn's files."""
    stride_in_1x1: bool | None = None
    """Bottlenecks have their stride in the first 1x1 convolution (Caffe's and detectron2's usual ones)."""
    last_stride: Literal[1, 2] | None = None
    """Stride of the last stage; person re-identification often has 1."""
    channels: Literal["rgb", "bgr"] | None = None
    """Order of colours that the network was trained on."""
    heads: int | None = None
    """Attention heads a block of a ViT, where width and depth do not say it: MoCo v3's ViT-S has 12."""
    weights_format: str | None = None
    """A layout of your own, as YAML (docs/reading_checkpoints.md)."""
    zoo: str | None = None
    """Manifest of your own for --weights zoo:NAME, as YAML like transfer/zoo/zoo.yaml."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        if self.stem_padding is not None and not 0 <= self.stem_padding <= 8:
            raise ValueError(f"--stem-padding {self.stem_padding}: wanted 0 to 8 px")
        if self.heads is not None and not 1 <= self.heads <= 128:
            raise ValueError(f"--heads {self.heads}: wanted 1 to 128")

    def reading(self, **changes: Any) -> WeightsOptions:
        """These options without those of a command, with some of them changed."""
        return WeightsOptions(**{f.name: getattr(self, f.name) for f in fields(WeightsOptions)} | changes)

    @property
    def words(self) -> tuple[str, ...]:
        """What was asked for, as a command line has it."""
        asked = {f.name: getattr(self, f.name) for f in fields(WeightsOptions)}
        return tuple(
            word
            for name, value in asked.items()
            if value is not None
            for word in (
                f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)
            )
        )  # fmt: skip

    @property
    def read_with(self) -> str:
        """What was asked for beyond branch and architecture, as it is typed; results record it."""
        said = iter(self.words)
        named = ("--branch", "--arch", "--zoo")
        return " ".join(f"{name} {v}" for name, v in zip(said, said) if name not in named)


@dataclass(frozen=True, kw_only=True)
class InspectSettings(WeightsOptions):
    """Show what a checkpoint file holds and whether its backbone loads. No code in it is run."""

    file: str
    """Checkpoint of any format that `python -m transfer formats` lists, or zoo:NAME."""
    branch: Literal["online", "ema"] | None = None
    """Which branch to load; default: online, else ema; of zoo:NAME the one that is published."""
    keys: bool = False
    """List every tensor, used and dropped, or all of a file in which no backbone was found."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(WeightsOptions):
    """Convert a checkpoint to detectron2 weights, proved to compute the same; --reverse converts back."""

    weights: Path
    """Checkpoint file, in any format that `python -m transfer formats` lists (a detectron2 file with
    --reverse)."""
    output: Path
    """File to write: .pkl for detectron2, .safetensors with --reverse."""
    reverse: bool = False
    """From a detectron2 .pkl or .pth file (a backbone or a whole detector) back to timm's keys."""
    verify: bool = True
    """Prove the conversion in detectron2. --no-verify is for machines without it, and is recorded."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(WeightsOptions):
    """Write a checkpoint's backbone for another library, and prove it by loading it there."""

    weights: Path
    """Checkpoint file, in any format that `python -m transfer formats` lists."""
    output: Path
    """Folder to write; new, empty or of an earlier export."""
    format: Literal["timm", "torchvision", "detectron2", "huggingface"]
    """timm and torchvision: a file of their keys. detectron2: backbone.pkl. huggingface: a folder with
    config.json, model.safetensors and a model card, for timm's local-dir: and the hub."""
    results: Path | None = None
    """Folder whose results of these weights go into the model card (huggingface)."""
