"""The values of a fine-tuning protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transfer.evaluation.augment import check_auto_augment
from transfer.evaluation.pooled_features import LAST
from transfer.evaluation.protocol import want
from transfer.evaluation.tokens import is_tokens
from transfer.evaluation.transforms import ImageValues
from transfer.evaluators.heads import check_steps


@dataclass(frozen=True, kw_only=True)
class FineTuneProtocol(ImageValues):
    """The values of a fine-tuning protocol; rates by the share of labels in percent."""

    lr_backbone: dict[str, float]
    """Learning rate of the backbone for each share of the labels, in percent: '1', '10' or '100'."""
    lr_head: dict[str, float]
    """The same of the classifier."""
    lr_per_256: bool = False
    """Multiply the rates by batch / 256."""
    batch: int = 256
    """Images a step, over all ranks."""
    epochs: int = 20
    """Times through the labelled images."""
    drop_last: bool = False
    """Leave out an epoch's last batch where it is not a whole one."""
    schedule: Literal["constant", "cosine", "cosine_by_epoch", "steps"] = "cosine_by_epoch"
    """How the learning rates fall: by epoch, or cosine by step."""
    warmup_epochs: int = 0
    """Epochs in which the rates rise from 0 by step."""
    final: float = 0.0
    """Learning rates at the end of a cosine, as a share of the first."""
    milestones: tuple[int, ...] = ()
    """schedule steps: the epochs after which the rates are multiplied by gamma."""
    gamma: float = 0.1
    """See milestones."""
    momentum: float = 0.9
    """Of SGD."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """adamw: betas 0.9 and 0.999, and no momentum of SGD's."""
    weight_decay: float = 0.0
    """Of all weights, or as weight_decay_of says."""
    weight_decay_of: Literal["all", "matrices"] = "all"
    """matrices: not of biases, norms, and what timm's network names (class token, positions)."""
    layer_decay: float = 1.0
    """Rate of one of timm's layers of the backbone by that of the next, the head's behind the last."""
    drop_path: float = 0.0
    """Share of images for which the last block of a ViT is left out in training; it rises from 0 linearly."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    mixup: float = 0.0
    """alpha of timm's Mixup, a draw for each rank's batch; with cutmix too, one of them at even odds."""
    cutmix: float = 0.0
    """The same of CutMix."""
    auto_augment: str = ""
    """timm's word for a RandAugment of the training images, such as rand-m9-mstd0.5-inc1."""
    random_erasing: float = 0.0
    """Share of training images that lose a rectangle to noise."""
    head_norm: bool = False
    """A new LayerNorm of the features before the classifier."""
    head_init: Literal["normal", "uniform", "tiny"] = "normal"
    """normal: N(0, 0.01), bias 0; tiny: N(0, 2e-5), bias 0; uniform: nn.Linear's own."""
    sync_bn: bool = False
    """BatchNorm statistics over all ranks; else each rank's own, those of rank 0 are evaluated."""
    precision: Literal["auto", "float32"] = "float32"
    """Of training and evaluation, unless --precision says otherwise."""

    def __post_init__(self) -> None:
        """Raises ValueError for rates of different shares and numbers out of range."""
        super().__post_init__()
        for key, rates in (("lr_backbone", self.lr_backbone), ("lr_head", self.lr_head)):
            shares = bool(rates) and set(rates) <= {"1", "10", "100"}
            want(shares, key, rates, "a rate for some of the shares '1', '10' and '100' (percent of labels)")
            finite = all(0 <= r < math.inf for r in rates.values())
            want(finite, key, rates, "rates of 0 (nothing is trained there) or more")
        want(len(self.features) == 1, "features", self.features, "one set")
        if self.features != LAST:
            want(is_tokens(self.features[0]), "features", self.features, "layer4, or a ViT's tokens")
        same = set(self.lr_backbone) == set(self.lr_head)
        want(same, "lr_head", self.lr_head, f"rates for the shares of lr_backbone, {list(self.lr_backbone)}")
        want(self.batch >= 2, "batch", self.batch, "2 images or more")
        for key in ("weight_decay", "mixup", "cutmix"):
            want(0 <= getattr(self, key) < math.inf, key, getattr(self, key), "0 or more")
        for key in ("drop_path", "label_smoothing", "random_erasing", "final"):
            want(0 <= getattr(self, key) < 1, key, getattr(self, key), "0 to below 1")
        want(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0, at most 1")
        check_auto_augment(self.auto_augment)
        if self.pairs:
            whole = self.drop_last and self.batch % 2 == 0
            want(whole, "mixup", self.mixup, "drop_last true and an even batch, as images are mixed in pairs")
        check_steps(self)
        warm = 0 <= self.warmup_epochs < self.epochs
        want(warm, "warmup_epochs", self.warmup_epochs, "0 or more, fewer than epochs")

    @property
    def pairs(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)

    @property
    def draws(self) -> bool:
        """Whether a rank draws anything for its batch."""
        return self.pairs or bool(self.drop_path or self.random_erasing)

    def rates(self, percent: int) -> tuple[float, float]:
        """Learning rate of backbone and head at the start. Raises KeyError for a share without one."""
        scale = self.batch / 256 if self.lr_per_256 else 1.0
        return self.lr_backbone[str(percent)] * scale, self.lr_head[str(percent)] * scale
