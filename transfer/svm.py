"""VOC 2007 images enter; one linear SVM a class on frozen features, and their mean average precision, leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.cli import Progress, UserError
from pretrain.data import ImageDataset
from pretrain.distributed import barrier, is_main, process_group
from transfer.features import extract, make_extractor
from transfer.protocol import Protocol
from transfer.results import Clock
from transfer.subject import Evaluation, load_subject
from transfer.transforms import eval_transform

if TYPE_CHECKING:
    from transfer.linear import LinearProtocol, LinearSettings

POSITIVE_WEIGHT = 2.0  # VISSL's class_weight {1: 2, -1: 1}


def average_precision(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the precision-recall curve, precision made falling first, as in VOC since 2010 and VISSL.

    `truth` is 1 or 0; in [0, 1]. Raises ValueError without a positive.
    """
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(truth[order])
    if not len(hits) or hits[-1] == 0:
        raise ValueError("no positive image")
    recall = np.concatenate([[0.0], hits / hits[-1]])
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))


def fit(x_ND: np.ndarray, positive_N: np.ndarray, *, cost: float, iterations: int, seed: int):
    """scikit-learn's LinearSVC with VISSL's settings: L2 penalty, squared hinge, dual."""
    from sklearn.svm import LinearSVC

    machine = LinearSVC(
        C=cost, class_weight={1: POSITIVE_WEIGHT, -1: 1.0}, intercept_scaling=1.0, penalty="l2",
        loss="squared_hinge", tol=1e-4, dual=True, max_iter=iterations, random_state=seed,
    )  # fmt: skip
    return machine.fit(x_ND, np.where(positive_N, 1, -1))


def choose_cost(
    x_ND: np.ndarray,
    positive_N: np.ndarray,
    *,
    costs: Sequence[float],
    folds: int,
    iterations: int,
    seed: int,
) -> float:
    """The cost of the best mean average precision over stratified folds; the smaller of equals."""
    from sklearn.model_selection import StratifiedKFold

    split = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x_ND, positive_N))
    scores = []
    for cost in costs:
        found = []
        for inside, outside in split:
            machine = fit(x_ND[inside], positive_N[inside], cost=cost, iterations=iterations, seed=seed)
            found.append(average_precision(positive_N[outside], machine.decision_function(x_ND[outside])))
        scores.append(np.mean(found))
    return costs[int(np.argmax(scores))]


def open_voc(data_dir: Path, split: str) -> tuple[ImageDataset, np.ndarray]:
    """The images of VOC 2007's `split` (trainval or test) and their labels N x 20: 1 there, 0 not, -1 hard to
    say. `data_dir` is VOC2007, or holds it, or holds VOCdevkit."""
    candidates = (data_dir, data_dir / "VOC2007", data_dir / "VOCdevkit" / "VOC2007")
    root = next((c for c in candidates if (c / "ImageSets" / "Main").is_dir()), None)
    if root is None:
        raise UserError(f"{data_dir}: holds no VOC2007/ImageSets/Main; wanted PASCAL VOC 2007 as distributed")
    lists = sorted((root / "ImageSets" / "Main").glob(f"*_{split}.txt"))
    if not lists:
        raise UserError(
            f"{root / 'ImageSets' / 'Main'}: no <class>_{split}.txt; VOC 2007's {split} part is missing"
        )
    columns, names = [], []
    for path in lists:
        pairs = [line.split() for line in path.read_text().splitlines() if line.strip()]
        names.append([n for n, _ in pairs])
        value = np.array([int(v) for _, v in pairs])
        columns.append(np.select([value == 1, value == 0], [1, -1], 0))
    if any(n != names[0] for n in names):
        raise UserError(f"{root}: the class lists of {split} do not name the same images")
    data = ImageDataset(
        name="voc2007", split=split, classes=[p.name.rpartition("_")[0] for p in lists],
        labels_N=np.zeros(len(names[0]), np.int64), native_size=None, root=root / "JPEGImages",
        files=[f"{n}.jpg" for n in names[0]],
    )  # fmt: skip
    return data, np.stack(columns, 1)


def evaluate_voc(
    settings: LinearSettings, protocol: Protocol, values: LinearProtocol, clock: Clock
) -> int | None:
    """Train on trainval, judge on test: mAP over the classes, images hard to say left out of a class's AP."""
    if settings.dataset != "voc2007":
        raise UserError(f"{protocol} is for --dataset voc2007, got {settings.dataset}")
    train, train_labels = open_voc(settings.data_dir, "trainval")
    test, test_labels = open_voc(settings.data_dir, "test")
    if train.classes != test.classes:
        raise UserError(f"{train.root}: trainval and test do not have the same classes")
    for part, labels in ((train, train_labels), (test, test_labels)):
        lost = [c for c, column in zip(part.classes, labels.T) if not (column == 1).any()]
        if lost:
            raise UserError(f"{part.root}: no image of class {lost[0]} in {part.split}")
    subject = load_subject(settings)
    transform = eval_transform(
        native_size=None, image_size=settings.image_size, metadata=subject.metadata, resize=values.resize,
        crop=values.crop, interpolation=values.interpolation, std=values.std,
    )  # fmt: skip
    evaluation = Evaluation(
        settings=settings, protocol=protocol, subject=subject, train=train, test=test, transform=transform,
        clock=clock, seed=settings.seed,
    )  # fmt: skip
    if evaluation.finished():
        return 0
    evaluation.begin()
    with process_group() as device:
        extractor = make_extractor(subject, train, transform, device, settings.precision)
        features = [
            np.array(
                extract(
                    extractor, subject, part, cache=settings.cache, batch_size=settings.batch_size,
                    workers=settings.workers, progress=settings.output / "progress.json",
                )
            )
            for part in (train, test)
        ]  # fmt: skip
        if is_main():
            train_ND, test_ND = (
                x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in features
            )
            file = settings.output / "progress.json"
            judge = low_shot if values.shots else full
            metrics, extra = judge(train_ND, train_labels, test_ND, test_labels, values, settings.seed, file)
            extra |= {"precision": extractor.precision, "augmentation": False}
            selection = "best" if values.shots else "held-out"
            evaluation.write([evaluation.result(metrics, device, selection=selection, settings=extra)])
        barrier()
    return 0


def full(
    train_ND: np.ndarray, train_labels: np.ndarray, test_ND: np.ndarray, test_labels: np.ndarray,
    values: LinearProtocol, seed: int, file: Path,
) -> tuple[dict[str, float], dict]:  # fmt: skip
    """mAP in percent with each class's C chosen by cross validation on the training images."""
    found, chosen = [], []
    with Progress(train_labels.shape[1], label="SVMs", unit="class", file=file) as bar:
        for truth, target in zip(train_labels.T, test_labels.T):
            positive = truth == 1
            cost = choose_cost(
                train_ND,
                positive,
                costs=values.costs,
                folds=values.folds,
                iterations=values.iterations,
                seed=seed,
            )
            machine = fit(train_ND, positive, cost=cost, iterations=values.iterations, seed=seed)
            known = target >= 0
            found.append(average_precision(target[known], machine.decision_function(test_ND[known])))
            chosen.append(cost)
            bar.update(1, AP=100 * found[-1])
    return {"mAP": 100 * float(np.mean(found))}, {"C": chosen}


def low_shot(
    train_ND: np.ndarray, train_labels: np.ndarray, test_ND: np.ndarray, test_labels: np.ndarray,
    values: LinearProtocol, seed: int, file: Path,
) -> tuple[dict[str, float], dict]:  # fmt: skip
    """mAP in percent for each number of positives a class, mean over draws, at the C best on the test images."""
    metrics: dict[str, float] = {}
    spread: dict[str, float] = {}
    with Progress(len(values.shots) * values.samples, label="low-shot SVMs", unit="draw", file=file) as bar:
        for k in values.shots:
            maps = np.zeros((values.samples, len(values.costs)))
            for draw in range(values.samples):
                rng = np.random.default_rng([seed, k, draw])
                for truth, target in zip(train_labels.T, test_labels.T):
                    yes, no = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
                    picks = np.concatenate([
                        rng.permutation(yes)[:k], rng.permutation(no)[: values.negatives * k],
                    ])  # fmt: skip
                    known = target >= 0
                    for column, cost in enumerate(values.costs):
                        machine = fit(
                            train_ND[picks],
                            truth[picks] == 1,
                            cost=cost,
                            iterations=values.iterations,
                            seed=seed,
                        )
                        score = machine.decision_function(test_ND[known])
                        maps[draw, column] += average_precision(target[known], score) / len(train_labels.T)
                bar.update(1)
            best = int(maps.mean(0).argmax())
            metrics[f"mAP_k{k}"] = 100 * float(maps[:, best].mean())
            spread[f"mAP_k{k}"] = (
                round(100 * float(maps[:, best].std(ddof=1)), 4) if values.samples > 1 else 0.0
            )
    return metrics, {"std_over_draws": spread}
