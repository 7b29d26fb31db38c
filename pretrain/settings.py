"""The settings of a pretraining run: checked, frozen, from recipes and options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from pretrain.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from pretrain.objectives.expression import Expression

OWN_HOOKS = ("transfer.hooks:knn",)
"""Hooks that a recipe may name; any other runs a module of the user's, who is to say so."""

TITLES = {
    "intl": "INTL", "power": "power of the spectrum", "vicreg": "VICReg", "barlow_twins": "Barlow Twins",
    "w_mse": "W-MSE", "frossl": "FroSSL", "mmcr": "MMCR", "coding_rate": "coding rate", "sigreg": "SIGReg",
}  # fmt: skip
"""Objectives and how papers write them."""

RECIPES = Path(__file__).parent / "recipes"

FREE_TO_CHANGE = frozenset({
    "data_dir", "output", "workers", "log_every", "save_every", "keep_every_epochs", "wandb", "on_collapse",
    "max_broken_images", "hook", "hook_every_epochs", "step", "data_on",
})  # fmt: skip
"""Settings that a continued run may change: all others shape the result. `step` and `data_on` change how it
is rounded, `data_on` also the crops of JPEGs that the loader decodes smaller."""

ADDED_SINCE = {
    "threads": None, "objective": None, "transform": None, "step": "eager", "deterministic": False,
    "data_on": "host",
}  # fmt: skip
"""What a checkpoint that does not name these settings was made with."""


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint holds, as they are called today.

    What was float32 before there was a choice of steps is tf32 today: PyTorch's default.
    """
    before = {**ADDED_SINCE, **config}
    if "step" not in config and before.get("precision") == "float32":
        before["precision"] = "tf32"
    return before


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a pretraining run is."""

    data_dir: str
    """Folder with the data set."""
    output: str
    """Folder for checkpoint, backbone, logs and the settings used; an unfinished run in it is resumed."""
    dataset: str = "imagenet"
    """imagenet, imagenet100, imagefolder (train/<class>/, val/<class>/), webdataset (train-*.tar, val-*.tar
    of KEY.jpg and KEY.cls), cifar10, cifar100, fashion_mnist, or another of docs/datasets.md."""
    seed: int = 0
    """Seed of initialisation, order of images and augmentation."""

    arch: str = "resnet50"
    """Any timm ResNet with a plain stem: resnet18, 34, 50, 101, 152, wide_resnet50_2 ..."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: 3x3 convolution (padding 2) and no max-pool in place of the 7x7 stem."""
    zero_init_last: bool | None = None
    """Start the last BN of each residual branch at zero; default: yes, except for resnet18 and resnet34."""
    projector_hidden: int = 8192
    """Width of the projector's hidden layers."""
    projector_output: int = 8192
    """Size of the embedding."""
    projector_layers: int = 3
    """Linear layers of the projector."""

    objective: (
        Literal[
            "intl", "power", "vicreg", "barlow_twins", "w_mse", "frossl", "mmcr", "coding_rate", "sigreg"
        ]
        | None
    ) = None  # fmt: skip
    """What to train with, at its published weights; power: a transformation of the spectrum without a
    penalty. Default: intl, or power where --power or --transform is given."""
    iterations: int = 4
    """Newton iterations of IterNorm (intl)."""
    trade_off: float | None = None
    """Weight of the trace penalty (intl); default 0.01 (log2 n - 3), n the batch (batch: the embedding)."""
    whitening: Literal["channel", "batch"] = "channel"
    """Whiten the N x N (channel) or the D x D (batch) covariance (intl, power)."""
    power: float | None = None
    """Train with g = λ^-power (0.5: hard whitening) and without penalty in place of INTL, to compare."""
    transform: str | None = None
    """Any other g(λ) in its place: an expression such as 1/(λ+0.1)^0.5 or min(λ^-0.5, 10), of λ (or x),
    numbers, + - * / ^, sqrt, exp, log, log1p, tanh, abs, min, max and clip; or MODULE:FUNCTION of
    eigenvalues."""
    ema: bool = False
    """Embed view 0 with an EMA target encoder."""
    ema_momentum: float = 0.996
    """Momentum of the EMA at the start; rises to 1 by a cosine."""

    epochs: int = 100
    """Passes over the data; 0 writes the random control: same initialisation, BN statistics estimated."""
    max_steps: int | None = None
    """End the schedule after so many steps instead of after all epochs."""
    batch_global: int = 256
    """Images per step over all ranks."""
    lr: float = 0.5
    """Learning rate at a batch of 256; scaled by batch_global / 256."""
    lr_final_ratio: float = 0.001
    """Learning rate of the last step, as a share of the highest."""
    warmup_epochs: float = 2.0
    """Epochs of linear warm-up."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-5
    """Weight decay, but of biases and BN parameters only with --decay-1d."""
    decay_1d: bool = False
    """Apply weight decay to biases and BN parameters too."""

    view_sizes: list[int] = dataclasses.field(default_factory=lambda: [224, 224])
    """Side in px of each view; as many views as sizes, view 0 the target."""
    min_scales: list[float] = dataclasses.field(default_factory=lambda: [0.08])
    """Least share of the image's area in a crop, one for each view or one for all."""
    max_scales: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    """Largest share of the image's area in a crop, one for each view or one for all."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of the resized crop, antialiased."""
    jitter: list[float] = dataclasses.field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])
    """Strengths of brightness, contrast, saturation and hue."""
    jitter_p: list[float] = dataclasses.field(default_factory=lambda: [0.8])
    """Probability of colour jitter, one for each view or one for all."""
    grey_p: list[float] = dataclasses.field(default_factory=lambda: [0.2])
    """Probability of greyscale, one for each view or one for all."""
    blur_p: list[float] = dataclasses.field(default_factory=lambda: [1.0, 0.1])
    """Probability of Gaussian blur, one for each view or one for all."""
    blur_sigma: list[float] = dataclasses.field(default_factory=lambda: [0.1, 2.0])
    """Least and largest standard deviation of the blur in px."""
    solarise_p: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.2])
    """Probability of solarisation, one for each view or one for all."""
    flip_p: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    """Probability of a horizontal flip, one for each view or one for all."""
    mean: list[float] = dataclasses.field(default_factory=lambda: list(IMAGENET_MEAN))
    """Mean of the normalisation."""
    std: list[float] = dataclasses.field(default_factory=lambda: list(IMAGENET_STD))
    """Standard deviation of the normalisation."""
    eval_size: int | None = None
    """Image size that the weights' evaluation should use; default: that of view 0."""
    jpeg_draft: bool = True
    """Decode a large JPEG at 1/2, 1/4 or 1/8 of its size where each crop keeps twice its view's side."""

    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Of backbone and projector; auto: bfloat16 where the device has it natively, on a CPU only if it is
    faster than float32, which is timed in the first seconds. tf32: float32 with a GPU's convolutions in TF32,
    as PyTorch has it unless told otherwise. The loss has float32."""
    threads: int | Literal["auto"] | None = None
    """Threads of the model on a CPU; auto: one or all, timed in the first seconds; default: torch's."""
    step: Literal["auto", "eager", "compiled", "graph", "compiled_graph"] = "auto"
    """How a step runs. compiled: the network's kernels by torch.compile, which needs a C++ compiler; graph:
    captured once and replayed, without Python; compiled_graph: both, views and loss compiled too; auto: on
    one GPU a graph, compiled where the run is long enough to gain."""
    deterministic: bool = False
    """On a GPU take only operations that give the same bits each time, so that a run cut off and continued
    ends as an undisturbed one; slower."""
    data_on: Literal["auto", "host", "device"] = "auto"
    """Where the images lie. device: all of them, as uint8, in the GPU's memory, where their views are made
    without workers; auto: there if they take no more than a quarter of it, unless --augment-on workers."""
    augment_on: Literal["auto", "workers", "device"] = "auto"
    """Where colour, blur and solarisation of loaded images run; auto: on a GPU where there is one, else in
    the workers."""
    workers: int | None = None
    """Data loading processes of each rank; 0 loads in the training process; default: by cores."""
    max_broken_images: int = 50
    """Corrupt image files that are skipped with a warning, over all ranks, before the run stops."""

    log_every: int = 50
    """Steps between two lines of metrics.jsonl, with a diagnosis of the embedding's spectrum."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep_every_epochs: int | None = None
    """Keep a copy of the checkpoint every so many epochs."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the embedding collapses; checked every log_every steps after the warm-up."""
    hook: str | None = None
    """MODULE:FUNCTION called with (backbone, settings) every hook_every_epochs; its numbers are logged.
    transfer.hooks:knn: k-NN accuracy on the data set's own test images."""
    hook_every_epochs: int = 10
    """Epochs between two calls of the hook."""
    wandb: str | None = None
    """Weights & Biases project to log to."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 0), ("batch_global", 2), ("projector_layers", 1), ("projector_hidden", 1),
            ("projector_output", 2), ("iterations", 1), ("log_every", 1), ("save_every", 1), ("seed", 0),
            ("hook_every_epochs", 1), ("max_broken_images", 0), ("warmup_epochs", 0), ("lr", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{_option(name)} must be at least {least}, got {getattr(self, name)}")
        if isinstance(self.threads, int) and self.threads < 1:
            raise UserError(f"--threads must be at least 1, or auto, got {self.threads}")
        if len(self.view_sizes) < 2:
            raise UserError(f"--view-sizes must name at least 2 views, got {self.view_sizes}")
        if min(self.view_sizes) < 8:
            raise UserError(f"--view-sizes must be at least 8 px, got {self.view_sizes}")
        for name in _PER_VIEW:
            values = getattr(self, name)
            if len(values) not in (1, len(self.view_sizes)):
                raise UserError(
                    f"{_option(name)} has {len(values)} values for {len(self.view_sizes)} views; "
                    "give one for each view or one for all"
                )
            if min(values) < 0 or max(values) > 1:
                raise UserError(f"{_option(name)} must lie between 0 and 1, got {values}")
        if any(a > b or b == 0 for a, b in zip(self.per_view("min_scales"), self.per_view("max_scales"))):
            raise UserError(f"each of --min-scales {self.min_scales} must be at most its --max-scales")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise UserError(
                f"--jitter wants brightness, contrast, saturation, hue (<= 0.5), got {self.jitter}"
            )
        if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UserError(f"--blur-sigma wants two numbers 0 < least <= largest, got {self.blur_sigma}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"--mean and --std want three numbers each, got {self.mean} and {self.std}")
        if self.keep_every_epochs is not None and self.keep_every_epochs < 1:
            raise UserError(f"--keep-every-epochs must be at least 1, got {self.keep_every_epochs}")
        if self.trade_off is not None and not (math.isfinite(self.trade_off) and self.trade_off >= 0):
            raise UserError(f"--trade-off must be a number of at least 0, got {self.trade_off}")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(
                f"--max-steps must be at least 1, got {self.max_steps}; for the control: --epochs 0"
            )
        if self.data_on == "device" and self.augment_on == "workers":
            raise UserError(
                "--data-on device --augment-on workers: views of images on the device are made there, not by "
                "workers; leave one of the two out"
            )
        self._check_objective()

    def _check_objective(self) -> None:
        """Raises UserError for options that do not go with the objective, or would do nothing beside it."""
        name = self.loss_name
        given = [
            f"{_option(field)} {getattr(self, field)}"
            for field in ("iterations", "trade_off", "whitening", "power", "transform")
            if getattr(self, field) != _DEFAULTS[field] and name not in _TAKEN_BY[field]
        ]
        if given:
            raise UserError(
                f"--objective {name} takes no IterNorm, trade-off or transformation but its own, so that "
                f"{' and '.join(given)} would do nothing; leave one or the other out"
            )
        if name == "power" and (self.power is None) == (self.transform is None):
            both = "both" if self.power is not None else "neither"
            raise UserError(f"--objective power wants --power or --transform, got {both}")
        if self.transform is not None and ":" not in self.transform:
            try:
                Expression(self.transform)
            except ValueError as error:
                raise UserError(f"--transform: {error}") from None
        n, d = self.batch_global, self.projector_output
        side, option = (n, "--batch-global") if self.whitening == "channel" else (d, "--projector-output")
        if name == "intl" and self.trade_off is None and side <= 8:
            raise UserError(
                f"the default trade-off is zero or negative at {option} {side}: take more than 8 or set "
                "--trade-off"
            )
        if name == "w_mse" and (n <= d or n % min(n, 2 * d)):
            raise UserError(
                f"W-MSE whitens 2 D images at a time, or all if there are fewer, but more than D: "
                f"--batch-global {n} does not fit --projector-output {d}"
            )

    @property
    def loss_name(self) -> str:
        """The objective, where it is left open too."""
        transformed = self.power is not None or self.transform is not None
        return self.objective or ("power" if transformed else "intl")

    @property
    def method(self) -> str:
        """The objective's name as papers write it, or the transformation in its place."""
        if self.power is not None:
            return f"λ^-{self.power:g}"
        return f"g(λ) = {self.transform}" if self.transform is not None else TITLES[self.loss_name]

    def per_view(self, name: str) -> list[float]:
        """The values of a per-view setting, one for each view."""
        values = getattr(self, name)
        return values * len(self.view_sizes) if len(values) == 1 else values

    @property
    def image_size(self) -> int:
        """Side in px at which the backbone is to be evaluated."""
        return self.eval_size or self.view_sizes[0]


GROUPS = {
    "data_dir": "data and output", "arch": "network", "objective": "loss",
    "epochs": "schedule and optimizer", "view_sizes": "views", "precision": "machine",
    "log_every": "saving and logging",
}  # fmt: skip
"""The first option of each group of --help, and the group's title."""


HINTS = {
    "--batch-size": "did you mean --batch-global? It counts the images of a step over all ranks",
    "--learning-rate": "did you mean --lr?", "--data-path": "did you mean --data-dir?",
    "--compile": "--step compiled has taken its place, and the default chooses: leave it out",
    "--gpus": "start one process a GPU: torchrun --nproc-per-node N",
}  # fmt: skip
"""What other programs call their options."""


def parse_recipe(argv: Sequence[str], *, description: str = "") -> Settings:
    """The settings of a run from its recipe and options."""
    settings = parse_settings(
        Settings, argv, prog="python -m pretrain", description=description, config_flag="--recipe",
        presets=RECIPES, groups=GROUPS, hints=HINTS,
    )  # fmt: skip
    refuse_code(settings, "the recipe", "{}", argv=argv)
    return settings


def refuse_code(settings: Settings, who: str, option: str, *, argv: Sequence[str] = ()) -> None:
    """Raises UserError for a hook or transformation that is not this project's and that `argv` does not name.

    It came from a file, and would run.
    """
    foreign = {"hook": settings.hook} if settings.hook not in (None, *OWN_HOOKS) else {}
    if settings.transform is not None and ":" in settings.transform:
        foreign["transform"] = settings.transform
    for name, value in foreign.items():
        if not any(word.partition("=")[0] == f"--{name}" for word in argv):
            raise UserError(
                f"{who} asks for {name}: {value}, which runs code that is not of this project: if you "
                f"trust it, give {option.format(f'--{name} {value}')} yourself"
            )


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Settings)}
_TAKEN_BY = {
    "iterations": {"intl"}, "trade_off": {"intl"}, "whitening": {"intl", "power"}, "power": {"power"},
    "transform": {"power"},
}  # fmt: skip
_PER_VIEW = ("min_scales", "max_scales", "jitter_p", "grey_p", "blur_p", "solarise_p", "flip_p")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
