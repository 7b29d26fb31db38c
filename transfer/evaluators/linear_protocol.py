"""The values of a linear protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.data.normalization import IMAGENET_STD
from transfer.evaluation.pooled_features import LAST, stages_of
from transfer.evaluators.heads import Optimizer, Schedule


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """The values of a linear protocol."""

    method: Literal["heads", "logreg", "svm"] = "heads"
    """heads: by gradient steps; logreg and svm: solved on cached features."""
    augmentation: bool = True
    learning_rates: tuple[float, ...] = ()
    per_256: bool = False
    """Multiply the learning rates by batch / 256."""
    weight_decays: tuple[float, ...] = (0.0,)
    features: tuple[str, ...] = LAST
    """Sets of features, each with heads of its own: a stage's pooled output, or several (layer3+layer4)."""
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    batch: int = 256
    """Images a step, over all ranks."""
    epochs: int = 100
    steps_per_epoch: int | None = None
    """Default: once through the training images; else an epoch is so many batches."""
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final: float = 0.0
    """Learning rate at the end, as a share of the first."""
    init: Literal["normal", "uniform"] = "normal"
    scaling: Literal["none", "standardise", "l2"] = "none"
    """Of cached features: each to mean 0 and variance 1 over training images, or each image to length 1."""
    held_out_percent: float = 0.0
    """Share of each class's training images kept aside for the choice among heads."""
    choose_on: Literal["held-out", "reported"] = "held-out"
    """Where the best head and epoch are chosen; "reported": on the test images, as published."""
    costs: tuple[float, ...] = ()
    """logreg and svm: inverse regularisation strengths C to choose from."""
    iterations: int = 1000
    """logreg: at most so many of L-BFGS; svm: of the solver."""
    folds: int = 3
    """svm: parts of the training images for the choice of C."""
    shots: tuple[int, ...] = ()
    """svm: positive images a class; empty: all images."""
    samples: int = 5
    """svm: draws for each number of shots."""
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    train_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the crops that heads are trained on; `interpolation` is of the images judged."""
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Raises ValueError for a grid without a place to choose on."""
        if self.method == "heads" and not self.learning_rates:
            raise ValueError("learning_rates is empty")
        stages_of(self.features)
        if self.features != LAST and self.method != "heads":
            raise ValueError(f"features {list(self.features)}: only heads take others than {LAST[0]}")
        if len(self.features) > 1 and self.scaling == "l2":
            raise ValueError("scaling l2 is of an image's whole features: it wants a single set of them")
        if self.grid_size > 1 and self.choose_on == "held-out" and not self.held_out_percent:
            raise ValueError("a grid of heads needs held_out_percent above 0, or choose_on: reported")
        if self.method == "logreg" and not (self.costs and self.held_out_percent):
            raise ValueError("logreg needs costs, and held_out_percent above 0 to choose among them on")
        if not 0 <= self.held_out_percent < 100:
            raise ValueError(f"held_out_percent {self.held_out_percent}: wanted 0 to below 100")

    @property
    def grid_size(self) -> int:
        return len(self.learning_rates) * len(self.weight_decays) * len(self.features)

    @property
    def rates(self) -> list[float]:
        return [r * (self.batch / 256 if self.per_256 else 1.0) for r in self.learning_rates]
