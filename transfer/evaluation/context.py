"""One evaluation's data, backbone and settings, and what its results say of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pretrain.common.cli import save_settings
from pretrain.common.errors import UserError
from pretrain.common.output_folder import output_folder, settings_in
from pretrain.common.process_group import barrier, is_main, process_group, world_size
from pretrain.data.datasets import ImageDataset, open_dataset, require_known
from transfer.checkpoints.backbone import Backbone, load_backbone, numbers_text, raw_pixels
from transfer.checkpoints.sanity import NEVER_TRAINED, never_trained
from transfer.evaluation import results
from transfer.evaluation.features import Extractor, Features, extract_all, make_extractor
from transfer.evaluation.pooled_features import LAST
from transfer.evaluation.protocol import Protocol
from transfer.evaluation.provenance import weights_name
from transfer.evaluation.results import Clock, Result
from transfer.evaluation.split_checks import check_pair, doubts_about
from transfer.evaluation.tokens import Positions, at_size, needs_other_positions
from transfer.evaluation.transforms import EvalTransform, ImageValues, eval_transform
from transfer.network_cost import network_cost
from transfer.options.commands import SpectrumSettings
from transfer.options.evaluation import EvaluationSettings, KnnSettings, LinearSettings, SemisupSettings
from transfer.options.weights import RAW_PIXELS, WeightsOptions

logger = logging.getLogger(__name__)

ANY_IMAGES = ("imagefolder", "webdataset")
WRITES = (
    "config.yaml", results.FILE, "progress.json", "linear.pt", "svm-parts", "checkpoint.pt", "epochs.json",
    "spectra.json", "pictures", "wandb", "wandb_id",
)  # fmt: skip


def output_of(settings: EvaluationSettings, task: str) -> AbstractContextManager[Path]:
    """The output folder, see `output_folder`; evaluators may share one."""
    return output_folder(settings.output, f"transfer {task}", writes=WRITES, earlier=_is_evaluation)


def _is_evaluation(folder: Path) -> bool:
    """Whether an evaluator wrote a folder, by its settings or, without any, its results."""
    if (folder / "config.yaml").exists():
        return any(
            settings_in(s)(folder) for s in (KnnSettings, LinearSettings, SemisupSettings, SpectrumSettings)
        )
    try:
        return bool(results.read(folder))
    except ValueError:
        return False


def backbone_of(settings: EvaluationSettings, backbone: Backbone | None = None) -> Backbone:
    """The backbone named by --weights, or the one given, with the normalisation that --mean and --std say.

    Raises UserError where the file holds none.
    """
    given = {
        name: numbers_text(values)
        for name in ("mean", "std")
        if (values := getattr(settings, name)) is not None
    }
    if (backbone or settings.weights == RAW_PIXELS) and settings.reading() != WeightsOptions():
        raise UserError(
            f"{' '.join(settings.words)}: how to read a checkpoint file, and there is none to read"
        )
    if backbone is None and settings.weights == RAW_PIXELS:
        backbone = raw_pixels()
    elif backbone is None:
        require_known(settings.dataset)  # before the network is built
        backbone = load_backbone(settings.weights, settings)
        if never_trained(backbone) and not settings.random_init:
            raise UserError(
                f"{settings.weights}: {NEVER_TRAINED}; give the trained file, or evaluate it as the random "
                "network that it is with --random-init true"
            )
    for note in backbone.notes:
        logger.info("%s", note)
    return replace(backbone, metadata=backbone.metadata | given)


def open_pair(settings: EvaluationSettings) -> tuple[ImageDataset, ImageDataset]:
    """Training and test part, checked against each other. Raises UserError."""
    folder = settings.data_dir
    if settings.stage_to is not None:
        from transfer.evaluation.local_copy import stage

        folder = stage(folder, settings.stage_to)
    train = open_dataset(settings.dataset, folder, "train")
    test = open_dataset(settings.dataset, folder, "test")
    check_pair(train, test)
    return train, test


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation under way: writes the settings at its start and its results at its end."""

    task: Literal["knn", "linear", "semisup", "spectrum"]
    settings: EvaluationSettings
    protocol: Protocol
    values: ImageValues
    backbone: Backbone
    train: ImageDataset
    test: ImageDataset
    transform: EvalTransform
    clock: Clock
    seed: int | None
    label_percent: float = 100
    precision: str
    """Of the backbone; auto: not settled yet, or any where results are looked for."""
    warnings: tuple[str, ...] = ()
    """Result.warnings: what is doubtful about the two parts."""
    more_conditions: Mapping[str, Any] = field(default_factory=dict)
    """What only this task's numbers hang on, see Result.evaluated_under."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """How many images of each part could not be read and are left out."""

    def conditions(self) -> dict[str, Any]:
        """Result.evaluated_under."""
        look = self.transform
        found = {
            "image_size": look.size, "resize": look.resize,
            "fit": look.fit, "interpolation": look.interpolation,
            "mean": list(look.mean), "std": list(look.std), "precision": self.precision,
            "n": len(self.test) - self.unreadable.get("test", 0),
            "n_train": len(self.train) - self.unreadable.get("train", 0),
        }  # fmt: skip
        if needs_other_positions(self.backbone.model, look.size):
            found["positions"] = self.positions
        if self.test.name in ANY_IMAGES or self.train.notes or self.test.notes:
            found["images"] = contents_of(self.train, self.test)  # the name does not say which
        return found | dict(self.more_conditions)

    @property
    def positions(self) -> Positions:
        """How a ViT's positions are resampled where its images have another size than it was trained on."""
        return self.values.positions or self.backbone.weights.get("positions", "bicubic antialias")

    def deviations(self) -> list[str]:
        """Result.deviations."""
        values, look, native = self.values, self.transform, self.train.native_size
        found = []
        if values.precision not in ("auto", self.precision) and self.precision != "auto":
            found.append(f"precision {self.precision}; the protocol's is {values.precision}")
        if native is None and look.size != values.crop:
            found.append(f"images of {look.size} px; the protocol's are of {values.crop} px")
        elif isinstance(values.image_size, int) and look.size != values.image_size:
            found.append(f"images of {look.size} px; the protocol's are of {values.image_size} px")
        elif native is not None and values.image_size is None and self.protocol.has_authors:
            found.append(
                f"small images whole, at {look.size} px; the protocol resizes to {values.resize} px and "
                f"crops {values.crop} px"
            )
        if values.mean is not None and (look.mean, look.std) != (values.mean, values.std):
            found.append("another mean and standard deviation of images than the protocol's")
        return found

    def result(self, metrics: dict[str, float], device: torch.device, **more: Any) -> Result:
        """A Result with everything that does not depend on the evaluator filled in."""
        ranks = {"world_size": world_size()} | ({"gpus": world_size()} if device.type == "cuda" else {})
        left_out = {"unreadable": dict(self.unreadable)} if self.unreadable else {}
        own = {"precision": self.precision, **ranks, **left_out}
        if self.test.name in ANY_IMAGES:
            own["folder"] = Path(self.settings.data_dir).resolve().name
        more["settings"] = more.get("settings", {}) | own
        normalised = {"mean": list(self.transform.mean), "std": list(self.transform.std)}
        said = dict.fromkeys([*self.train.notes, *self.test.notes])
        if self.test.name in ANY_IMAGES:
            said[f"{len(self.test.classes)} classes, files {contents_of(self.train, self.test)[:6]}"] = None
        split = f"{self.test.split} ({'; '.join(said)})" if said else self.test.split
        return Result(
            task=self.task, dataset=self.test.name, split=split,
            n=len(self.test) - self.unreadable.get("test", 0),
            metrics={k: round(v, 4) for k, v in metrics.items()}, protocol=self.protocol.reference,
            weights=self.backbone.weights | normalised, arch=self.backbone.arch, label=self.settings.label,
            seed=self.seed, label_percent=self.label_percent, image_size=self.transform.size,
            evaluated_under=self.conditions(), deviations=self.deviations(),
            **(self.clock.stamp(device) | more | {"warnings": [*self.warnings, *more.get("warnings", ())]}),
        )  # fmt: skip

    def found(self) -> list[Result]:
        """What OUTPUT holds of this evaluation already, said to the user; nothing with --force."""
        if self.settings.force:
            return []
        like = self.result({}, torch.device("cpu"))
        return results.find(self.settings.output, like, most_unreadable=self.settings.max_broken_images)

    def tell_finished(self, found: list[Result]) -> None:
        """Say that nothing is left to do. Rank 0 only."""
        if is_main():
            print("\n".join(f"finished already: {spell(r)}" for r in found))
            print(f"{self.settings.output / results.FILE} holds it; --force evaluates again")

    def begin(self) -> None:
        """Write the settings really used, and say how they differ from the protocol. Rank 0 only."""
        if is_main():
            self.settings.output.mkdir(parents=True, exist_ok=True)
            save_settings(self.settings, self.settings.output / "config.yaml")
            for deviation in self.deviations():
                logger.warning("%s: %s", self.protocol, deviation)
            for warning in self.warnings:
                logger.warning("%s", warning)

    def write(self, found: list[Result]) -> list[Result]:
        """The results with the time until now and the network's size; rank 0 appends and prints them."""
        seconds = self.clock.stamp(torch.device("cpu"))["seconds"]
        cost = self._network_cost() if is_main() and found else {}
        found = [replace(r, seconds=seconds, settings=r.settings | cost) for r in found]
        if is_main():
            results.append(self.settings.output, *found)
            for r in found:
                print(spell(r))
        return found

    def _network_cost(self) -> dict[str, int]:
        model, size, positions = self.backbone.model, self.transform.size, self.positions
        if model is None:
            return {}
        return network_cost(
            model,
            size,
            key=(self.backbone.key, positions),
            fitted=lambda copy: at_size(copy, size, positions),
        )

    def features(
        self, extractor: Extractor, *parts: tuple[ImageDataset, np.ndarray | None]
    ) -> list[Features]:
        """Features of each of `parts`, a data set and which of its images (None: all), as `extract_all`.

        What could not be read is noted for the results. All ranks must call.
        """
        settings = self.settings
        found = extract_all(
            extractor, self.backbone, parts, cache=settings.cache, batch_size=settings.batch_size,
            workers=settings.workers, progress=settings.output / "progress.json",
            max_broken=settings.max_broken_images,
        )  # fmt: skip
        for features in found:
            if features.broken:
                self.unreadable[features.split] = len(features.broken)
        return found


def contents_of(train: ImageDataset, test: ImageDataset) -> str:
    """A hash of which images these are, wherever they lie."""
    return hashlib.sha256(f"{train.contents} {test.contents}".encode()).hexdigest()


def set_up(
    settings: EvaluationSettings,
    protocol: Protocol,
    values: ImageValues,
    clock: Clock,
    *,
    task: Literal["knn", "linear", "semisup"],
    seed: int | None,
    label_percent: float = 100,
    parts: tuple[ImageDataset, ImageDataset] | None = None,
    backbone: Backbone | None = None,
) -> Evaluation:
    """Open the data and the weights, unless `parts` or `backbone` is given, and settle the transform.

    Raises UserError for what cannot be evaluated.
    """
    backbone = backbone_of(settings, backbone)  # before the data, whose listing may take minutes
    train, test = parts or open_pair(settings)
    return settle(
        settings, values, backbone, train, test, protocol=protocol, clock=clock, task=task, seed=seed,
        label_percent=label_percent, warnings=tuple(doubts_about(train, test)),
    )  # fmt: skip


def settle(
    settings: EvaluationSettings,
    values: ImageValues,
    backbone: Backbone,
    train: ImageDataset,
    test: ImageDataset,
    **more: Any,
) -> Evaluation:
    """The evaluation, its transform and precision by the settings, the protocol's values and the weights."""
    transform = eval_transform(
        values, native_size=train.native_size, image_size=settings.image_size, metadata=backbone.metadata,
        given=[name for name in ("mean", "std") if getattr(settings, name) is not None],
    )  # fmt: skip
    asked = values.precision if settings.precision == "auto" else settings.precision
    return Evaluation(
        settings=settings, values=values, backbone=backbone, train=train, test=test, transform=transform,
        precision="float32" if backbone.model is None else asked, **more,
    )  # fmt: skip


def judge_frozen(
    evaluation: Evaluation,
    judge: Callable[[Evaluation, Extractor], list[Result]],
    stages: tuple[str, ...] = LAST,
) -> list[Result]:
    """The results of `judge`, which gets a frozen backbone's extractor, written; or those that OUTPUT holds.

    Raises RuntimeError where the backbone has changed.
    """
    found = evaluation.found()
    if found:
        evaluation.tell_finished(found)
        return found
    # another job may be extracting the same features, and ranks wait while rank 0 fits a regression
    with process_group(timeout_min=24 * 60) as device:
        extractor = make_extractor(
            evaluation.backbone, evaluation.train, evaluation.transform, device,
            evaluation.precision, stages, positions=evaluation.positions,  # type: ignore[arg-type]
        )  # fmt: skip
        before = extractor.digest()
        settled = replace(evaluation, precision=extractor.precision)
        settled.begin()
        found = judge(settled, extractor)
        if extractor.digest() != before:
            raise RuntimeError("the frozen backbone changed while it was evaluated: no result is written")
        found = settled.write(found)
        barrier()
    return found


def spell(r: Result) -> str:
    """One line for people."""
    figures = "  ".join(f"{k} {v:.2f}" if abs(v) < 1e5 else f"{k} {v:.2e}" for k, v in r.metrics.items())
    who = r.label or weights_name(str(r.weights["path"]))
    share = "" if r.label_percent == 100 else f" with {r.label_percent:g} % of the labels"
    name = f"{r.protocol['name']}@{r.protocol['version']}"
    at = "last epoch" if r.epoch is None else f"epoch {r.epoch}"
    which = {
        "last": "the last",
        "best": "best on the images reported",
        "held-out": "chosen on held-out images",
    }
    chosen = "" if r.epoch is None and r.selection == "last" else f" ({at}, {which[r.selection]})"
    return f"{who}: {name} on {r.settings.get('folder') or r.dataset}{share}{chosen}: {figures}"
