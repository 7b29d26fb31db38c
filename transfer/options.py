"""The settings of every command of transfer. They load without PyTorch, which takes seconds: --help and a
wrong option are answered at once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from pretrain.common.word_lists import spread
from pretrain.objectives.expression import Expression


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
    """List every tensor, used and dropped."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(WeightsOptions):
    """What every evaluator takes."""

    weights: str
    """Checkpoint file in any known format, or zoo:NAME (python -m transfer zoo lists them); raw-pixels:
    evaluate the pixels themselves (knn and linear)."""
    protocol: str
    """Protocol NAME@VERSION (python -m transfer protocols lists them), or a YAML file of your own."""
    dataset: str
    """imagenet, imagenet100, imagefolder, webdataset, cifar10, cifar100, fashion_mnist, flowers102, pets,
    food101, dtd, aircraft, stl10, eurosat, caltech101, sun397, places365; voc07 with linear and voc07_svm@1
    (which folder, split and metric: docs/datasets.md)."""
    data_dir: Path
    """Folder of the data set."""
    output: Path
    """Folder for results.jsonl, config.yaml and progress.json; run again on it to go on."""
    label: str | None = None
    """Name of this row in the report."""
    image_size: int | None = None
    """Side of the evaluated images in px; default: small images as the weights' file records, else their own
    size; others the protocol's."""
    mean: list[float] | None = None
    """Mean of the images' normalisation, three numbers; default: as the weights' file records, else CIFAR's
    for another project's file with a CIFAR stem, else ImageNet's."""
    std: list[float] | None = None
    """Standard deviation of the same; default: as for --mean, or the protocol's instead of ImageNet's."""
    cache_dir: Path | None = None
    """Folder of cached features, to be shared between evaluators; default OUTPUT/features."""
    stage_to: Path | None = None
    """First copy the data set to this node-local folder, once per node, and verify the copy."""
    batch_size: int = 256
    """Images a forward pass when features are extracted."""
    workers: int | None = None
    """Processes that decode images; default: none for small images, else the cores up to 8."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen backbone. auto: float32 where the protocol states it, as those with published figures do;
    else bfloat16 where the device computes it natively and the features of a first batch agree with float32
    within 5 % of their spread."""
    random_init: bool = False
    """Evaluate a backbone that was never trained (no BatchNorm statistics); refused otherwise."""
    max_broken_images: int = 0
    """Images that may be unreadable, of training and test part together: they are left out, and a result's n
    is the number evaluated. With more, all of them are listed and the cached features are kept."""
    force: bool = False
    """Evaluate again although OUTPUT holds the result."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        super().__post_init__()
        if self.image_size is not None and self.image_size < 8:
            raise ValueError(f"--image-size {self.image_size}: wanted 8 px or more")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != 3 or not all(map(math.isfinite, values))):
                raise ValueError(f"--{name} {values}: wanted three numbers, such as [0.5, 0.5, 0.5]")
        if max(map(abs, self.mean or [0.0])) > 4:
            raise ValueError(
                f"--mean {self.mean}: pixels are taken from 0 to 1 here; divide mean and standard deviation "
                "by 255"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"--std {self.std}: wanted three numbers above 0")
        if self.max_broken_images < 0:
            raise ValueError(f"--max-broken-images {self.max_broken_images}: wanted 0 or more")
        _check_loading(self)

    @property
    def cache(self) -> Path:
        """Folder of cached features: --cache-dir, else OUTPUT/features."""
        return self.cache_dir or self.output / "features"


@dataclass(frozen=True, kw_only=True)
class KnnSettings(EvaluationSettings):
    """Classify the test images by their nearest training images in feature space."""

    seed: int = 0
    """Changes nothing: k-NN is deterministic and records no seed."""


@dataclass(frozen=True, kw_only=True)
class LinearSettings(EvaluationSettings):
    """Train linear heads on the frozen backbone and report their accuracy."""

    seed: int = 0
    """Seed of the heads' initialisation, the held-out part, the order of images and the augmentation."""
    wandb: str | None = None
    """Log each epoch's loss and accuracy to this project of Weights & Biases."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range, UserError where wandb is missing."""
        super().__post_init__()
        _need_wandb(self.wandb)


@dataclass(frozen=True, kw_only=True)
class SemisupSettings(EvaluationSettings):
    """Fine-tune backbone and classifier on 1 %, 10 % or all of the labels."""

    weights: str
    """Checkpoint file in any known format, or zoo:NAME."""
    label_percent: Literal[1, 10, 100]
    """Share of the training labels, in percent."""
    lists: str | None = None
    """File of image names, one a line, that makes up the share; on imagenet SimCLR's list, checked, or
    "download" to fetch it. Default for other data sets: a class-balanced draw."""
    subset_seed: int = 0
    """Seed of the class-balanced draw; independent of --seed, as published lists are."""
    seed: int = 0
    """Seed of the head's initialisation, the order of images and the augmentation."""
    cache_dir: Path | None = None
    """Folder that "--lists download" fetches into; default OUTPUT/features."""
    batch_size: int = 256
    """Test images a forward pass; the protocol says how many a training step takes."""
    save_every: int = 500
    """Steps between two checkpoints within an epoch."""
    wandb: str | None = None
    """Log each epoch's loss and accuracies to this project of Weights & Biases."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # type: ignore[assignment]
    """Of training and evaluation. auto: the protocol's, which is float32 as in the published code; the others
    by autocast."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        super().__post_init__()
        if self.max_broken_images:
            raise ValueError(
                "--max-broken-images is for k-NN and probes on cached features; fine-tuning decodes its "
                "images every epoch and wants all of them readable"
            )
        if self.save_every < 1:
            raise ValueError(f"--save-every {self.save_every}: wanted 1 or more")
        _need_wandb(self.wandb)


def _check_loading(settings: Any) -> None:
    """Raises ValueError for numbers out of range."""
    for name, least, most in (
        ("batch_size", 1, 2**20), ("workers", 0, 1024), ("seed", 0, 2**32 - 1), ("subset_seed", 0, 2**32 - 1),
    ):  # fmt: skip
        value = getattr(settings, name, None)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: wanted {least:,} to {most:,}")


def _need_wandb(project: str | None) -> None:
    if project is not None and find_spec("wandb") is None:
        raise UserError("--wandb needs the wandb package: pip install 'intl-bench[wandb]'")


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


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(EvaluationSettings):
    """Diagnose checkpoints by the spectrum of their features on training images; labels are not needed."""

    weights: list[str]  # type: ignore[assignment]
    """Checkpoint files in any known format, or raw-pixels; such as a run's checkpoint_epoch*.pt."""
    protocol: str = "spectrum@1"
    """Protocol NAME@VERSION (python -m transfer protocols lists them), or a YAML file of your own."""
    views: bool = True
    """Alignment and LiDAR, from several augmented views of each image. --no-views leaves them out."""
    layers: bool = True
    """The spectra of all four stages of a ResNet too, in one pass. --no-layers: of its output alone."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        super().__post_init__()
        if not self.weights:
            raise ValueError("--weights: wanted at least one checkpoint file")
        if self.label is not None and len(self.weights) > 1:
            raise ValueError(f"--label {self.label}: names one row, and --weights names {len(self.weights)}")

    def of(self, weights: str) -> EvaluationSettings:
        """The same for one of the checkpoints."""
        names = (f.name for f in fields(EvaluationSettings))
        mixed = not weights.startswith("zoo:") and any(w.startswith("zoo:") for w in self.weights)
        changes: dict[str, Any] = {"weights": weights} | ({"zoo": None} if mixed else {})
        return EvaluationSettings(**{n: getattr(self, n) for n in names} | changes)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Train with several spectral transformations and objectives and see which avoid collapse."""

    data_dir: str
    """Folder of the data set."""
    output: str
    """Folder for runs, statement and pictures; a study that was stopped there goes on."""
    dataset: str = "fashion_mnist"
    """A small data set: fashion_mnist, cifar10, cifar100 or an image folder."""
    whitening: Literal["channel", "batch"] = "channel"
    """Which covariance is transformed."""
    powers: tuple[float, ...] = (0.0, 0.25, 0.4, 0.6, 0.75, 1.0)
    """The p of g(λ) = λ^−p; 0 transforms nothing; p = 1/2, hard whitening, is always there."""
    iterations: tuple[int, ...] = (2, 4, 7)
    """The T of IterNorm alone; INTL has T = 4."""
    transforms: tuple[str, ...] = ("1/(λ+0.1)^0.5", "min(λ^-0.5, 10)")
    """Further g(λ), as `pretrain --transform` takes them."""
    objectives: tuple[
        Literal["vicreg", "barlow_twins", "w_mse", "frossl", "mmcr", "coding_rate", "sigreg"], ...
    ] = ("vicreg", "barlow_twins", "w_mse", "frossl", "mmcr", "coding_rate", "sigreg")
    """Objectives beside them, at their published weights."""
    seeds: int = 3
    """Runs of each transformation and objective."""
    steps: int = 120
    """Training steps of a run."""
    batch: int = 128
    """Images of a step."""
    features: int = 256
    """Length of the embeddings."""
    lr: float = 0.2
    """Peak learning rate of SGD with momentum 0.9."""
    bank: int = 4000
    """Training images with labels for k-NN."""
    queries: int = 2000
    """Test images that k-NN classifies."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "bank", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        side = self.batch if self.whitening == "channel" else self.features
        if side <= 8 or self.batch < 2 or self.features < 2:
            raise ValueError(f"--batch and --features must be more than 8, got {self.batch}, {self.features}")
        for text in self.transforms:
            Expression(text)
        if any(t < 1 for t in self.iterations):
            raise ValueError(f"--iterations must be at least 1 each, got {list(self.iterations)}")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Tables and plots of all results under DIR ..., beside published numbers."""

    output: str
    """Folder for index.html, report.md, tables/, plots/ and pictures/."""
    dirs: list[str] = field(default_factory=list)
    """Folders to search for results."""
    title: str = "Transfer results"
    """Heading of the report."""
    pool: bool = False
    """Treat the same label in several DIRs as seeds of one method instead of as separate methods."""
    pictures: int = 6
    """Show at most this many pictures of each folder."""

    def __post_init__(self) -> None:
        if not self.dirs:
            raise UserError("no folder given; usage: python -m transfer report DIR... --output DIR")
        if self.pictures < 0:
            raise UserError(f"--pictures {self.pictures}: a number of at least 0 is wanted")


@dataclass(frozen=True, kw_only=True)
class ScenesSettings:
    """Compose detection scenes with boxes and masks from a data set's test images."""

    data_dir: Path
    """Folder of the data set."""
    output: Path
    """Folder to write: {train,test}/*.jpg and {train,test}.json."""
    source: Literal["fashion_mnist", "cifar10", "imagefolder"] = "fashion_mnist"
    """Where objects come from: garments cut along their silhouette, or whole images as rectangles."""
    train: int = 400
    """Scenes to train on."""
    test: int = 100
    """Scenes to test on, of other source images."""
    size: int = 128
    """Side of a scene, pixels."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if self.train < 0 or self.test < 0 or self.train + self.test == 0:
            raise ValueError(f"--train {self.train} --test {self.test}: wanted at least one scene")
        if not 32 <= self.size <= 4096:
            raise ValueError(f"--size {self.size}: wanted 32 to 4096 pixels")


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings:
    """One ranked table for each protocol and its conditions, from all results under DIR ..."""

    output: str
    """Folder for index.html, report.md and tables/."""
    dirs: list[str] = field(default_factory=list)
    """Folders to search for results.jsonl, such as one of each group."""
    title: str = "Leaderboard"
    """Heading of the page."""
    pool: bool = False
    """Treat the same label in several DIRs as seeds of one method instead of as separate methods."""

    def __post_init__(self) -> None:
        if not self.dirs:
            raise UserError("no folder given; usage: python -m transfer leaderboard DIR... --output DIR")


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings:
    """Evaluate a published checkpoint by the protocols of its figures, and say which it reproduces."""

    name: str
    """Its name in the zoo (python -m transfer zoo lists them)."""
    data_dir: Path
    """Folder of the data set."""
    output: Path
    """Folder for reproduction.json and the evaluations; run again on it to go on."""
    task: Literal["knn", "linear"] | None = None
    """Only the figures of this task; default: all that can be run."""
    dataset: str = "imagenet"
    """The data set in DATA_DIR: only figures of it are run."""
    zoo: str | None = None
    """Manifest of your own, as YAML like transfer/zoo/zoo.yaml."""
    seed: int = 0
    """Seed of the linear probe."""
    batch_size: int = 256
    """Images a forward pass when features are extracted."""
    workers: int | None = None
    """Processes that decode images; default: none for small images, else the cores up to 8."""
    stage_to: Path | None = None
    """First copy the data set to this node-local folder."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        _check_loading(self)


SETTINGS: dict[str, type] = {
    "inspect": InspectSettings, "knn": KnnSettings, "linear": LinearSettings, "semisup": SemisupSettings,
    "convert": ConvertSettings, "export": ExportSettings, "spectrum": SpectrumSettings,
    "spectrum-study": StudySettings,
    "report": ReportSettings, "leaderboard": LeaderboardSettings, "reproduce": ReproduceSettings,
    "scenes": ScenesSettings,
}  # fmt: skip
"""By the names of their commands."""
LISTS = {"spectrum": ("--weights",)}
"""Options that take several words."""
POSITIONAL = {"inspect": ["file"], "report": ["dirs"], "leaderboard": ["dirs"], "reproduce": ["name"]}


OF_PROTOCOLS = (
    "k", "ks", "temperature", "vote", "metric", "lr", "learning-rate", "learning-rates", "epochs", "batch",
    "optimizer", "momentum", "weight-decay", "weight-decays", "schedule", "warmup-epochs", "augmentation",
    "crop", "resize", "interpolation", "lr-backbone", "lr-head", "features",
)  # fmt: skip
"""What people look for among an evaluator's options, and a protocol says."""


def _hints(command: str, argv: Sequence[str]) -> dict[str, str]:
    if not issubclass(SETTINGS[command], EvaluationSettings):
        return {}
    named = [value for name, value in pairwise(argv) if name == "--protocol"]
    show = f"`python -m transfer protocols show {named[-1] if named else 'NAME@VERSION'}`"
    told = f"the protocol says this: {show} prints it; copy it under another name to change it"
    return {f"--{word}": told for word in OF_PROTOCOLS}


def parse(command: str, argv: Sequence[str]) -> Any:
    """The settings of `python -m transfer COMMAND`."""
    settings = SETTINGS[command]
    hints = _hints(command, argv)
    if command == "inspect":  # as every other command has it
        argv = [re.sub("^--weights(?==|$)", "--file", word) for word in argv]
    return parse_settings(
        settings, spread([*argv], LISTS.get(command, ())), prog=f"python -m transfer {command}",
        description=settings.__doc__ or "", positional=POSITIONAL.get(command, []), hints=hints,
    )  # fmt: skip
