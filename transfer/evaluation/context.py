"""One evaluation's data, backbone and settings, and what its results say of them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pretrain.common.cli import save_settings
from pretrain.common.errors import UserError
from pretrain.common.process_group import is_main, world_size
from pretrain.data.datasets import ImageDataset, open_dataset
from transfer.checkpoints.backbone import RAW_PIXELS, Backbone, load_backbone, numbers_text, raw_pixels
from transfer.evaluation import results
from transfer.evaluation.protocol import Protocol
from transfer.evaluation.results import Clock, Result
from transfer.evaluation.transforms import EvalTransform
from transfer.options import EvaluationSettings

logger = logging.getLogger(__name__)

ANY_IMAGES = ("imagefolder", "webdataset")


def backbone_of(settings: EvaluationSettings) -> Backbone:
    """The backbone named by --weights; its metadata have the normalisation that --mean and --std ask for.

    Raises UserError where the file holds none.
    """
    given = {
        name: numbers_text(values)
        for name in ("mean", "std")
        if (values := getattr(settings, name)) is not None
    }
    if settings.weights == RAW_PIXELS:
        backbone = raw_pixels()
    else:
        backbone = load_backbone(settings.weights, arch=settings.arch, branch=settings.branch)
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


def check_pair(train: ImageDataset, test: ImageDataset) -> None:
    """Raises UserError where the two parts do not have the same classes."""
    if train.classes != test.classes:
        lost = sorted(set(train.classes) - set(test.classes))
        more = sorted(set(test.classes) - set(train.classes))
        says = [f"{len(lost)} only in train ({', '.join(lost[:3])})"] if lost else []
        says += [f"{len(more)} only in the test part ({', '.join(more[:3])})"] if more else []
        raise UserError(
            f"{test.root}: its classes are not those of {train.root}: {'; '.join(says) or 'other order'}; "
            "are train and val swapped, or is a class folder missing?"
        )
    for part in (train, test):
        labels = part.labels_N
        if len(labels) and (labels.min() < 0 or labels.max() >= len(part.classes)):
            raise UserError(f"{part.root}: a label lies outside 0..{len(part.classes) - 1}")
    absent = np.setdiff1d(test.labels_N, train.labels_N)
    if absent.size:
        raise UserError(f"{train.root}: no training image of class {train.classes[int(absent[0])]!r}")
    empty = np.setdiff1d(np.arange(len(test.classes)), test.labels_N)
    if empty.size:
        raise UserError(
            f"{test.root}: no image of class {test.classes[int(empty[0])]!r}; figures over the other classes "
            "could not be compared"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation under way: writes the settings at its start and its results at its end."""

    settings: EvaluationSettings
    protocol: Protocol
    backbone: Backbone
    train: ImageDataset
    test: ImageDataset
    transform: EvalTransform
    clock: Clock
    seed: int | None
    label_percent: float = 100
    task: Literal["knn", "linear", "semisup"] = "linear"

    def result(self, metrics: dict[str, float], device: torch.device, **more: Any) -> Result:
        """A Result with everything that does not depend on the evaluator filled in."""
        ranks = {"world_size": world_size()} | ({"gpus": world_size()} if device.type == "cuda" else {})
        more["settings"] = {**more.get("settings", {}), **ranks}
        normalised = {"mean": list(self.transform.mean), "std": list(self.transform.std)}
        said = dict.fromkeys([*self.train.notes, *self.test.notes])
        if self.test.name in ANY_IMAGES:  # the name does not say which
            both = hashlib.sha256(f"{self.train.contents} {self.test.contents}".encode()).hexdigest()
            said[f"{len(self.test.classes)} classes, files {both[:6]}"] = None
        split = f"{self.test.split} ({'; '.join(said)})" if said else self.test.split
        return Result(
            task=self.task, dataset=self.test.name, split=split, n=len(self.test),
            metrics={k: round(v, 4) for k, v in metrics.items()}, protocol=self.protocol.reference,
            weights=self.backbone.weights | normalised, arch=self.backbone.arch, label=self.settings.label,
            seed=self.seed, label_percent=self.label_percent, image_size=self.transform.size,
            **(self.clock.stamp(device) | more),
        )  # fmt: skip

    @property
    def precision(self) -> str:
        """The one that results must have to be this evaluation's; auto: any. Raw pixels know none."""
        return self.settings.precision if self.backbone.model is not None else "auto"

    def finished(self) -> bool:
        """Whether OUTPUT holds this result already; says so. False with --force."""
        if self.settings.force:
            return False
        like = self.result({}, torch.device("cpu"))
        found = results.find(self.settings.output, like, precision=self.precision)
        if found and is_main():
            for r in found:
                print(f"finished already: {spell(r)}")
            print(f"{self.settings.output / results.FILE} holds it; --force evaluates again")
        return bool(found)

    def begin(self) -> None:
        """Write the settings really used. Rank 0 only."""
        if is_main():
            self.settings.output.mkdir(parents=True, exist_ok=True)
            save_settings(self.settings, self.settings.output / "config.yaml")

    def write(self, found: list[Result]) -> None:
        """Append and print the results. Rank 0 only."""
        if is_main():
            seconds = self.clock.stamp(torch.device("cpu"))["seconds"]
            results.append(self.settings.output, *(replace(r, seconds=seconds) for r in found))
            for r in found:
                print(spell(r))


def spell(r: Result) -> str:
    """One line for people."""
    figures = "  ".join(f"{k} {v:.2f}" for k, v in r.metrics.items())
    who = r.label or Path(r.weights["path"]).name
    share = "" if r.label_percent == 100 else f" with {r.label_percent:g} % of the labels"
    name = f"{r.protocol['name']}@{r.protocol['version']}"
    at = "last epoch" if r.epoch is None else f"epoch {r.epoch}"
    which = {
        "last": "the last",
        "best": "best on the images reported",
        "held-out": "chosen on held-out images",
    }
    chosen = "" if r.epoch is None and r.selection == "last" else f" ({at}, {which[r.selection]})"
    return f"{who}: {name} on {r.dataset}{share}{chosen}: {figures}"
