"""The other commands, and how a command line is read. Nothing here loads PyTorch, which takes seconds: --help
and a wrong option are answered at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from pretrain.common.word_lists import spread
from pretrain.objectives.expression import Expression
from transfer.options.evaluation import (
    EvaluationSettings,
    KnnSettings,
    LinearSettings,
    SemisupSettings,
    check_loading,
)
from transfer.options.weights import ConvertSettings, ExportSettings, InspectSettings


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
        check_loading(self)


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
