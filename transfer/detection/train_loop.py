"""The detection training loop; it leaves the model, a checkpoint and metrics.json.

One loop, as detectron2's plain_train_net: forward, backward, step; then, when due, PreciseBN, evaluation and
a checkpoint. Everything random in iteration i follows from (seed, i, rank), so that a checkpoint needs no
random state and a resumed run draws what an undisturbed one draws.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import Tensor, nn

from pretrain.common.collectives import sum_over_ranks
from pretrain.common.errors import RunFailed, UserError
from pretrain.common.files import read_jsonl, write_text
from pretrain.common.process_group import barrier
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from transfer.detection import config
from transfer.detection.checkpointer import StrictCheckpointer
from transfer.detection.data import train_loader

logger = logging.getLogger(__name__)
LAST, FINAL = "model_last", "model_final"  # .pth, in OUTPUT_DIR
PRECISE_BN_STREAM = 1_000_003  # added to the seed: PreciseBN sees images in another order than training

Evaluate = Callable[[nn.Module], Mapping[str, Mapping[str, float]]]


def fine_tune(
    cfg: CfgNode,
    model: Any,
    evaluate: Evaluate,
    *,
    seed: int,
    origin: Mapping[str, Any],
    resume_changed: bool = False,
) -> dict[str, Any]:
    """Train `model` for SOLVER.MAX_ITER iterations, from OUTPUT_DIR's checkpoint where there is one.

    All ranks must call. Leaves OUTPUT_DIR/config.yaml and model_final.pth; returns the record kept in that.
    On SIGTERM or SIGUSR2 it saves and hands over (`pretrain.common.signals`). `resume_changed`: go on
    although settings differ.
    Raises RunFailed when a loss is not finite, UserError when weights or settings do not fit.
    """
    rank, world_size = comm.get_rank(), comm.get_world_size()
    output, max_iter = Path(cfg.OUTPUT_DIR), cfg.SOLVER.MAX_ITER
    on_gpu = cfg.MODEL.DEVICE != "cpu"
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=cfg.SOLVER.AMP.ENABLED and on_gpu)
    precision = torch.float16 if on_gpu else torch.bfloat16  # with AMP; bfloat16 needs no scaling
    if not on_gpu:
        model.backbone.to(memory_format=torch.channels_last)  # 1.1x on a CPU
    checkpointer = StrictCheckpointer(
        model, str(output), optimizer=optimizer, scheduler=scheduler, scaler=scaler
    )
    record = {"seed": seed, "settings": _settings(cfg), "origin": dict(origin)}
    start = 0
    if checkpointer.has_checkpoint():
        held = checkpointer.load(checkpointer.get_checkpoint_file())
        _refuse_another_run(held["run"], record, output, resume_changed)
        record["seed"] = seed = held["run"]["seed"]
        start = held["iteration"] + 1
        logger.info("going on from iteration %d", start)
        if start < max_iter and scheduler.last_epoch != start:
            raise UserError(
                f"{output} holds a finished run of {start} iterations without its optimizer; to train on, "
                f"give another OUTPUT_DIR and MODEL.WEIGHTS {output / FINAL}.pth"
            )
    elif cfg.MODEL.WEIGHTS:
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    if comm.is_main_process():
        write_text(output / "config.yaml", cfg.dump())
    parallel = create_ddp_model(
        model, broadcast_buffers=False, device_ids=[torch.cuda.current_device()] if on_gpu else None
    )
    writers = _writers(output, start, max_iter) if comm.is_main_process() else []
    write_every = max(1, min(20, max_iter // 20))
    batches = train_loader(cfg, seed=seed, rank=rank, world_size=world_size, start=start)
    parallel.train()
    with (
        EventStorage(start) as storage,
        StopSignals() as stop,
        Progress(
            max_iter, label=f"fine-tuning {cfg.PROTOCOL}", unit="iteration", start=start,
            file=output / "progress.json",
        ) as progress,
    ):  # fmt: skip
        for iteration in range(start, max_iter):
            torch.manual_seed(_seed_of(seed, iteration, rank))
            batch = next(batches)
            with torch.autocast("cuda" if on_gpu else "cpu", precision, enabled=cfg.SOLVER.AMP.ENABLED):
                losses: dict[str, Tensor] = parallel(batch)
                total = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            scaler.scale(total).backward()
            means, stopping = _agree(losses, stop.requested)
            if not all(math.isfinite(v) for v in means.values()):
                terms = ", ".join(f"{k} {v:.4g}" for k, v in means.items())
                raise RunFailed(
                    f"the loss is not finite at iteration {iteration} ({terms}); lower SOLVER.BASE_LR "
                    f"({cfg.SOLVER.BASE_LR}) or lengthen SOLVER.WARMUP_ITERS ({cfg.SOLVER.WARMUP_ITERS})"
                )
            scaler.step(optimizer)
            scaler.update()
            storage.put_scalars(total_loss=sum(means.values()), **means)
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()

            done = iteration + 1
            evaluation_due = cfg.TEST.EVAL_PERIOD > 0 and done % cfg.TEST.EVAL_PERIOD == 0
            if evaluation_due or done == max_iter:
                precise_statistics(cfg, model, seed=seed)
            if evaluation_due and done < max_iter:
                put_metrics(storage, evaluate(parallel))
                parallel.train()
            storage.step()
            if done % write_every == 0 or done == max_iter:
                for writer in writers:
                    writer.write()
            progress.update(1, loss=sum(means.values()), lr=optimizer.param_groups[0]["lr"])
            if done < max_iter and (stopping or done % cfg.SOLVER.CHECKPOINT_PERIOD == 0):
                checkpointer.save(LAST, iteration=iteration, run=record)
            if stopping and done < max_iter:
                barrier()
                stop.received = stop.received or StopSignals.SIGNALS[0]  # another rank's signal
                stop.hand_over()
    for writer in writers:
        writer.close()
    if start < max_iter:
        final = StrictCheckpointer(model, str(output))
        final.save(FINAL, iteration=max_iter - 1, run=record)
        if comm.is_main_process():
            (output / f"{LAST}.pth").unlink(missing_ok=True)
    barrier()
    return record


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """What must be the same for a run to be the same run."""
    values = config.flat(cfg)
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


def _seed_of(seed: int, iteration: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1)[0])


def _agree(losses: Mapping[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
    """The mean of each loss over the ranks, and whether any rank was asked to stop. All ranks must call."""
    values = [v.detach().float() for v in losses.values()]
    vector = torch.stack([*values, torch.tensor(float(stop), device=values[0].device)])
    *means, stops = sum_over_ranks(vector).div(comm.get_world_size()).tolist()
    return dict(zip(losses, means)), stops > 0


def precise_statistics(cfg: CfgNode, model: Any, *, seed: int) -> None:
    """Recompute BatchNorm's running statistics over TEST.PRECISE_BN.NUM_ITER batches, alike on all ranks.

    fvcore leaves every rank with its own (detectron2 issues 5398, 5409): means and mean squares are averaged.
    All ranks must call.
    """
    if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(model):
        return
    rank, world_size = comm.get_rank(), comm.get_world_size()
    torch.manual_seed(_seed_of(seed + PRECISE_BN_STREAM, 0, rank))
    batches = train_loader(
        cfg, seed=seed + PRECISE_BN_STREAM, rank=rank, world_size=world_size, num_workers=0
    )
    with EventStorage():  # what the model notes on these batches is no training metric
        update_bn_stats(model, batches, cfg.TEST.PRECISE_BN.NUM_ITER)
    average_statistics(model)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give every rank the statistics of all ranks' batches together. All ranks must call."""
    world_size = comm.get_world_size()
    for norm in get_bn_modules(model):
        square = sum_over_ranks(norm.running_var + norm.running_mean**2) / world_size
        norm.running_mean.copy_(sum_over_ranks(norm.running_mean) / world_size)
        norm.running_var.copy_(square - norm.running_mean**2)


def put_metrics(storage: EventStorage, outcome: Mapping[str, Mapping[str, float]]) -> None:
    """Note evaluation results as bbox/AP, segm/AP50 … for metrics.json and TensorBoard."""
    for task, values in outcome.items():
        for name, value in values.items():
            storage.put_scalar(f"{task}/{name}", value, smoothing_hint=False)


def _writers(output: Path, start: int, max_iter: int) -> list[Any]:
    """detectron2's metrics.json, without lines of iterations that will be run again, and TensorBoard."""
    path = output / "metrics.json"
    kept = [line for line in read_jsonl(path) if line.get("iteration", 0) < start]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    if start >= max_iter:
        return []
    return [JSONWriter(str(path)), TensorboardXWriter(str(output / "tensorboard"), purge_step=start)]
