"""The settings of the evaluators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pretrain.common.errors import UserError
from transfer.options.weights import WeightsOptions


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
        check_loading(self)

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
        need_wandb(self.wandb)


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
        need_wandb(self.wandb)


def check_loading(settings: Any) -> None:
    """Raises ValueError for numbers out of range."""
    for name, least, most in (
        ("batch_size", 1, 2**20), ("workers", 0, 1024), ("seed", 0, 2**32 - 1), ("subset_seed", 0, 2**32 - 1),
    ):  # fmt: skip
        value = getattr(settings, name, None)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value}: wanted {least:,} to {most:,}")


def need_wandb(project: str | None) -> None:
    """Raises UserError where W&B is asked for and not installed."""
    if project is not None and find_spec("wandb") is None:
        raise UserError("--wandb needs the wandb package: pip install 'intl-bench[wandb]'")
