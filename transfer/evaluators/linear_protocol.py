"""The values of a linear protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transfer.evaluation.feature_scaling import Scaling
from transfer.evaluation.pooled_features import LAST, WINDOWS, stages_of
from transfer.evaluation.protocol import want
from transfer.evaluation.transforms import ImageValues
from transfer.evaluators.epoch_order import steps_of
from transfer.evaluators.heads import Optimizer, Schedule, check_steps

MOST_DRAWN = 10**8  # images of an epoch, whose order is drawn at once
MOST_HEADS = 1000


@dataclass(frozen=True, kw_only=True)
class LinearProtocol(ImageValues):
    """The values of a linear protocol."""

    method: Literal["heads", "logreg", "svm"] = "heads"
    """heads: by gradient steps; logreg and svm: solved on cached features."""
    augmentation: bool = True
    """Heads are trained on random crops and flips; else on features that are computed once."""
    learning_rates: tuple[float, ...] = ()
    """One head for each rate, weight decay and set of features."""
    per_256: bool = False
    """Multiply the learning rates by batch / 256."""
    weight_decays: tuple[float, ...] = (0.0,)
    """As for the rates."""
    features: tuple[str, ...] = LAST
    """Sets of features, each with heads of its own: a stage's pooled output, or several (layer3+layer4)."""
    optimizer: Optimizer = "sgd"
    """lars_weights: LARS on the weights alone, the bias by SGD."""
    momentum: float = 0.9
    """Of SGD and LARS."""
    batch: int = 256
    """Images a step, over all ranks."""
    epochs: int = 100
    """Times through the training images."""
    steps_per_epoch: int | None = None
    """Default: once through the training images; else an epoch is so many batches."""
    drop_last: bool = False
    """Leave out an epoch's last batch where it is not a whole one."""
    schedule: Schedule = "cosine"
    """How the learning rate falls; cosine_by_epoch: once an epoch instead of once a step."""
    milestones: tuple[int, ...] = ()
    """schedule steps: the epochs after which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """See milestones."""
    final: float = 0.0
    """Learning rate at the end, as a share of the first."""
    warmup_epochs: int = 0
    """Epochs in which the rate rises from 0 by step."""
    norm_batch: int | None = None
    """Given: features go through a BatchNorm without weight and bias, and of a training batch so many images
    are normalised together, as many as a GPU had."""
    init: Literal["normal", "uniform"] = "normal"
    """Of the heads. normal: N(0, 0.01), bias 0; uniform: nn.Linear's own."""
    pooling: Literal["average", "6x6"] = "average"
    """Of the last stage's map: to one number a channel, or, for svm, by windows of 6 x 6 with stride 1."""
    scaling: Scaling = "none"
    """Of cached features: each to mean 0 and variance 1 over training images, or each image to length 1;
    centred l2: after the mean of its own features is taken out."""
    held_out_percent: float = 0.0
    """Share of the training images kept aside for the choice among heads or costs."""
    held_out: Literal["per_class", "random", "published"] = "per_class"
    """per_class: so much of each class; random: of all; published: the set's own validation part where it has
    one (dtd, flowers102, aircraft), else random."""
    choose_on: Literal["held-out", "reported"] = "held-out"
    """Where the best head and epoch are chosen; "reported": on the test images, as published."""
    choose_epoch: Literal["any", "last"] = "any"
    """last: the choice is among the heads after the last epoch alone."""
    costs: tuple[float, ...] = ()
    """logreg and svm: inverse regularisation strengths C to choose from."""
    intercept: bool = True
    """logreg: whether the scores have a free constant."""
    iterations: int = 1000
    """logreg: at most so many of L-BFGS; svm: of the solver."""
    folds: int = 3
    """svm: parts of the training images for the choice of C."""
    shots: tuple[int, ...] = ()
    """svm: positive images a class; empty: all images."""
    samples: int = 5
    """svm: draws for each number of shots."""
    train_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the crops that heads are trained on; `interpolation` is of the images evaluated."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range, and for a grid without a place to choose on."""
        super().__post_init__()
        for key, numbers in (("learning_rates", self.learning_rates), ("costs", self.costs)):
            want(all(0 < x < math.inf for x in numbers), key, numbers, "numbers above 0")
        decays = bool(self.weight_decays) and all(0 <= x < math.inf for x in self.weight_decays)
        want(decays, "weight_decays", self.weight_decays, "at least one number, each 0 or more")
        for key, least in (("batch", 1), ("iterations", 1), ("folds", 2), ("samples", 1)):
            want(getattr(self, key) >= least, key, getattr(self, key), f"{least} or more")
        if self.steps_per_epoch is not None:
            steps = 1 <= self.steps_per_epoch <= MOST_DRAWN // self.batch
            most = f"1 to {MOST_DRAWN // self.batch:,} of batch {self.batch}"
            want(steps, "steps_per_epoch", self.steps_per_epoch, most)
        if self.norm_batch is not None:
            want(self.norm_batch >= 2, "norm_batch", self.norm_batch, "2 or more")
        want(all(k >= 1 for k in self.shots), "shots", self.shots, "numbers of 1 or more")
        exponential = self.schedule == "exponential"
        low = 0 < self.final <= 1 if exponential else 0 <= self.final <= 1
        want(low, "final", self.final, "above 0, at most 1" if exponential else "0 to 1")
        held = self.held_out_percent
        want(0 <= held < 100, "held_out_percent", held, "0 to below 100")
        check_steps(self)
        warm = 0 <= self.warmup_epochs < self.epochs
        want(warm, "warmup_epochs", self.warmup_epochs, "0 or more, fewer than epochs")
        stages_of(self.features)
        if self.method == "heads":
            want(bool(self.learning_rates), "learning_rates", self.learning_rates, "at least one")
        else:
            want(bool(self.costs), "costs", self.costs, f"at least one, for method {self.method}")
        if self.features != LAST and (self.method == "svm" or (self.method == "logreg" and self.several)):
            raise ValueError(f"features {list(self.features)}: svm takes {LAST[0]} alone, and logreg one set")
        if self.pooling != "average" and self.method != "svm":
            raise ValueError(f"pooling {self.pooling}: only svm takes another than average")
        if len(self.features) > 1 and self.scaling in ("l2", "centred l2"):
            raise ValueError("scaling l2 is of an image's whole features: it wants a single set of them")
        cached = "of features that are computed once: set augmentation: false"
        if self.augmentation and self.method == "logreg":
            raise ValueError(f"method logreg is {cached}")
        if self.augmentation and self.method == "heads" and self.scaling != "none":
            raise ValueError(f"scaling {self.scaling} is {cached}")
        want(
            self.grid_size <= MOST_HEADS, "learning_rates", self.learning_rates, f"{MOST_HEADS} heads at most"
        )
        if self.grid_size > 1 and self.choose_on == "held-out" and not held:
            raise ValueError("a grid of heads needs held_out_percent above 0, or choose_on: reported")
        if self.method == "logreg" and not held and len(self.costs) > 1:
            raise ValueError("logreg needs held_out_percent above 0, to choose among the costs on")
        if not self.intercept:
            want(
                self.method == "logreg" and len(self.costs) == 1, "intercept", False, "true but for one cost"
            )

    @property
    def several(self) -> bool:
        """Whether there is more than one set of features."""
        return len(self.features) > 1

    @property
    def stages(self) -> tuple[str, ...]:
        """What of the backbone is looked at, see `pooled_features`."""
        return WINDOWS if self.pooling == "6x6" else stages_of(self.features)

    def steps(self, n: int) -> int:
        """Steps of an epoch over `n` training images."""
        return self.steps_per_epoch or steps_of(n, self.batch, drop_last=self.drop_last)

    @property
    def grid_size(self) -> int:
        """Number of heads: learning rates x weight decays x sets of features."""
        return len(self.learning_rates) * len(self.weight_decays) * len(self.features)

    @property
    def rates(self) -> list[float]:
        """The learning rates, scaled by batch / 256 where `per_256` says so."""
        return [r * (self.batch / 256 if self.per_256 else 1.0) for r in self.learning_rates]
