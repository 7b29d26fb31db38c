"""`transfer linear`: linear heads trained on a frozen backbone's features.

With `augmentation` each batch of training images is cropped, flipped and passed through the backbone anew,
once for all heads of the grid; without, features are extracted once and kept. Test features are always
extracted once: the backbone does not change.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint import FORMAT, load_checkpoint, size_of, try_to_save
from pretrain.common.cli import settings_as_dict
from pretrain.common.collectives import any_rank
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.output_folder import need_space
from pretrain.common.process_group import barrier, is_main, rank, sent, world_size
from pretrain.common.progress import Progress, counted
from pretrain.common.signals import StopSignals
from pretrain.data.transfer_sets import metric_of
from pretrain.data.voc07 import refuse_voc07
from pretrain.metrics import wandb_log
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.accuracy import percentages, places
from transfer.evaluation.augment import Augmented
from transfer.evaluation.context import Evaluation, judge_frozen, output_of, set_up
from transfer.evaluation.features import Extractor, image_batches
from transfer.evaluation.pooled_features import LAST, columns
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Clock, Result
from transfer.evaluators.epoch_order import epoch_batches
from transfer.evaluators.heads import HeadGrids, rate_factor
from transfer.evaluators.linear_features import Labelled, cached_parts, held_out_part
from transfer.evaluators.linear_protocol import LinearProtocol
from transfer.options.commands import parse
from transfer.options.evaluation import LinearSettings

logger = logging.getLogger(__name__)

CHECKPOINT = "linear.pt"
Judge = Callable[[Evaluation, Extractor, LinearProtocol], list[Result]]
BLOCK_BYTES = 1 << 28  # of one block of logits, or of features in float64, when heads are evaluated


def main(argv: list[str]) -> int:
    """`python -m transfer linear`."""
    evaluate(parse("linear", argv))
    return 0


def evaluate(settings: LinearSettings, backbone: Backbone | None = None) -> list[Result]:
    """The results of a linear protocol, written to OUTPUT; `backbone` in place of the settings' file."""
    with output_of(settings, "linear"):
        return _evaluate(settings, backbone)


def _evaluate(settings: LinearSettings, backbone: Backbone | None) -> list[Result]:
    protocol = load_protocol(settings.protocol, "linear")
    values = protocol.settings(LinearProtocol)
    clock = Clock()
    if settings.wandb is not None and values.method != "heads":
        raise UserError(f"--wandb {settings.wandb}: {protocol} has no epochs that could be logged")
    if values.method == "svm":
        from transfer.evaluators.svm import evaluate_voc

        return evaluate_voc(settings, protocol, values, clock, backbone)
    refuse_voc07(settings.dataset)
    evaluation = set_up(
        settings, protocol, values, clock, task="linear", seed=settings.seed, backbone=backbone
    )
    _check(evaluation, values)
    judge: Judge = run_heads
    if values.method == "logreg":
        from transfer.evaluators.logreg import run_logreg

        judge = run_logreg
    found = judge_frozen(
        evaluation, lambda settled, extractor: judge(settled, extractor, values), values.stages
    )
    (settings.output / CHECKPOINT).unlink(missing_ok=True)
    return found


def _check(evaluation: Evaluation, values: LinearProtocol) -> None:
    """Raises UserError for a backbone or training images that the protocol cannot do with."""
    train, protocol = evaluation.train, evaluation.protocol
    if values.augmentation and evaluation.settings.max_broken_images:
        raise UserError(
            f"--max-broken-images is for cached features; {protocol} decodes the training images every epoch "
            "and wants all of them readable"
        )
    if values.method == "heads" and len(train) * (1 - values.held_out_percent / 100) < 1:
        raise UserError(f"{train.root}: no training image is left beside the held-out part")
    if values.held_out_percent and not len(held_out_part(train, values, 0)[1]):
        raise UserError(
            f"{train.root}: one training image a class, and {protocol} chooses on "
            f"{values.held_out_percent:g} % of each class's held out; wanted two or more of at least one "
            "class, or a protocol of one head, which holds out none"
        )
    if evaluation.backbone.model is None and (values.augmentation or values.features != LAST):
        what = "augments images for a backbone" if values.augmentation else "reads layers of a backbone"
        raise UserError(f"{protocol} {what}; evaluate raw-pixels with cached_linear@1")


def run_heads(evaluation: Evaluation, extractor: Extractor, values: LinearProtocol) -> list[Result]:
    """Train the grid and evaluate it after each epoch; the results to report. All ranks must call."""
    settings, device = evaluation.settings, extractor.device
    seed = evaluation.seed or 0
    metric = metric_of(evaluation.test.name)
    train, held, test, fit = cached_parts(evaluation, extractor, values)
    classes = len(evaluation.train.classes)
    sets = {name: columns(name, extractor.widths) for name in values.features}
    heads = heads_of(values, sets, classes, seed=seed, device=device)
    steps = values.steps(len(fit))
    identity = (
        f"heads/4 {evaluation.backbone.key} {evaluation.protocol.hash} {seed} {evaluation.train.fingerprint} "
        f"{evaluation.test.fingerprint} {len(fit)} {evaluation.transform} {extractor.precision}"
    )
    path = settings.output / CHECKPOINT
    done, history = _resume(path, heads, identity)
    if is_main() and train is None:
        need_space(path, 2 * size_of(heads.state()), "the heads' checkpoints")
    diverged: set[int] = set()
    label = f"linear probe, {counted(len(heads), 'head')}"
    bar = Progress(steps * values.epochs, label=label, start=done, file=settings.output / "progress.json")

    def features(epoch: int, batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        if train is not None:
            return (train[b] for b in batches)
        return _augmented(evaluation, extractor, values, fit, batches, epoch)

    project = settings.wandb if isinstance(settings, LinearSettings) else None
    logged = wandb_log(project, settings.output, done // steps, settings_as_dict(settings))
    with StopSignals() as stop, bar, logged as log:
        for step, loss in train_heads(heads, values, len(fit), features, seed=seed, done=done):
            bar.update(1)
            if step % steps:
                if step % 50 == 0 and any_rank(stop.requested, device):
                    _save(path, heads, identity, step, history, must_be_saved=True)
                    stop.hand_over_together()
                continue
            epoch = step // steps - 1
            last = [{"last": float(x)} for x in loss]
            history.append(judge_heads(heads, classes, held, test) | {"loss": last})
            told = metric if held is None else f"held-out {metric}"
            best = max(history[-1]["held" if held is not None else "test"], key=lambda m: m[metric])
            diverged = _diverged(heads, diverged, evaluation, epoch, step)
            alive = [head for head in range(len(heads)) if head not in diverged]
            shown = {"loss": float(loss[alive].min()), told: best[metric]}
            bar.update(0, epoch=epoch + 1, **shown)
            log(shown, epoch + 1)
            stopping = any_rank(stop.requested, device) and epoch + 1 < values.epochs
            if train is None or stopping:
                _save(path, heads, identity, step, history, must_be_saved=stopping)
            if stopping:
                stop.hand_over_together()
    return _report(evaluation, values, heads, history, device)


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


def heads_of(
    values: LinearProtocol, sets: Mapping[str, Tensor], classes: int, *, seed: int, device: torch.device
) -> HeadGrids:
    """The protocol's grid of heads at its start; `sets`: by name, which columns of the features are of it."""
    return HeadGrids(
        sets, classes, rates=values.rates, decays=values.weight_decays, optimizer=values.optimizer,
        momentum=values.momentum, init=values.init, seed=seed, device=device, norm_batch=values.norm_batch,
    )  # fmt: skip


def train_heads(
    heads: HeadGrids,
    values: LinearProtocol,
    n: int,
    features: Callable[[int, list[np.ndarray]], Iterator[tuple[Tensor, Tensor]]],
    *,
    seed: int,
    done: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Train from step `done` on: after each step how many are done, and the mean loss of each head (H).

    `features(epoch, batches)` gives features B x D and labels B of this rank's part of each batch, which is
    of positions among the `n` images trained on. All ranks must call.
    """
    steps = values.steps(n)
    for epoch in range(done // steps, values.epochs):
        batches = epoch_batches(n, values.batch, steps=steps, seed=seed, epoch=epoch)[done - epoch * steps :]
        for x_BD, labels_B in features(epoch, [b[rank() :: world_size()] for b in batches]):
            factor = rate_factor(
                values.schedule, step=done, steps_per_epoch=steps, epochs=values.epochs,
                milestones=values.milestones, gamma=values.gamma, final=values.final,
                warmup_epochs=values.warmup_epochs,
            )  # fmt: skip
            loss = heads.step(x_BD, labels_B, factor=factor)
            done += 1
            yield done, loss


def _augmented(
    evaluation: Evaluation,
    extractor: Extractor,
    values: LinearProtocol,
    fit: np.ndarray,
    batches: list[np.ndarray],
    epoch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    settings, train, device = evaluation.settings, evaluation.train, extractor.device
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


def judge_heads(
    heads: HeadGrids, classes: int, held: Labelled | None, test: Labelled
) -> dict[str, list[dict[str, float]]]:
    """Accuracies of every head on the held-out part and on the test images."""
    out = {}
    for name, part in (("held", held), ("test", test)):
        if part is None:
            continue
        rows = max(1, BLOCK_BYTES // max(4 * classes * len(heads), 8 * part.features_ND.shape[1]))
        place_HN = part.labels_N.new_empty(len(heads), len(part))
        for start in range(0, len(part), rows):
            block = slice(start, start + rows)
            features, labels = part[block]
            logits = heads.logits(features)
            logits = torch.where(torch.isfinite(logits), logits, torch.full_like(logits, -math.inf))
            for head, own in enumerate(logits.unbind(1)):
                place_HN[head, block] = places(own, labels)
        out[name] = [percentages(place_N, part.labels_N, classes) for place_N in place_HN]
    return out


def _report(
    evaluation: Evaluation,
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
    head_last = first_largest([m[metric] for m in history[last][place]])
    epoch_best = first_largest([max(m[metric] for m in h[place]) for h in history])
    head_best = first_largest([m[metric] for m in history[epoch_best][place]])

    def line(selection: str, epoch: int, head: int) -> Result:
        rate, decay, features = heads.grid[head]
        extra: dict[str, Any] = {
            "learning_rate": rate, "weight_decay": decay, "heads": len(heads),
            "augmentation": values.augmentation,
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
        warnings = []
        loss, guess = history[-1]["loss"][head]["last"], math.log(len(evaluation.train.classes))
        if not loss < guess:
            what = f"the last step's training loss, {loss:.3g}, is no better than a guess's ({guess:.2f})"
            warnings.append(f"nothing was learnt: {what}")
        return evaluation.result(
            history[epoch]["test"][head], device, epoch=epoch + 1, selection=selection, settings=extra,
            warnings=warnings,
        )  # fmt: skip

    best = "held-out" if place == "held" else "best"
    found = [line("last", last, head_last), line(best, epoch_best, head_best)]
    learnt_nothing = [w for w in found[0].warnings if w not in evaluation.warnings]
    if learnt_nothing and is_main():
        logger.warning(
            "%s; copy the protocol %s into a file of your own with smaller learning_rates, and give it as "
            "--protocol", learnt_nothing[0], evaluation.protocol,
        )  # fmt: skip
    rates, chosen = sorted({rate for rate, *_ in heads.grid}), heads.grid[head_last][0]
    at_the_end = len(rates) > 1 and chosen in (rates[0], rates[-1])
    if at_the_end and not learnt_nothing and is_main():
        logger.info(
            "the best learning rate, %g, is the %s that %s tries: one beyond it may be better still", chosen,
            "smallest" if chosen == rates[0] else "largest", evaluation.protocol,
        )  # fmt: skip
    if values.choose_epoch == "last":
        return [line(best if len(heads) > 1 else "last", last, head_last)]
    return found


def first_largest(values: list[float]) -> int:
    """The index of the largest value, of equal ones the first."""
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _save(
    path: Path, heads: HeadGrids, identity: str, step: int, history: list[Any], *, must_be_saved: bool
) -> None:
    """Write the heads' state. Rank 0 only; every rank holds the same. A failure is logged, or raised as
    NotSaved if it `must_be_saved`."""
    if is_main():
        state = {"identity": identity, "step": step, "history": history, "heads": heads.state()}
        try_to_save(path, state, must_be_saved=must_be_saved)
    barrier()


def _resume(path: Path, heads: HeadGrids, identity: str) -> tuple[int, list[Any]]:
    """Steps done and the history of an earlier run of the same evaluation, else a fresh start."""
    if not path.exists():
        return 0, []
    state = load_checkpoint(path, formats=(FORMAT, None))  # earlier versions named none here
    if state.get("identity") != identity:
        return 0, []
    heads.load(state["heads"])
    return int(state["step"]), list(state["history"])
