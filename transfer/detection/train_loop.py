"""The detection training loop; writes model, checkpoints and metrics.json.

One loop, as detectron2's plain_train_net: forward, backward, step; then, when due, PreciseBN, evaluation and
a checkpoint. Everything random in iteration i follows from (seed, i, rank), so that a checkpoint needs no
random state and a resumed run draws what an undisturbed one draws.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from torch import Tensor, nn

from pretrain.common.collectives import sum_over_ranks
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import read_jsonl, write_text
from pretrain.common.process_group import barrier
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from pretrain.metrics import start_wandb
from transfer.detection import config
from transfer.detection.batches import seed_of, train_loader
from transfer.detection.checkpointer import StrictCheckpointer
from transfer.detection.precise_bn import precise_statistics
from transfer.detection.protocol import flat
from transfer.detection.semantic.keys import is_semantic
from transfer.detection.semantic.learning_rate import build_schedule

logger = logging.getLogger(__name__)
LAST, FINAL = "model_last", "model_final"  # .pth, in OUTPUT_DIR

Evaluate = Callable[[nn.Module], Mapping[str, Mapping[str, Any]]]
"""A model -> its numbers by test set and task."""


def fine_tune(
    cfg: CfgNode,
    model: Any,
    evaluate: Evaluate,
    *,
    seed: int,
    record: Mapping[str, Any],
    resume_changed: bool = False,
    keep: int = 1,
    wandb: str | None = None,
) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Any]]]:
    """Train `model` for SOLVER.MAX_ITER iterations, from OUTPUT_DIR's checkpoint where there is one.

    All ranks must call. Leaves OUTPUT_DIR/config.yaml, model_final.pth, with TEST.EVAL_PERIOD model_best.pth,
    and the newest `keep` checkpoints (1: none once finished); returns the record kept in them (`record` with
    seed and settings) and the numbers of the trained model. On SIGTERM or SIGUSR2 it saves and hands over
    (`pretrain.common.signals`). `resume_changed`: go on although settings differ. `wandb`: W&B project.
    Raises RunFailed when a loss is not finite, UserError when weights or settings do not fit.
    """
    output, max_iter = Path(cfg.OUTPUT_DIR), cfg.SOLVER.MAX_ITER
    trainer = DetectionTrainer(cfg, model)
    checkpointer = StrictCheckpointer(
        model, str(output), optimizer=trainer.optimizer, scheduler=trainer.scheduler, scaler=trainer.scaler
    )
    run: dict[str, Any] = {"seed": seed, "settings": _settings(cfg), **record}
    start = 0
    if checkpointer.has_checkpoint():
        held = checkpointer.load(checkpointer.get_checkpoint_file())
        _refuse_another_run(held["run"], run, output, resume_changed)
        run |= {k: v for k, v in held["run"].items() if k in ("seed", "best")}
        start = held["iteration"] + 1
        logger.info("going on from iteration %d", start)
        if start < max_iter and trainer.scheduler.last_epoch != start:
            raise UserError(
                f"{output} holds a finished run of {start} iterations without its optimizer; to train on, "
                f"give another OUTPUT_DIR and MODEL.WEIGHTS {output / FINAL}.pth"
            )
    elif cfg.MODEL.WEIGHTS:
        checkpointer.other_categories = True
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        if checkpointer.anew:
            logger.warning("trained anew, for other categories: %s", ", ".join(checkpointer.anew))
    main = comm.is_main_process()
    if main:
        write_text(output / "config.yaml", cfg.dump())
    outcome: dict[str, Mapping[str, Any]] = {}

    def judge() -> dict[str, Any]:
        outcome.update(evaluate(model))
        trainer.parallel.train()
        return dict(*outcome.values()) if len(outcome) == 1 else dict(outcome)

    period, best = cfg.TEST.EVAL_PERIOD, None
    if period > 0 and main:
        best = _best(cfg, model, run)
    writers = _writers(output, start, max_iter, run["settings"], wandb) if main else []
    with StopSignals() as stop, Progress(
        max_iter, label=f"fine-tuning {cfg.PROTOCOL}", unit="iteration", start=start,
        file=output / "progress.json",
    ) as progress:  # fmt: skip
        checkpoints = Checkpoints(checkpointer, run, stop, keep=keep, best=best)
        trainer.register_hooks([
            hooks.IterationTimer(),
            hooks.CallbackHook(after_step=lambda t: t.precise_statistics()),
            hooks.CallbackHook(after_train=lambda t: checkpoints.final()),  # before the last evaluation
            hooks.EvalHook(period, judge),
            best,
            hooks.PeriodicWriter(writers, max(1, min(20, max_iter // 20))),
            # after the writers: what a kill cuts off behind a checkpoint is never written again
            checkpoints,
            hooks.CallbackHook(after_step=lambda t: t.show(progress)),
            hooks.CallbackHook(after_step=lambda t: t.stop_here()),
        ])  # fmt: skip
        try:
            trainer.train_from(start, seed=run["seed"], stop=stop)
        finally:
            for writer in writers:
                writer.close()
    barrier()
    return run, outcome


class DetectionTrainer(TrainerBase):
    """detectron2's loop of hooks around one step: forward, backward, update.

    Everything random in iteration i follows from (seed, i, rank). All ranks take part.
    """

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        super().__init__()
        self.cfg, self.model, self.parallel = cfg, model, model
        self.on_gpu = cfg.MODEL.DEVICE != "cpu"
        self.optimizer = build_optimizer(cfg, model)
        self.scheduler = build_schedule(cfg, self.optimizer)
        self.scaler = torch.amp.GradScaler("cuda", enabled=cfg.SOLVER.AMP.ENABLED and self.on_gpu)
        self.precision = (
            torch.float16 if self.on_gpu else torch.bfloat16
        )  # with AMP; bfloat16 needs no scaling
        self.stopping = False
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        if not self.on_gpu:
            model.backbone.to(memory_format=torch.channels_last)  # 1.1x on a CPU

    def train_from(self, start: int, *, seed: int, stop: StopSignals) -> None:
        """Run iterations `start` to SOLVER.MAX_ITER; the base class would print a stop as an error."""
        cfg, rank, world_size = self.cfg, comm.get_rank(), comm.get_world_size()
        self.iter = self.start_iter = start
        self.max_iter, self.seed, self.stop = cfg.SOLVER.MAX_ITER, seed, stop
        self.parallel = create_ddp_model(
            self.model, broadcast_buffers=False,
            device_ids=[torch.cuda.current_device()] if self.on_gpu else None,
        )  # fmt: skip
        self.batches = train_loader(cfg, seed=seed, rank=rank, world_size=world_size, start=start)
        self.parallel.train()
        with EventStorage(start) as self.storage:
            self.before_train()
            for iteration in range(start, self.max_iter):
                self.iter = iteration
                self.before_step()
                self.run_step()
                self.after_step()
            self.iter = self.max_iter  # by which hooks know that training has ended well
            self.after_train()

    def run_step(self) -> None:
        """One update from the batch that is due. Raises RunFailed where a loss is not finite."""
        began = time.perf_counter()
        torch.manual_seed(seed_of(self.seed, self.iter, comm.get_rank()))
        batch = next(self.batches)
        waited = time.perf_counter() - began
        enabled = self.cfg.SOLVER.AMP.ENABLED
        with torch.autocast("cuda" if self.on_gpu else "cpu", self.precision, enabled=enabled):
            losses: dict[str, Tensor] = self.parallel(batch)
            total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        means, self.stopping = _agree(losses, self.stop.requested)
        if not all(math.isfinite(v) for v in means.values()):
            terms = ", ".join(f"{k} {v:.4g}" for k, v in means.items())
            raise RunFailed(
                f"the loss is not finite at iteration {self.iter} ({terms}); lower SOLVER.BASE_LR "
                f"({self.cfg.SOLVER.BASE_LR}) or lengthen SOLVER.WARMUP_ITERS "
                f"({self.cfg.SOLVER.WARMUP_ITERS})"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.storage.put_scalars(total_loss=sum(means.values()), data_time=waited, **means)
        lr = self.optimizer.param_groups[0]["lr"]
        self.storage.put_scalars(smoothing_hint=False, lr=lr, max_mem=peak_memory_mib(self.on_gpu))
        self.scheduler.step()

    def precise_statistics(self) -> None:
        """Before every evaluation: BatchNorm's statistics, over batches of their own."""
        done, period = self.iter + 1, self.cfg.TEST.EVAL_PERIOD
        if done == self.max_iter or (period > 0 and done % period == 0):
            precise_statistics(self.cfg, self.model, seed=self.seed)

    def show(self, progress: Progress) -> None:
        """Loss, learning rate and speed beside the bar."""
        latest = {name: value for name, (value, _) in self.storage.latest().items()}
        speed = {}
        if "time" in latest:
            seconds = self.storage.history("time").median(20)
            speed = {"images/s": round(self.cfg.SOLVER.IMS_PER_BATCH / seconds, 2)}
        progress.update(1, loss=latest["total_loss"], lr=latest["lr"], **speed)

    def stop_here(self) -> None:
        """Hand over when any rank was told to stop; `Checkpoints` has saved."""
        if self.stopping and self.iter + 1 < self.max_iter:
            barrier()
            self.stop.hand_over_together()


class Checkpoints(HookBase):
    """Saves when it is time or when the run is told to stop, and the trained model at the end.

    detectron2's PeriodicCheckpointer cannot save the run's record, nor at the moment of a signal.
    """

    def __init__(
        self, checkpointer: StrictCheckpointer, run: dict[str, Any], stop: StopSignals, *, keep: int,
        best: hooks.BestCheckpointer | None,
    ) -> None:  # fmt: skip
        self.checkpointer, self.run, self.stop, self.keep, self.best = checkpointer, run, stop, keep, best

    def after_step(self) -> None:
        """Save every SOLVER.CHECKPOINT_PERIOD iterations and when the run is told to stop."""
        done = self.trainer.iter + 1
        due = self.trainer.stopping or done % self.trainer.cfg.SOLVER.CHECKPOINT_PERIOD == 0
        if done == self.trainer.max_iter or not due:
            return
        name = LAST if self.keep == 1 else f"model_{self.trainer.iter:07d}"
        self._save(self.checkpointer, name)
        if comm.is_main_process():
            self._drop(self._numbered()[: -self.keep] if self.keep > 1 else [])

    def final(self) -> None:
        """Save model_final.pth, unless nothing was trained, and drop the last checkpoint."""
        if self.trainer.start_iter == self.trainer.max_iter:
            return
        self._save(StrictCheckpointer(self.trainer.model, self.checkpointer.save_dir), FINAL)
        if comm.is_main_process():
            self._drop([Path(self.checkpointer.save_dir) / f"{LAST}.pth"])

    def _save(self, checkpointer: StrictCheckpointer, name: str) -> None:
        if self.best is not None and self.best.best_metric is not None:
            self.run["best"] = [self.best.best_metric, self.best.best_iter]
        checkpointer.run = self.run
        checkpointer.save(name, iteration=min(self.trainer.iter, self.trainer.max_iter - 1))

    def _numbered(self) -> list[Path]:
        return sorted(Path(self.checkpointer.save_dir).glob("model_[0-9]*.pth"))

    def _drop(self, files: Sequence[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)


def _best(cfg: CfgNode, model: nn.Module, run: Mapping[str, Any]) -> hooks.BestCheckpointer:
    """detectron2's keeper of model_best.pth, by box AP or mIoU on the first test set."""
    file = StrictCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        newest=False,
        run={k: v for k, v in run.items() if k != "best"} | {"selection": "best"},
    )
    several = len(cfg.DATASETS.TEST) > 1
    metric = "sem_seg/mIoU" if is_semantic(cfg) else "bbox/AP"
    metric = f"{cfg.DATASETS.TEST[0]}/{metric}" if several else metric
    hook = hooks.BestCheckpointer(cfg.TEST.EVAL_PERIOD, file, metric)
    hook.best_metric, hook.best_iter = run.get("best", (None, None))
    return hook


def peak_memory_mib(on_gpu: bool) -> float:
    """Most memory in use so far, MiB: of tensors on the GPU, or of this process where there is none."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """What must be the same for a run to be the same run."""
    values = flat(cfg)
    return {k: v for k, v in values.items() if k not in config.NOT_THE_RUN}


def _refuse_another_run(
    held: Mapping[str, Any], ours: Mapping[str, Any], output: Path, allowed: bool
) -> None:
    """OUTPUT_DIR's checkpoint must come from these settings and these weights."""
    before, now = held["settings"], ours["settings"]
    changed = [k for k in now if before.get(k) != now[k] and k != "SEED"]
    if ours["seed"] != held["seed"] and now["SEED"] >= 0:
        changed.append("SEED")
    if held["origin"].get("sha256") != ours["origin"].get("sha256"):
        changed.append("the content of MODEL.WEIGHTS")
    if changed and not allowed:
        raise UserError(
            f"{output} holds the checkpoint of another run: {', '.join(changed[:5])} differ"
            f"{'' if len(changed) > 1 else 's'}; give another OUTPUT_DIR, or --resume to go on all the same"
        )


def _agree(losses: Mapping[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
    """The mean of each loss over the ranks, and whether any rank was asked to stop. All ranks must call."""
    values = [v.detach().float() for v in losses.values()]
    vector = torch.stack([*values, torch.tensor(float(stop), device=values[0].device)])
    *means, stops = sum_over_ranks(vector).div(comm.get_world_size()).tolist()
    return dict(zip(losses, means)), stops > 0


def _writers(
    output: Path, start: int, max_iter: int, settings: Mapping[str, Any], wandb: str | None
) -> list[EventWriter]:
    """detectron2's log.txt, metrics.json, without lines of iterations that will be run again, TensorBoard."""
    path = output / "metrics.json"
    kept = [line for line in read_jsonl(path) if line.get("iteration", 0) < start]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(path)),
        TensorboardXWriter(str(output / "tensorboard"), purge_step=start),
        *([WandbWriter(wandb, output, start, settings)] if wandb else []),
    ]


class WandbWriter(EventWriter):
    """What the other writers write, to Weights & Biases."""

    def __init__(self, project: str, output: Path, start: int, settings: Mapping[str, Any]) -> None:
        self._run = start_wandb(project, output, start, settings)
        self._written = -1

    def write(self) -> None:
        """Log the scalars that are new since the last call, smoothed over 20 iterations."""
        latest = get_event_storage().latest_with_smoothing_hint(20)
        new = {name: value for name, (value, step) in latest.items() if step > self._written}
        self._written = get_event_storage().iter
        self._run.log(new, step=self._written)

    def close(self) -> None:
        """End the W&B run."""
        self._run.finish()
