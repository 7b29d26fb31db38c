"""Linear SVMs on features, one a class, and their mean average precision.

The protocol of VOC07 classification (Goyal et al. 2019, https://arxiv.org/abs/1905.01235; VISSL's svm_utils):
each class's SVM, positives weighted twice, is trained at every cost on L2-normalised features. With all
labels its cost is the best of a cross-validation on the training images. The low-shot form draws k positive
and (C - 1) k negative images a class, several times, and reports, as published, the cost best on the test
images.

N images, D features, C classes, A costs, K numbers of shots, S draws. Targets: 1 present, 0 absent, -1
difficult, which is a negative in training with all labels and left out everywhere else.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.machine import cores_of_rank
from pretrain.common.process_group import barrier, is_main, rank, world_size
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from pretrain.data.datasets import ImageDataset
from pretrain.data.voc07 import NAME, open_voc07
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.context import Evaluation, judge_frozen, open_pair, set_up
from transfer.evaluation.feature_scaling import of_unit_length
from transfer.evaluation.features import Extractor
from transfer.evaluation.protocol import Protocol
from transfer.evaluation.results import Clock, Result
from transfer.options.evaluation import EvaluationSettings, LinearSettings

if TYPE_CHECKING:
    from transfer.evaluators.linear_protocol import LinearProtocol

POSITIVE_WEIGHT = 2
SMALL = 1 << 21  # features x images under which starting processes costs more than it saves
PARTS = "svm-parts"
Part = tuple[ImageDataset, np.ndarray]


def average_precision(targets_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the precision-recall curve made monotonous, VOC's measure since 2010; targets -1 left out.

    AP = mean over the positives of max precision at that or any later rank. Equal scores: in the order given.
    """
    judged = targets_N != -1
    order = np.argsort(-scores_N[judged], kind="stable")
    hit = targets_N[judged][order] == 1
    if not hit.any():
        raise ValueError("no positive image")
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][hit].mean())


def fit_class(
    train_ND: np.ndarray,
    targets_N: np.ndarray,
    test_ND: np.ndarray,
    test_targets_N: np.ndarray,
    *,
    costs: Sequence[float],
    folds: int,
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """One class with all labels: the cost of the best cross-validated AP and the AP (0-1) at it on test."""
    from sklearn.model_selection import cross_val_score

    labels = np.where(targets_N == 1, 1, -1)
    options: dict[str, Any] = {"cv": folds, "scoring": "average_precision"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 2000 iterations not sufficing: so it is published
        scores = [
            float(cross_val_score(_svm(c, iterations, seed), train_ND, labels, **options).mean())
            for c in costs
        ]
        best = int(np.argmax(scores))
        svm = _svm(costs[best], iterations, seed).fit(train_ND, labels)
    ap = average_precision(test_targets_N, svm.decision_function(test_ND))
    return {"ap": ap, "cost": costs[best], "cross_validated_ap": scores[best]}


def fit_class_low_shot(
    train_ND: np.ndarray,
    targets_N: np.ndarray,
    test_ND: np.ndarray,
    test_targets_N: np.ndarray,
    *,
    classes: int,
    label: int,
    costs: Sequence[float],
    shots: Sequence[int],
    samples: int,
    iterations: int,
    seed: int,
) -> dict[str, Any]:
    """One class from k shots: AP (0-1) on test as K x S x A nested lists."""
    found = np.zeros((len(shots), samples, len(costs)))
    positive, negative = np.flatnonzero(targets_N == 1), np.flatnonzero(targets_N == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for a, k in enumerate(shots):
            for s in range(samples):
                rng = np.random.default_rng([seed, s, k, label])
                yes = rng.choice(positive, k, replace=False)
                no = rng.choice(negative, (classes - 1) * k, replace=False)
                chosen = np.concatenate([yes, no])
                labels = np.where(targets_N[chosen] == 1, 1, -1)
                for c, cost in enumerate(costs):
                    svm = _svm(cost, iterations, seed).fit(train_ND[chosen], labels)
                    found[a, s, c] = average_precision(test_targets_N, svm.decision_function(test_ND))
    return {"ap": found.tolist()}


def _svm(cost: float, iterations: int, seed: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost, class_weight={1: POSITIVE_WEIGHT, -1: 1}, penalty="l2", loss="squared_hinge", dual=True,
        tol=1e-4, max_iter=iterations, random_state=seed,
    )  # fmt: skip


def unit_length(features_ND: np.ndarray) -> np.ndarray:
    """A copy with each row divided by its length (plus 1e-5), in float64: both as VISSL."""
    return of_unit_length(features_ND, plus=1e-5)


def evaluate_voc(
    settings: LinearSettings,
    protocol: Protocol,
    values: LinearProtocol,
    clock: Clock,
    backbone: Backbone | None = None,
) -> list[Result]:
    """`python -m transfer linear` with a protocol of method svm, on voc07 or on any labelled data set."""
    (train, train_targets), (test, test_targets) = _open(settings)
    check_shots(train, train_targets, test_targets, values)
    evaluation = set_up(
        settings,
        protocol,
        values,
        clock,
        task="linear",
        seed=settings.seed,
        parts=(train, test),
        backbone=backbone,
    )

    def judge(settled: Evaluation, extractor: Extractor) -> list[Result]:
        bank, tested = settled.features(extractor, (train, None), (test, None))
        train_ND, test_ND = unit_length(bank.x_ND), unit_length(tested.x_ND)
        targets_NC, test_targets_NC = train_targets[bank.positions_N], test_targets[tested.positions_N]
        digest = hashlib.sha256(f"{settled.backbone.key} {protocol.hash} {settings.seed}".encode())
        digest.update(f"{settled.conditions()} {train.fingerprint} {test.fingerprint}".encode())
        for targets in (targets_NC, test_targets_NC):
            digest.update(np.ascontiguousarray(targets).tobytes())
        folder = settings.output / PARTS / digest.hexdigest()[:16]
        _fit_all(folder, train_ND, targets_NC, test_ND, test_targets_NC, values, settings)
        barrier()
        if not is_main():
            return []
        found = [json.loads((folder / f"{c}.json").read_text()) for c in range(len(train.classes))]
        return [_result(settled, values, found, train.classes, extractor.device)]

    if evaluation.backbone.model is None and values.pooling != "average":
        raise UserError(f"{protocol} reads layers of a backbone; evaluate raw-pixels with svm_pooled@1")
    return judge_frozen(evaluation, judge, values.stages)


def _open(settings: EvaluationSettings) -> tuple[Part, Part]:
    """Training and test part with their targets: voc07's own, else one class an image."""
    if settings.dataset == NAME:
        folder: Path = settings.data_dir
        if settings.stage_to is not None:
            from transfer.evaluation.local_copy import stage

            folder = stage(folder, settings.stage_to)
        return open_voc07(folder, "train"), open_voc07(folder, "test")
    train, test = open_pair(settings)
    one_hot = np.eye(len(train.classes), dtype=np.int64)
    return (train, one_hot[train.labels_N]), (test, one_hot[test.labels_N])


def check_shots(
    train: ImageDataset, targets_NC: np.ndarray, test_targets_MC: np.ndarray, values: LinearProtocol
) -> None:
    """Raises UserError where a class has too few images for the folds, the shots or a figure."""
    if not values.costs:
        raise UserError("a protocol of method svm needs costs")
    most = max(values.shots, default=0)
    for c, name in enumerate(train.classes):
        positive, negative = int((targets_NC[:, c] == 1).sum()), int((targets_NC[:, c] == 0).sum())
        if positive < (most or values.folds):
            what = f"{most} shots" if most else f"{values.folds} folds"
            raise UserError(f"{train.root}: {positive} images of class {name!r}; {what} need as many")
        if negative < max(values.folds, (len(train.classes) - 1) * most):
            raise UserError(f"{train.root}: {negative} images without class {name!r} are too few")
        if not (test_targets_MC[:, c] == 1).any():
            raise UserError(f"the test part has no image of class {name!r}")


def _fit_all(
    folder: Path,
    train_ND: np.ndarray,
    train_targets: np.ndarray,
    test_ND: np.ndarray,
    test_targets: np.ndarray,
    values: LinearProtocol,
    settings: LinearSettings,
) -> None:
    """Fit this rank's classes that have no file in `folder` yet; one file a class."""
    from joblib import Parallel, delayed

    classes = train_targets.shape[1]
    mine = [c for c in range(classes) if c % world_size() == rank() and not (folder / f"{c}.json").exists()]
    jobs = 1 if train_ND.size < SMALL else max(1, min(cores_of_rank(), len(mine)))
    common = {"costs": values.costs, "iterations": values.iterations, "seed": settings.seed}

    def work(c: int) -> Any:
        arrays = (train_ND, train_targets[:, c], test_ND, test_targets[:, c])
        if values.shots:
            more = {"classes": classes, "label": c, "shots": values.shots, "samples": values.samples}
            return delayed(fit_class_low_shot)(*arrays, **common, **more)
        return delayed(fit_class)(*arrays, folds=values.folds, **common)

    file = settings.output / "progress.json" if is_main() else None
    progress = Progress(len(mine), label="SVMs of classes", unit="SVM", file=file)
    with StopSignals() as stop, progress as bar, Parallel(n_jobs=jobs) as pool:
        for start in range(0, len(mine), jobs):
            some = mine[start : start + jobs]
            for c, found in zip(some, pool(work(c) for c in some)):
                write_json(folder / f"{c}.json", found)
                bar.update(1)
            if stop.requested:
                stop.hand_over()


def _result(
    evaluation: Evaluation,
    values: LinearProtocol,
    found: list[dict[str, Any]],
    classes: list[str],
    device: torch.device,
) -> Result:
    """mAP in percent; low-shot: for each k the mean over draws at the cost that is best on test."""
    extra: dict[str, Any] = {"method": "svm", "augmentation": False}
    if not values.shots:
        extra |= {
            "costs": {name: f["cost"] for name, f in zip(classes, found)},
            "AP": {name: round(100 * f["ap"], 2) for name, f in zip(classes, found)},
            "chosen_on": f"{values.folds}-fold cross-validation of the training images",
        }
        metrics = {"mAP": 100 * float(np.mean([f["ap"] for f in found]))}
        return evaluation.result(metrics, device, selection="held-out", settings=extra)
    map_KSA = 100 * np.mean([f["ap"] for f in found], axis=0)
    best_K = map_KSA.mean(1).argmax(1)
    draws = {k: map_KSA[a, :, best_K[a]] for a, k in enumerate(values.shots)}
    extra |= {
        "costs": {f"k{k}": values.costs[best_K[a]] for a, k in enumerate(values.shots)},
        "std": {f"k{k}": round(float(maps.std()), 4) for k, maps in draws.items()},
        "draws": values.samples, "chosen_on": "reported",
    }  # fmt: skip
    metrics = {f"mAP_k{k}": float(maps.mean()) for k, maps in draws.items()}
    return evaluation.result(metrics, device, selection="best", settings=extra)
