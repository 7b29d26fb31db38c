"""`transfer semisup`: fine-tuning with a share of the labels.

Backbone and head are trained together, on 1 %, 10 % or all of the labels, with a learning rate each and
cropped, flipped images drawn from (seed, epoch, image index), and evaluated on the test images after every
epoch. OUTPUT/checkpoint.pt, written at each epoch's end and when stopped, holds all that is needed to resume.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint import load_checkpoint, size_of, try_to_save
from pretrain.common.cli import settings_as_dict
from pretrain.common.collectives import ASK_RANKS_EVERY, any_rank, sum_over_ranks
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import write_json
from pretrain.common.output_folder import need_space
from pretrain.common.process_group import barrier, is_main, process_group, rank, sent, world_size
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from pretrain.data.transfer_sets import metric_of
from pretrain.data.voc07 import refuse_voc07
from pretrain.learner import choose_dtype
from pretrain.metrics import wandb_log
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.accuracy import percentages, places
from transfer.evaluation.augment import Augmented, Mixing, drawn_from, rand_augment
from transfer.evaluation.context import Evaluation, output_of, set_up
from transfer.evaluation.features import Decoded, image_batches
from transfer.evaluation.pooled_features import network_of, stages_of
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Clock, Result
from transfer.evaluation.tokens import at_size
from transfer.evaluators.epoch_order import epoch_batches, steps_of
from transfer.evaluators.finetune import FineTuning, joined
from transfer.evaluators.finetune_protocol import FineTuneProtocol
from transfer.evaluators.heads import rate_factor
from transfer.evaluators.subsets import LabelSubset, choose_subset
from transfer.options.commands import parse
from transfer.options.evaluation import SemisupSettings
from transfer.options.weights import RAW_PIXELS

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
EPOCHS = "epochs.json"


def main(argv: list[str]) -> int:
    """`python -m transfer semisup`."""
    evaluate(parse("semisup", argv))
    return 0


def evaluate(settings: SemisupSettings, backbone: Backbone | None = None) -> list[Result]:
    """The results of fine-tuning, written to OUTPUT; `backbone` in place of the settings' file."""
    with output_of(settings, "semisup"):
        return _evaluate(settings, backbone)


def _evaluate(settings: SemisupSettings, backbone: Backbone | None) -> list[Result]:
    clock = Clock()
    protocol = load_protocol(settings.protocol, "semisup")
    values = protocol.settings(FineTuneProtocol)
    if str(settings.label_percent) not in values.lr_backbone:
        shares = ", ".join(values.lr_backbone)
        raise UserError(
            f"{protocol} has rates for {shares} % of the labels, not for --label-percent "
            f"{settings.label_percent}; finetune@1 has some for every share"
        )
    if settings.weights == RAW_PIXELS:
        raise UserError("raw-pixels cannot be fine-tuned; knn and linear evaluate them")
    refuse_voc07(settings.dataset)
    evaluation = set_up(
        settings, protocol, values, clock, task="semisup", seed=settings.seed,
        label_percent=settings.label_percent, backbone=backbone,
    )  # fmt: skip
    subset = choose_subset(  # last, as it may go to the network
        evaluation.train, settings.label_percent, lists=settings.lists, seed=settings.subset_seed,
        folder=settings.cache,
    )  # fmt: skip
    # A node that had its copy of the data already waits for one that still makes it.
    with process_group(timeout_min=24 * 60 if settings.stage_to else 30) as device:
        dtype = choose_dtype(evaluation.precision, device)
        ranks = {} if values.sync_bn and not values.draws else {"world_size": world_size()}
        evaluation = replace(
            evaluation, precision=str(dtype).removeprefix("torch."),
            more_conditions={"labels": subset.sha256, **ranks},
        )  # fmt: skip
        written = evaluation.found()
        if {"last", "best"} <= {r.selection for r in written}:
            evaluation.tell_finished(written)
            return written
        if values.batch < 2 * world_size():
            raise UserError(f"{protocol}: a batch of {values.batch} is too small for {world_size()} ranks")
        if values.pairs and (values.batch % (2 * world_size()) or len(subset.indices) < values.batch):
            raise UserError(
                f"{protocol} mixes images in pairs: wanted a batch ({values.batch}) with an even part for "
                f"each of {world_size()} ranks, and as many labelled images (there are {len(subset.indices)})"
            )
        run = Run(evaluation, values, subset, settings, device, dtype)
        evaluation.begin()
        if is_main():
            beside = 1 if (settings.output / CHECKPOINT).exists() else 2  # one is written beside another
            weights = size_of(run.learner.state()["model"])
            need_space(settings.output, beside * 2 * weights, "checkpoints with the optimizer's momentum")
        run.train()
        kept = {r.selection for r in written}
        new = evaluation.write([r for r in run.found() if r.selection not in kept])
        barrier()
    return [*written, *new]


class Run:
    """A fine-tuning under way: where it is, and how each epoch so far ended."""

    def __init__(
        self,
        evaluation: Evaluation,
        values: FineTuneProtocol,
        subset: LabelSubset,
        settings: SemisupSettings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.evaluation, self.values, self.subset = evaluation, values, subset
        self.settings, self.device = settings, device
        self.output = settings.output
        self.steps = steps_of(len(subset.indices), values.batch, drop_last=values.drop_last)  # an epoch
        self.total = self.steps * values.epochs
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), device=device)  # over this epoch's steps, this rank's part
        self.dtype = dtype
        self.metric = metric_of(evaluation.test.name)
        self.told = False
        self.lr_backbone, self.lr_head = values.rates(settings.label_percent)
        backbone = evaluation.backbone.model
        assert backbone is not None
        sized = at_size(backbone, evaluation.transform.size, evaluation.positions)
        network = network_of(sized, stages_of(values.features))
        self.learner = FineTuning(
            network, classes=len(evaluation.train.classes), lr_backbone=self.lr_backbone,
            lr_head=self.lr_head, momentum=values.momentum, weight_decay=values.weight_decay,
            head_init=values.head_init, sync_bn=values.sync_bn, seed=settings.seed, dtype=self.dtype,
            device=device, optimizer=values.optimizer, weight_decay_of=values.weight_decay_of,
            layer_decay=values.layer_decay, drop_path=values.drop_path, head_norm=values.head_norm,
        )  # fmt: skip
        look = evaluation.transform
        self.changed = (
            rand_augment(values.auto_augment, look.size, look.mean, values.interpolation)
            if values.auto_augment
            else None
        )
        self.mixing = Mixing(
            len(evaluation.train.classes), mixup=values.mixup, cutmix=values.cutmix,
            smoothing=values.label_smoothing, erasing=values.random_erasing, device=device,
        )  # fmt: skip
        self._resume()

    def train(self) -> None:
        """All epochs that are left, each with its look at the test images. All ranks must call."""
        ask = ASK_RANKS_EVERY[self.device.type]
        progress = Progress(
            self.total, label=f"fine-tuning on {self.settings.label_percent} %", start=self.step,
            file=self.output / "progress.json",
        )  # fmt: skip
        done = self.step // self.steps
        logged = wandb_log(self.settings.wandb, self.output, done, settings_as_dict(self.settings))
        with StopSignals() as stop, progress as bar, logged as log:
            while self.step < self.total:
                epoch = self.step // self.steps
                for images, labels_B, size in self._batches(epoch):
                    factor = rate_factor(
                        self.values.schedule, step=self.step, steps_per_epoch=self.steps,
                        epochs=self.values.epochs, milestones=self.values.milestones,
                        gamma=self.values.gamma, final=self.values.final,
                        warmup_epochs=self.values.warmup_epochs,
                    )  # fmt: skip
                    with self._draws():
                        images, labels = self.mixing(images, labels_B)
                        loss = self.learner.step(images, labels, batch_global=size, factor=factor)
                    self.loss_sum += loss
                    self.step += 1
                    at_end = self.step % self.steps == 0
                    asked = at_end or self.step % ask == 0
                    stopping = False
                    if asked:
                        mean = float(sum_over_ranks(self.loss_sum)) / (self.step - epoch * self.steps)
                        if not math.isfinite(mean):
                            raise self._diverged(f"the epoch's mean loss is {mean}", epoch, factor)
                        stopping = any_rank(stop.requested, self.device)
                    if at_end:
                        self._judge(epoch, mean, factor)
                        log(self.history[-1], epoch + 1)
                        self.loss_sum.zero_()
                    if at_end or stopping or self.step % self.settings.save_every == 0:
                        self._save(must_be_saved=stopping and self.step < self.total)
                    bar.update(1, **(self._shown(mean) if asked else {}))
                    if stopping and self.step < self.total:
                        stop.hand_over()

    def _draws(self) -> contextlib.AbstractContextManager[None]:
        """Whatever this step draws hangs on seed, step and rank alone, so that a resumed run draws it too."""
        if not self.values.draws:
            return contextlib.nullcontext()
        return drawn_from(self.settings.seed, self.step, rank(), device=self.device)

    def _shown(self, loss: float) -> dict[str, float]:
        last = {self.metric: self.history[-1][self.metric]} if self.history else {}
        return {"loss": loss} | last

    def found(self) -> list[Result]:
        """The last epoch's result, and that of the epoch best on the images reported, by the data
        set's metric."""
        last = len(self.history) - 1
        warnings = self._doubts()
        if warnings and is_main():
            logger.warning("%s; %s", warnings[0], self._advice())
        best = max(range(len(self.history)), key=lambda e: (self.history[e][self.metric], -e))
        return [self._line("last", last, warnings), self._line("best", best, warnings)]

    def _doubts(self) -> list[str]:
        """Why the figures say nothing, where the classifier learnt nothing: they are those of a wreck."""
        loss, guess = self.history[-1]["train_loss"], math.log(len(self.evaluation.test.classes))
        if loss < guess:
            return []
        what = f"the last epoch's training loss, {loss:.2f}, is no better than a guess's ({guess:.2f})"
        return [f"nothing was learnt: {what}"]

    def _advice(self) -> str:
        """What to do about rates that are too large, by the protocol's keys."""
        return (
            f"copy the protocol {self.evaluation.protocol} into a file of your own with smaller lr_backbone "
            "and lr_head, and give it as --protocol with another --output"
        )

    def _line(self, selection: str, epoch: int, warnings: list[str]) -> Result:
        record = self.history[epoch]
        extra: dict[str, Any] = {
            "labels": self.subset.name, "labels_n": len(self.subset.indices),
            "labels_sha256": self.subset.sha256, "lr_backbone": self.lr_backbone, "lr_head": self.lr_head,
            "batch": self.values.batch, "epochs": self.values.epochs,
            "train_loss": record["train_loss"],
        }  # fmt: skip
        metrics = {k: record[k] for k in ("top1", "top5", "mean_per_class")}
        return self.evaluation.result(
            metrics, self.device, epoch=epoch + 1, selection=selection, settings=extra, warnings=warnings
        )

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """This rank's images, labels and the number over all ranks, for each step left of the epoch."""
        train = self.evaluation.train
        cut = epoch_batches(
            len(self.subset.indices), self.values.batch, seed=self.settings.seed, epoch=epoch,
            steps=self.steps if self.values.drop_last else None, least=2 * world_size(),
        )  # fmt: skip
        cut = [self.subset.indices[b] for b in cut[self.step - epoch * self.steps :]]
        images = Augmented(
            train, size=self.evaluation.transform.size, seed=self.settings.seed, epoch=epoch,
            interpolation=self.values.interpolation, changed=self.changed,
        )  # fmt: skip
        mine = [b[rank() :: world_size()] for b in cut]
        stream = image_batches(images, mine, self.evaluation.transform, self.settings.workers)
        for (pixels, positions), whole in zip(stream, cut):
            labels = sent(train.labels_N[positions], self.device)
            yield self._input(pixels), labels, len(whole)

    def _input(self, pixels_B3HW: Tensor) -> Tensor:
        x = self.evaluation.transform.normalise(pixels_B3HW.to(self.device, non_blocking=True))
        return x.contiguous(memory_format=torch.channels_last)

    def _judge(self, epoch: int, train_loss: float, factor: float) -> None:
        """Add this epoch's line: every test image once, whatever the number of ranks. All ranks must call."""
        self.learner.share_buffers()
        test, transform = self.evaluation.test, self.evaluation.transform
        mine = np.arange(len(test))[rank() :: world_size()]
        size = self.settings.batch_size
        batches = [mine[s : s + size] for s in range(0, len(mine), size)]
        place_N = torch.full((len(test),), -1)
        finite = True
        for pixels, positions in image_batches(
            Decoded(test, transform), batches, transform, self.settings.workers
        ):
            labels = sent(test.labels_N[positions], self.device)
            logits = self.learner.logits(self._input(pixels))
            finite = finite and bool(logits.isfinite().all())
            place_N[torch.from_numpy(positions)] = places(logits, labels).cpu()
        if any_rank(not finite, self.device):  # the loss before the last step was finite, the weights are not
            raise self._diverged("test images have no finite logits", epoch, factor)
        metrics = percentages(
            joined(place_N, self.device), torch.from_numpy(test.labels_N), len(test.classes)
        )
        if train_loss >= 3 * math.log(len(test.classes)) and is_main() and not self.told:
            self.told = True  # once: a new head starts near the guess itself, not at thrice its loss
            logger.warning(
                "epoch %d: a training loss of %.2f at %s; should it stay above a guess's (%.2f), %s",
                epoch + 1, train_loss, self._rates(factor), math.log(len(test.classes)), self._advice(),
            )  # fmt: skip
        self.history.append({"epoch": epoch + 1, "lr_factor": factor, "train_loss": train_loss, **metrics})

    def _diverged(self, what: str, epoch: int, factor: float) -> RunFailed:
        precise = "" if self.dtype == torch.float32 else "try --precision float32, or "
        return RunFailed(
            f"fine-tuning diverged: {what} in epoch {epoch + 1}, step {self.step} of {self.total}, at "
            f"{self._rates(factor)}; no result is written. To go on, {precise}{self._advice()}"
        )

    def _rates(self, factor: float) -> str:
        return (
            f"learning rates of {self.lr_backbone * factor:g} (backbone) and {self.lr_head * factor:g} (head)"
        )

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same for a checkpoint to be gone on from."""
        e = self.evaluation
        return {
            "weights": e.backbone.key, "protocol": f"{e.protocol} {e.protocol.hash}",
            "dataset": f"{e.train.name} {e.train.fingerprint} {e.test.fingerprint}",
            "labels": f"{self.subset.name} {self.subset.sha256}", "seed": str(self.settings.seed),
            "image_size": str(e.transform), "precision": str(self.dtype),
        }  # fmt: skip

    def _resume(self) -> None:
        """Take up OUTPUT's checkpoint. Raises UserError for that of another fine-tuning, unless --force."""
        path = self.output / CHECKPOINT
        if not path.exists():
            return
        saved = load_checkpoint(path)
        theirs = (saved.get("config") or {}).get("identity") or {}
        other = [k for k, v in self.identity.items() if theirs.get(k) != v]
        if other and not self.settings.force:
            raise UserError(
                f"{self.output} holds a run that differs in {', '.join(other)}; choose another --output, or "
                "start this one anew there with --force"
            )
        if other or (self.settings.force and saved["step"] >= self.total):
            return
        self.learner.restore(saved)
        self.step, self.history = int(saved["step"]), list(saved["history"])
        if is_main():
            self.loss_sum.fill_(saved["loss_sum"])
        if self.step < self.total and is_main():
            logger.info("going on from step %d of %d", self.step, self.total)

    def _save(self, *, must_be_saved: bool) -> None:
        """Write the checkpoint and how the epochs ended; a failure is logged, or raised as NotSaved if it
        `must_be_saved`. All ranks must call."""
        self.learner.share_buffers()
        loss_sum = float(sum_over_ranks(self.loss_sum))
        if is_main():
            state = {
                "step": self.step, "epoch": self.step // self.steps, "history": self.history,
                "loss_sum": loss_sum, "config": {"identity": self.identity}, **self.learner.state(),
            }  # fmt: skip
            try_to_save(self.output / CHECKPOINT, state, must_be_saved=must_be_saved)
            with contextlib.suppress(OSError):  # the checkpoint has it too
                write_json(self.output / EPOCHS, self.history)
        barrier()
