"""The training loop; writes checkpoint.pt, backbone.safetensors and metrics.jsonl."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain import tuning
from pretrain.checkpoint import CheckpointWriter, load_checkpoint, save_backbone, size_of
from pretrain.common.cli import save_settings, settings_as_dict
from pretrain.common.collectives import ASK_RANKS_EVERY, any_rank, gather_rows
from pretrain.common.errors import RunFailed, UserError, is_disk_full
from pretrain.common.files import atomic_path, read_jsonl
from pretrain.common.output_folder import need_space
from pretrain.common.process_group import barrier, is_main, rank, world_size
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals
from pretrain.control import estimate_bn
from pretrain.data.corrupt_images import CorruptImages
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.data.images import BrokenImage
from pretrain.input_pipeline import InputPipeline
from pretrain.learner import Learner, choose_dtype
from pretrain.loss import Loss, floor_of, loss_of
from pretrain.metrics import LossLog, MetricsWriter
from pretrain.network.model import SHALLOW, build_backbone
from pretrain.objectives.diagnostics import collapse, diagnose
from pretrain.plan import Plan, StepEvents
from pretrain.schedules import ema_momentum_at, lr_at
from pretrain.settings import FREE_TO_CHANGE, Settings, recorded
from pretrain.training_step import TrainingStep, still_possible

logger = logging.getLogger(__name__)

LOGS_BYTES = 10**7

Hook = Callable[[nn.Module, Settings], Mapping[str, float]]


def train(settings: Settings, device: torch.device, *, hook: Hook | None = None) -> None:
    """Train, or go on with, the run in `settings.output`. All ranks must call.

    `hook(backbone, settings)` is called by rank 0 every `hook_every_epochs`, the backbone in eval mode.
    """
    output = Path(settings.output)
    if settings.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the wandb package: pip install 'intl-bench[wandb]'")
    choose_dtype(settings.precision, device)  # refuses what the device cannot
    loss = loss_of(settings)
    with torch.device("meta"):
        build_backbone(settings.arch, stem=settings.stem)  # an unknown name is told before the listing
    images = open_dataset(settings.dataset, settings.data_dir, "train", labelled=False)
    plan = Plan.of(settings, len(images), world_size())
    start, saved, unlogged, broken, asked = 0, None, [], [], settings
    if (output / "checkpoint.pt").exists():
        saved = load_checkpoint(output / "checkpoint.pt")
        settings = tuning.taken_over(settings, saved["config"])
        start = _check_same_run(saved, settings, output)
        if start >= plan.steps and (output / "backbone.safetensors").exists():
            logger.info("%s is finished: %d of %d steps; nothing to do", output, start, plan.steps)
            return
    dtype = choose_dtype(settings.precision, device)
    settings = still_possible(settings, asked, device, dtype, plan.steps)
    pipeline = None
    if plan.steps > 0:
        pipeline = InputPipeline.of(settings, images, device, must_fit=asked.data_on == "device")
    if saved is None and pipeline is not None:
        settings = tuning.chosen(settings, device, pipeline, plan.steps)
    tuning.set_up(settings, device)
    dtype = choose_dtype(settings.precision, device)
    learner = Learner.build(settings, device, dtype, sync_bn=plan.steps > 0)
    if saved is not None:
        learner.restore(saved)
        torch.set_rng_state(saved["rng"]["torch"])
        unlogged, broken = (saved.get(key, []) for key in ("unlogged", "broken"))  # not in older checkpoints
        logger.info("going on from step %d of %d", start, plan.steps)
    if is_main() and 0 < plan.steps <= plan.warmup:
        logger.warning(
            "all %d steps lie inside the warm-up (--warmup-epochs %g, %d steps an epoch): the learning rate "
            "only rises", plan.steps, settings.warmup_epochs, plan.steps_per_epoch,
        )  # fmt: skip
    try:
        if is_main():
            _need_space(output, settings, plan, learner, start)
            save_settings(settings, output / "config.yaml")
        barrier()
        if pipeline is None:
            _write_control(settings, learner, images, device)
            return
        _loop(
            settings, plan, learner, pipeline, loss, start=start, unlogged=unlogged, broken=broken, hook=hook
        )  # fmt: skip
        if is_main():
            source = f"{settings.method} pretraining"
            _write_backbones(settings, learner, step=plan.steps, source=source)
            logger.info(
                "wrote %s; peak memory %.1f GiB", output / "backbone.safetensors", peak_memory_gib(device)
            )
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise RunFailed(
            f"{output}: the disk is full; {_kept(output)}: free some space and run it again"
        ) from error
    barrier()


def _need_space(output: Path, settings: Settings, plan: Plan, learner: Learner, start: int) -> None:
    """Raises UserError unless there is room for the checkpoints and backbones still to be written."""
    size, every = size_of(learner.state()), settings.keep_every_epochs
    beside = 1 if (output / "checkpoint.pt").exists() else 2  # the next one is written beside the last
    copies = 0 if every is None else plan.steps // plan.steps_per_epoch // every - (
        start // plan.steps_per_epoch // every
    )  # fmt: skip
    networks = [learner.encoder, learner.target] if learner.target is not None else [learner.encoder]
    backbones = sum(size_of(n.backbone.state_dict()) for n in networks)
    what = f"{beside + copies} checkpoints of {size / 1e6:.0f} MB, backbones and logs"
    need_space(output, (beside + copies) * size + backbones + LOGS_BYTES, what)


def _kept(output: Path) -> str:
    kept = (output / "checkpoint.pt").exists()
    return "the last good checkpoint is kept" if kept else "no checkpoint was saved before"


def _loop(
    settings: Settings,
    plan: Plan,
    learner: Learner,
    pipeline: InputPipeline,
    loss_of_views: Loss,
    *,
    start: int,
    unlogged: list[list[float]],
    broken: list[str],
    hook: Hook | None,
) -> None:
    output, total, device = Path(settings.output), plan.steps, pipeline.device
    loader = pipeline.batches(start, total, rank=rank(), world=world_size())
    take = TrainingStep(learner, pipeline.views_by(settings.step), loss_of_views, settings.step)
    floor = floor_of(settings)
    losses, shown = LossLog(unlogged), {}
    writer = CheckpointWriter(output / "checkpoint.pt")
    skipped = CorruptImages(settings.max_broken_images, broken)
    logger.info(
        "training %s on %s: %d steps, %s, %s; %s",
        settings.arch, device, total, settings.precision, settings.step, pipeline.where,
    )  # fmt: skip

    progress = Progress(total, label="pretrain", start=start, file=output / "progress.json")
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(_metrics_writer(settings, start)) if is_main() else None
        if start > 0 and metrics is not None:
            _catch_up(settings, plan, learner, metrics, start, hook)
        barrier()
        stop, bar = stack.enter_context(StopSignals()), stack.enter_context(progress)
        for step in range(start, total):
            try:
                batch = next(loader)
            except BrokenImage as error:
                raise RunFailed(str(error)) from None
            skipped.note(batch.broken)
            lr = lr_at(
                step, base=plan.lr, warmup=plan.warmup, total=total, final_ratio=settings.lr_final_ratio
            )
            taken = take(batch, step, lr, ema_momentum_at(step, base=settings.ema_momentum, total=total))
            losses.note(step, taken.loss, lr)

            done, events = step + 1, StepEvents.after(step + 1, plan, settings)
            stopping = stop.requested
            if world_size() > 1:
                stopping = done % ASK_RANKS_EVERY[device.type] == 0 and any_rank(stop.requested, device)
            if events.log:
                skipped.agree()
                record = _record(settings, plan, done, losses.take(), lr, floor, device)
                diagnosis, collapsed = _diagnosis(taken.embedding, alarm=done > plan.warmup or events.last)
                if metrics is not None:
                    metrics.write(record | diagnosis)
                if settings.on_collapse == "stop" and any_rank(collapsed is not None, device):
                    raise RunFailed(f"stopped: {collapsed or 'an embedding collapsed'}; {_kept(output)}")
                shown = {"loss": record["loss"], "images/s": record["images_per_s"]}
            if events.save or stopping:
                skipped.agree()
                unlogged = losses.check()
                learner.check_weights(done)
                if is_main():
                    state = _state(settings, learner, done, plan, unlogged, sorted(skipped.images))
                    writer.save(state, also=_copy_of(output, events.epoch) if events.copy else None)
            if hook is not None and events.hook:
                if metrics is not None:
                    _call(hook, settings, learner, metrics, done, events.epoch)
                barrier()
            bar.update(1, **shown)
            shown = {}
            if stopping and not events.last:
                writer.wait(must_be_saved=True)
                barrier()
                stop.hand_over()
        writer.wait(must_be_saved=True)


def _metrics_writer(settings: Settings, start: int) -> MetricsWriter:
    return MetricsWriter(
        Path(settings.output), start=start, wandb=settings.wandb, config=settings_as_dict(settings)
    )


def _record(
    settings: Settings,
    plan: Plan,
    done: int,
    means: dict[str, float],
    lr: float,
    floor: float | None,
    device: torch.device,
) -> dict[str, float]:
    """A line of metrics.jsonl: the losses' means since the last, `floor` the least the loss can be."""
    steps_per_s = means.pop("steps_per_s")
    record = {
        "step": done, "epoch": done / plan.steps_per_epoch, **means, "lr": lr,
        **({} if floor is None else {"loss_minus_floor": means["loss"] - floor}),
        "images_per_s": steps_per_s * settings.batch_global,
    }  # fmt: skip
    if device.type == "cuda":
        record["peak_memory_gib"] = peak_memory_gib(device)
    return record


def _diagnosis(z_nD: Tensor, *, alarm: bool) -> tuple[dict[str, float], str | None]:
    """The spectrum of the global batch's embeddings and whether they have collapsed, on rank 0; elsewhere
    nothing. All ranks must call."""
    with torch.no_grad():
        z_ND = gather_rows(z_nD)
    if not is_main():
        return {}, None
    diagnosis = diagnose(z_ND)
    problem = collapse(diagnosis, n=z_ND.shape[0], d=z_ND.shape[1]) if alarm else None
    if problem is not None:
        logger.warning("%s", problem)
    return diagnosis, problem


def peak_memory_gib(device: torch.device) -> float:
    """The most that tensors took on the GPU so far, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _copy_of(output: Path, epoch: int) -> Path:
    return output / f"checkpoint_epoch{epoch}.pt"


def _call(
    hook: Hook, settings: Settings, learner: Learner, metrics: MetricsWriter, step: int, epoch: int
) -> None:
    """Log what the hook finds. Rank 0 only."""
    learner.encoder.eval()
    metrics.write({"step": step, "epoch": epoch, **hook(learner.encoder.backbone, settings)})
    learner.encoder.train()


def _catch_up(
    settings: Settings,
    plan: Plan,
    learner: Learner,
    metrics: MetricsWriter,
    start: int,
    hook: Hook | None,
) -> None:
    """What follows an epoch's checkpoint and a kill may have cut off: its copy, and the hook. Rank 0 only."""
    output, events = Path(settings.output), StepEvents.after(start, plan, settings)
    if events.copy and not _copy_of(output, events.epoch).exists():
        with atomic_path(_copy_of(output, events.epoch)) as aside:
            shutil.copyfile(output / "checkpoint.pt", aside)
    if hook is None or not events.hook:
        return
    lines = read_jsonl(output / "metrics.jsonl")
    if not any(line.get("step") == start and "loss" not in line for line in lines):
        _call(hook, settings, learner, metrics, start, events.epoch)


def _state(
    settings: Settings,
    learner: Learner,
    step: int,
    plan: Plan,
    unlogged: list[list[float]],
    broken: list[str],
) -> dict[str, Any]:
    epoch, place = divmod(step, plan.steps_per_epoch)
    return {
        "step": step,
        "epoch": epoch,
        "config": settings_as_dict(settings),
        **learner.state(),
        "rng": {"torch": torch.get_rng_state()},
        "unlogged": unlogged,
        "broken": broken,
        "data": {"seed": settings.seed, "epoch": epoch, "step_in_epoch": place},
    }


def _check_same_run(saved: Mapping[str, Any], settings: Settings, output: Path) -> int:
    """The step reached. Raises UserError when the checkpoint is of a run with other settings."""
    now, before = settings_as_dict(settings), recorded(saved["config"])
    other = [k for k, v in now.items() if k not in FREE_TO_CHANGE and before.get(k) != v]
    if other:
        said = "; ".join(f"{k}: {before.get(k)} there, {now[k]} now" for k in other)
        raise UserError(f"{output} holds a run with other settings ({said}); choose another --output")
    return int(saved["step"])


def _write_backbones(settings: Settings, learner: Learner, *, step: int, source: str) -> None:
    output = Path(settings.output)
    branches = {"online": (learner.encoder, "backbone.safetensors")}
    if learner.target is not None:
        branches["ema"] = (learner.target, "backbone_ema.safetensors")
    for branch, (encoder, file) in branches.items():
        zero = settings.zero_init_last
        metadata = {
            "arch": settings.arch, "stem": settings.stem, "source": source, "branch": branch,
            "stem_padding": cast(nn.Conv2d, encoder.backbone.conv1).padding[0],
            "image_size": settings.image_size, "mean": settings.mean, "std": settings.std,
            "dataset": settings.dataset, "epochs": settings.epochs, "seed": settings.seed, "step": step,
            "precision": settings.precision,
            "zero_init_last": settings.arch not in SHALLOW if zero is None else zero,
        }  # fmt: skip
        save_backbone(output / file, encoder.backbone.state_dict(), metadata)


def _write_control(settings: Settings, learner: Learner, images: ImageDataset, device: torch.device) -> None:
    """`--epochs 0`: the initialisation alone, its BN statistics estimated on the training images."""
    if is_main():
        estimate_bn(
            learner.encoder.backbone, images, size=settings.image_size, mean=settings.mean, std=settings.std,
            seed=settings.seed, device=device,
        )  # fmt: skip
        if learner.target is not None:  # of the same weights, so of the same statistics
            learner.target.backbone.load_state_dict(learner.encoder.backbone.state_dict())
        plan = Plan(images=len(images), steps_per_epoch=1, steps=0, warmup=0, batch_per_rank=1, lr=0.0)
        writer = CheckpointWriter(Path(settings.output) / "checkpoint.pt")
        writer.save(_state(settings, learner, 0, plan, [], []))
        writer.wait(must_be_saved=True)
        _write_backbones(settings, learner, step=0, source="random initialisation")
        logger.info("wrote the random control %s", Path(settings.output) / "backbone.safetensors")
    barrier()


def load_hook(name: str | None) -> Hook | None:
    """The function MODULE:FUNCTION. Raises UserError when there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--hook {name}: wanted MODULE:FUNCTION that can be imported ({error})") from error
