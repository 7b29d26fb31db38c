"""A frozen backbone enters; the accuracy of linear heads trained on its features leaves.

With `augmentation` each batch of training images is cropped, flipped and passed through the backbone anew,
once for all heads of the grid; without, features are extracted once and kept. Test features are always
extracted once: the backbone does not change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.cli import Progress, RunFailed, UserError
from pretrain.distributed import any_rank, barrier, is_main, process_group, rank, sent, world_size
from pretrain.files import atomic_path
from pretrain.settings import IMAGENET_STD
from pretrain.signals import StopSignals
from pretrain.transfer_sets import metric_of
from transfer.augment import Augmented
from transfer.features import Extractor, extract, image_batches, make_extractor
from transfer.finetune import places
from transfer.heads import HeadGrids, Optimizer, Schedule, figures, rate_factor
from transfer.options import LinearSettings, parse
from transfer.protocol import load_protocol
from transfer.results import Clock, Result
from transfer.scaling import mean_and_std, standardise, to_unit_length
from transfer.stages import LAST, columns, stages_of
from transfer.subject import Evaluation, load_subject, open_pair
from transfer.transforms import eval_transform
from transfer.voc07 import refuse_voc07

logger = logging.getLogger(__name__)

CHECKPOINT = "linear.pt"
LOGITS_BYTES = 1 << 28  # of one block of images when heads are judged


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


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features of one part with their labels, on the device of the heads or memory-mapped."""

    features_ND: Tensor
    labels_N: Tensor


def main(argv: list[str]) -> int | None:
    """`python -m transfer linear`."""
    settings: LinearSettings = parse("linear", argv)
    protocol = load_protocol(settings.protocol, "linear")
    values = protocol.settings(LinearProtocol)
    clock = Clock()
    if values.method == "svm":
        from transfer.svm import evaluate_voc

        return evaluate_voc(settings, protocol, values, clock)
    refuse_voc07(settings.dataset)
    train, test = open_pair(settings)
    if values.method == "heads" and len(train) * (1 - values.held_out_percent / 100) < 1:
        raise UserError(f"{train.root}: no training image is left beside the held-out part")
    if values.held_out_percent and not len(held_out_split(train.labels_N, values.held_out_percent, 0)[1]):
        raise UserError(
            f"{train.root}: one training image a class, and {protocol} chooses on "
            f"{values.held_out_percent:g} % of each class's held out; wanted two or more of at least one "
            "class, or a protocol of one head, which holds out none"
        )
    subject = load_subject(settings)
    if subject.model is None and values.augmentation:
        raise UserError(f"{protocol} augments images for a backbone; judge raw-pixels with cached_linear@1")
    if subject.model is None and values.features != LAST:
        raise UserError(f"{protocol} looks into a backbone; judge raw-pixels with cached_linear@1")
    transform = eval_transform(
        native_size=train.native_size, image_size=settings.image_size, metadata=subject.metadata,
        resize=values.resize, crop=values.crop, interpolation=values.interpolation, std=values.std,
    )  # fmt: skip
    evaluation = Evaluation(
        settings=settings, protocol=protocol, subject=subject, train=train, test=test, transform=transform,
        clock=clock, seed=settings.seed,
    )  # fmt: skip
    if evaluation.finished():
        return 0
    evaluation.begin()
    # logreg's ranks wait while rank 0 fits, and all while another job extracts the same features
    with process_group(timeout_min=24 * 60) as device:
        extractor = make_extractor(
            subject, train, transform, device, settings.precision, stages_of(values.features)
        )
        before = extractor.digest()
        if values.method == "logreg":
            from transfer.logreg import run_logreg

            found = run_logreg(evaluation, extractor, values, device)
        else:
            found = run_heads(evaluation, extractor, values, device)
        if extractor.digest() != before:
            raise RuntimeError("the frozen backbone changed while heads were trained: no result is written")
        evaluation.write(found)
        barrier()
        if is_main():
            (settings.output / CHECKPOINT).unlink(missing_ok=True)
    return 0


def held_out_split(labels_N: np.ndarray, percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on, and `percent` of each class (rounded, never all of it) kept aside."""
    if percent == 0:
        return np.arange(len(labels_N)), np.arange(0)
    rng = np.random.default_rng([seed, 77])
    aside = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        count = min(max(1, round(len(members) * percent / 100)), len(members) - 1)
        aside.append(rng.permutation(members)[:count])
    kept = np.sort(np.concatenate(aside))
    return np.setdiff1d(np.arange(len(labels_N)), kept), kept


def cached_parts(
    evaluation: Evaluation, extractor: Extractor, values: LinearProtocol, device: torch.device
) -> tuple[Labelled | None, Labelled | None, Labelled, np.ndarray]:
    """Training, held-out and test features, scaled, and the positions trained on.

    With augmentation there are no training features, and of the training images only the held-out ones are
    extracted.
    """
    settings, train, test = evaluation.settings, evaluation.train, evaluation.test
    fit, aside = held_out_split(train.labels_N, values.held_out_percent, evaluation.seed or 0)

    def features(part: Any, indices: np.ndarray | None) -> np.ndarray:
        return extract(
            extractor, evaluation.subject, part, cache=settings.cache, indices=indices,
            batch_size=settings.batch_size, workers=settings.workers,
            progress=settings.output / "progress.json",
        )  # fmt: skip

    def labelled(x_ND: np.ndarray, labels_N: np.ndarray) -> Labelled:
        return Labelled(
            features_ND=torch.from_numpy(x_ND).to(device), labels_N=torch.from_numpy(labels_N).to(device)
        )

    test_ND = np.array(features(test, None))
    if values.augmentation:
        held = labelled(np.array(features(train, aside)), train.labels_N[aside]) if len(aside) else None
        return None, held, labelled(test_ND, test.labels_N), fit
    all_ND = features(train, None)  # all of them: the same file that k-NN uses
    fit_ND, aside_ND = all_ND[fit], all_ND[aside]  # copies, which the cached file is not
    if values.scaling == "standardise":
        mean_D, std_D = mean_and_std(fit_ND)
        for x_ND in (fit_ND, aside_ND, test_ND):
            standardise(x_ND, mean_D, std_D)
    elif values.scaling == "l2":
        for x_ND in (fit_ND, aside_ND, test_ND):
            to_unit_length(x_ND, least=1e-12)
    held = labelled(aside_ND, train.labels_N[aside]) if len(aside) else None
    return labelled(fit_ND, train.labels_N[fit]), held, labelled(test_ND, test.labels_N), fit


def epoch_batches(n: int, batch: int, *, steps: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The global batches of one epoch: a permutation of range(n) drawn from (seed, epoch), cut into `steps`
    batches; where more are asked for than one pass gives, further permutations follow."""
    rng = np.random.default_rng([seed, epoch])
    order = np.concatenate([rng.permutation(n) for _ in range(max(1, math.ceil(steps * batch / max(n, 1))))])
    if steps == math.ceil(n / batch):
        order = order[:n]
    return [order[s * batch : (s + 1) * batch] for s in range(steps)]


def run_heads(
    evaluation: Evaluation, extractor: Extractor, values: LinearProtocol, device: torch.device
) -> list[Result]:
    """Train the grid and judge it after each epoch; the results to report. All ranks must call."""
    settings = evaluation.settings
    seed = evaluation.seed or 0
    metric = metric_of(evaluation.test.name)
    train, held, test, fit = cached_parts(evaluation, extractor, values, device)
    classes = len(evaluation.train.classes)
    sets = {name: columns(name, extractor.widths) for name in values.features}
    heads = HeadGrids(
        sets, classes, rates=values.rates, decays=values.weight_decays, optimizer=values.optimizer,
        momentum=values.momentum, init=values.init, seed=seed, device=device,
    )  # fmt: skip
    steps = values.steps_per_epoch or math.ceil(len(fit) / values.batch)
    identity = (
        f"heads/3 {evaluation.subject.key} {evaluation.protocol.hash} {seed} {evaluation.train.fingerprint} "
        f"{evaluation.test.fingerprint} {len(fit)} {evaluation.transform} {extractor.precision}"
    )
    path = settings.output / CHECKPOINT
    done, history = _resume(path, heads, identity)
    diverged: set[int] = set()
    bar = Progress(
        steps * values.epochs, label=f"linear probe, {len(heads)} heads", start=done,
        file=settings.output / "progress.json",
    )  # fmt: skip
    with StopSignals() as stop, bar:
        for epoch in range(done // steps, values.epochs):
            batches = epoch_batches(len(fit), values.batch, steps=steps, seed=seed, epoch=epoch)
            batches = [
                b[rank() :: world_size()] for b in batches[done % steps if epoch == done // steps else 0 :]
            ]
            stream = (
                _augmented(evaluation, extractor, values, fit, batches, epoch, device)
                if train is None
                else _cached(train, batches)
            )
            step = done if epoch == done // steps else epoch * steps
            loss = torch.zeros(len(heads))
            for x_BD, labels_B in stream:
                factor = rate_factor(
                    values.schedule, step=step, steps_per_epoch=steps, epochs=values.epochs,
                    milestones=values.milestones, gamma=values.gamma, final=values.final,
                )  # fmt: skip
                loss = heads.step(x_BD, labels_B, factor=factor)
                step += 1
                bar.update(1)
                if step % 50 == 0 and any_rank(stop.requested, device) and step % steps:
                    _save(path, heads, identity, step, history)
                    _leave(stop)
            history.append(_judge(heads, classes, held, test))
            told = metric if held is None else f"held-out {metric}"
            best = max(history[-1]["held" if held is not None else "test"], key=lambda m: m[metric])
            diverged = _diverged(heads, diverged, evaluation, epoch, step)
            alive = [head for head in range(len(heads)) if head not in diverged]
            bar.update(0, epoch=epoch + 1, loss=float(loss[alive].min()), **{told: best[metric]})
            stopping = any_rank(stop.requested, device) and epoch + 1 < values.epochs
            if train is None or stopping:
                _save(path, heads, identity, step, history)
            if stopping:
                _leave(stop)
    return _report(evaluation, extractor, values, heads, history, device)


def _diverged(heads: HeadGrids, known: set[int], evaluation: Evaluation, epoch: int, step: int) -> set[int]:
    """The heads without finite weights, those that are new told; the others train on as if alone.

    Raises RunFailed where none is left.
    """
    lost = {head for head, finite in enumerate(heads.finite().tolist()) if not finite}
    rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(heads.grid[head][0] for head in sorted(lost)))
    if len(lost) == len(heads):
        raise RunFailed(
            f"the linear probe diverged: by epoch {epoch + 1}, step {step}, no head has a finite loss, at a "
            f"learning rate of {rates}; no result is written. Copy the protocol {evaluation.protocol} into a "
            "file of your own with smaller learning_rates, and give it as --protocol"
        )
    if lost - known and is_main():
        logger.warning(
            "%d of %d heads diverged by epoch %d (learning rates %s); the others are not touched by it",
            len(lost), len(heads), epoch + 1, rates,
        )  # fmt: skip
    return lost


def _leave(stop: StopSignals) -> None:
    """Hand over on the ranks that got the signal; the others stop with them."""
    if stop.received is None:
        stop.received = int(StopSignals.SIGNALS[0])
    stop.hand_over()


def _cached(train: Labelled, batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
    for b in batches:
        index = sent(b, train.features_ND.device)
        yield train.features_ND[index], train.labels_N[index]


def _augmented(
    evaluation: Evaluation,
    extractor: Extractor,
    values: LinearProtocol,
    fit: np.ndarray,
    batches: list[np.ndarray],
    epoch: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    settings, train = evaluation.settings, evaluation.train
    images = Augmented(
        train, size=evaluation.transform.size, seed=evaluation.seed or 0, epoch=epoch,
        interpolation=values.train_interpolation,
    )  # fmt: skip
    shares = [fit[b] for b in batches]
    stream = image_batches(images, [s for s in shares if len(s)], evaluation.transform, settings.workers)
    for share in shares:
        labels_B = sent(train.labels_N[share], device)
        if len(share):
            yield extractor(next(stream)[0]), labels_B
        else:  # the last batch had fewer images than there are ranks
            yield torch.zeros(0, extractor.width, device=device), labels_B


def _judge(
    heads: HeadGrids, classes: int, held: Labelled | None, test: Labelled
) -> dict[str, list[dict[str, float]]]:
    """Accuracies of every head on the held-out part and on the test images."""
    rows = max(1, LOGITS_BYTES // (4 * classes * len(heads)))
    out = {}
    for name, part in (("held", held), ("test", test)):
        if part is None:
            continue
        place_HN = part.labels_N.new_empty(len(heads), len(part.labels_N))
        for start in range(0, len(part.labels_N), rows):
            block = slice(start, start + rows)
            logits = heads.logits(part.features_ND[block])
            logits = torch.where(torch.isfinite(logits), logits, torch.full_like(logits, -math.inf))
            for head, own in enumerate(logits.unbind(1)):
                place_HN[head, block] = places(own, part.labels_N[block])
        out[name] = [figures(place_N, part.labels_N, classes) for place_N in place_HN]
    return out


def _report(
    evaluation: Evaluation,
    extractor: Extractor,
    values: LinearProtocol,
    heads: HeadGrids,
    history: list[dict[str, list[dict[str, float]]]],
    device: torch.device,
) -> list[Result]:
    """The last epoch, and beside it the best one: chosen on the held-out part where there is one, else on the
    images reported, which is what `best` says. The choice is by the metric that the data set is reported in,
    as a sweep on a validation part is in the field; of the data sets of all published protocols here, top-1.
    """
    metric = metric_of(evaluation.test.name)
    place = "held" if values.choose_on == "held-out" and "held" in history[0] else "test"
    last = len(history) - 1
    head_last = _argmax([m[metric] for m in history[last][place]])
    epoch_best = _argmax([max(m[metric] for m in h[place]) for h in history])
    head_best = _argmax([m[metric] for m in history[epoch_best][place]])

    def line(selection: str, epoch: int, head: int) -> Result:
        rate, decay, features = heads.grid[head]
        extra: dict[str, Any] = {
            "learning_rate": rate, "weight_decay": decay, "heads": len(heads),
            "precision": extractor.precision, "augmentation": values.augmentation,
            "chosen_on": "held-out" if place == "held" else "reported",
        }  # fmt: skip
        named = values.features != LAST
        if named:
            extra["features"] = features
        if place == "held":
            extra[f"held_out_{metric}"] = round(history[epoch]["held"][head][metric], 4)
        if len(heads) > 1:
            extra["sweep"] = [
                {"lr": lr, "weight_decay": wd, **({"features": name} if named else {})}
                | {metric: round(m[metric], 4)}
                for (lr, wd, name), m in zip(heads.grid, history[epoch][place])
            ]
        return evaluation.result(
            history[epoch]["test"][head], device, epoch=epoch + 1, selection=selection, settings=extra
        )

    best = "held-out" if place == "held" else "best"
    return [line("last", last, head_last), line(best, epoch_best, head_best)]


def _argmax(values: list[float]) -> int:
    """The first of the largest."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _save(path: Path, heads: HeadGrids, identity: str, step: int, history: list[Any]) -> None:
    """Write the heads' state. Rank 0 only; every rank holds the same."""
    if is_main():
        with atomic_path(path) as aside:
            torch.save(
                {"identity": identity, "step": step, "history": history, "heads": heads.state()}, aside
            )
    barrier()


def _resume(path: Path, heads: HeadGrids, identity: str) -> tuple[int, list[Any]]:
    """Steps done and the history of an earlier run of the same evaluation, else a fresh start."""
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not readable ({error}); delete it to start this evaluation anew") from error
    if state["identity"] != identity:
        return 0, []
    heads.load(state["heads"])
    return int(state["step"]), list(state["history"])
