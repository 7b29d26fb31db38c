"""Settings enter; a trained encoder leaves: checkpoint.pt, backbone.safetensors, metrics. The loop itself."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.augment import View, finish
from pretrain.checkpoint import DISK_FULL, CheckpointWriter, load_checkpoint, remove_leftovers, save_backbone
from pretrain.cli import Progress, RunFailed, UserError, save_settings, settings_as_dict
from pretrain.control import estimate_bn
from pretrain.data import ImageDataset, open_dataset
from pretrain.diagnostics import collapse, diagnose
from pretrain.distributed import (
    any_rank,
    barrier,
    convert_sync_batchnorm,
    is_main,
    rank,
    world_size,
)
from pretrain.loader import (
    Batch,
    StepBatches,
    Views,
    batches,
    default_workers,
    finishes_in_workers,
    where_finished,
)
from pretrain.loss import INTLLoss, intl_loss, loss_floor, spectral_loss
from pretrain.metrics import LossLog, MetricsWriter
from pretrain.model import SHALLOW, Encoder, build_backbone, build_projector, momentum_copy, momentum_update
from pretrain.optim import build_optimizer, ema_momentum_at, lr_at
from pretrain.settings import FREE_TO_CHANGE, Settings
from pretrain.signals import StopSignals
from pretrain.spectral import power

logger = logging.getLogger(__name__)

ASK_RANKS_EVERY = {"cpu": 1, "cuda": 10}  # steps between two questions to all ranks: was one told to stop?
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Hook = Callable[[nn.Module, Settings], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from the settings, the data set and the number of ranks."""

    images: int
    steps_per_epoch: int
    steps: int
    warmup: int
    batch_per_rank: int
    lr: float

    @staticmethod
    def of(settings: Settings, images: int, world: int) -> Plan:
        per_epoch = images // settings.batch_global
        if per_epoch == 0 and settings.epochs > 0:
            raise UserError(
                f"--batch-global {settings.batch_global} is more than the {images} images there are"
            )
        if settings.batch_global % world:
            raise UserError(f"--batch-global {settings.batch_global} cannot be shared by {world} ranks")
        steps = settings.epochs * per_epoch
        steps = min(steps, settings.max_steps or steps)
        return Plan(
            images=images, steps_per_epoch=per_epoch, steps=steps,
            warmup=min(round(settings.warmup_epochs * per_epoch), steps),
            batch_per_rank=settings.batch_global // world, lr=settings.lr * settings.batch_global / 256,
        )  # fmt: skip


@dataclass
class Learner:
    """Everything that learns, and so everything that a checkpoint holds."""

    encoder: Encoder
    slow: Encoder | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @staticmethod
    def build(settings: Settings, device: torch.device, dtype: torch.dtype) -> Learner:
        """The same weights from the same seed on every rank, and for the control."""
        torch.manual_seed(settings.seed)
        backbone = build_backbone(settings.arch, stem=settings.stem, zero_init_last=settings.zero_init_last)
        projector = build_projector(
            backbone.num_features, hidden=settings.projector_hidden, output=settings.projector_output,
            layers=settings.projector_layers,
        )  # fmt: skip
        encoder = Encoder(backbone, projector).to(device)
        encoder.to(memory_format=torch.channels_last)
        if world_size() > 1:
            encoder = cast(Encoder, convert_sync_batchnorm(encoder, device))
        slow = momentum_copy(encoder) if settings.ema else None
        optimizer = build_optimizer(
            encoder, name=settings.optimizer, momentum=settings.momentum,
            weight_decay=settings.weight_decay, decay_1d=settings.decay_1d,
        )  # fmt: skip
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        return Learner(encoder=encoder, slow=slow, optimizer=optimizer, scaler=scaler)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.encoder.state_dict(),
            "ema": self.slow.state_dict() if self.slow is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.encoder.load_state_dict(state["model"])
        if self.slow is not None:
            self.slow.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def train(settings: Settings, device: torch.device, *, hook: Hook | None = None) -> None:
    """Train, or go on with, the run in `settings.output`. All ranks must call.

    `hook(backbone, settings)` is called by rank 0 every `hook_every_epochs`, the backbone in eval mode.
    """
    output = Path(settings.output)
    images = open_dataset(settings.dataset, settings.data_dir, "train")
    plan = Plan.of(settings, len(images), world_size())
    dtype = choose_dtype(settings.precision, device)
    start, saved, unlogged = 0, None, []
    if (output / "checkpoint.pt").exists():
        saved = load_checkpoint(output / "checkpoint.pt")
        start = _check_same_run(saved, settings, output)
        if start >= plan.steps and (output / "backbone.safetensors").exists():
            logger.info("%s is finished: %d of %d steps; nothing to do", output, start, plan.steps)
            return
    learner = Learner.build(settings, device, dtype)
    if saved is not None:
        learner.restore(saved)
        torch.set_rng_state(saved["rng"]["torch"])
        unlogged = saved.get("unlogged", [])  # not in older checkpoints
        logger.info("going on from step %d of %d", start, plan.steps)
    if is_main():
        if 0 < plan.steps <= plan.warmup:
            logger.warning(
                "all %d steps lie inside the warm-up (--warmup-epochs %g, %d steps an epoch): the learning "
                "rate only rises", plan.steps, settings.warmup_epochs, plan.steps_per_epoch,
            )  # fmt: skip
        remove_leftovers(output)
        save_settings(settings, output / "config.yaml")
    barrier()
    if plan.steps == 0:
        _write_control(settings, learner, images, device)
        return
    try:
        _loop(settings, plan, learner, images, device, dtype, start=start, unlogged=unlogged, hook=hook)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise RunFailed(
            f"{output}: the disk is full; the last good checkpoint is kept: free some space and run it again"
        ) from error
    if is_main():
        method = "INTL" if settings.power is None else f"λ^-{settings.power:g}"
        _write_backbones(settings, learner, step=plan.steps, source=f"{method} pretraining")
        logger.info("wrote %s", output / "backbone.safetensors")
    barrier()


def _loop(
    settings: Settings,
    plan: Plan,
    learner: Learner,
    images: ImageDataset,
    device: torch.device,
    dtype: torch.dtype,
    *,
    start: int,
    unlogged: list[list[float]],
    hook: Hook | None,
) -> None:
    output, total = Path(settings.output), plan.steps
    finish_here = finishes_in_workers(settings.augment_on, device)
    views = Views(
        images, views_of(settings), seed=settings.seed, mean=settings.mean, std=settings.std,
        finish_here=finish_here, jpeg_draft=settings.jpeg_draft,
    )  # fmt: skip
    steps = StepBatches(
        len(images), batch_global=settings.batch_global, rank=rank(), world=world_size(),
        seed=settings.seed, start=start, stop=total,
    )  # fmt: skip
    workers = default_workers(world_size(), device) if settings.workers is None else settings.workers
    loader = batches(views, steps, workers=workers, pin_memory=device.type == "cuda")
    encoder = _parallel(learner.encoder, device, compiled=settings.compile)
    learner.encoder.train()
    floor = 0.0 if settings.power is not None else loss_floor(
        settings.batch_global, settings.projector_output, iterations=settings.iterations,
        trade_off=settings.trade_off, whitening=settings.whitening, momentum_target=settings.ema,
    )  # fmt: skip
    metrics = (
        MetricsWriter(output, start=start, wandb=settings.wandb, config=settings_as_dict(settings))
        if is_main()
        else None
    )
    losses = LossLog(unlogged)
    writer = CheckpointWriter(output / "checkpoint.pt")
    broken: set[str] = set()
    logger.info(
        "training %s on %s: %d steps, %s, %d loader workers, colour and blur %s (--augment-on %s)",
        settings.arch, device, total, dtype, workers, where_finished(finish_here, workers, device),
        settings.augment_on,
    )  # fmt: skip

    progress = Progress(total, label="pretrain", start=start, file=output / "progress.json")
    with StopSignals() as stop, progress as bar:
        for step in range(start, total):
            batch = next(loader)
            _count_broken(batch, broken, settings.max_broken_images)
            lr = lr_at(
                step, base=plan.lr, warmup=plan.warmup, total=total, final_ratio=settings.lr_final_ratio
            )
            for group in learner.optimizer.param_groups:
                group["lr"] = lr
            if learner.slow is not None:
                momentum_update(
                    learner.slow,
                    learner.encoder,
                    ema_momentum_at(step, base=settings.ema_momentum, total=total),
                )
            loss, embeddings = _forward(
                settings, encoder, learner.slow, on_device(batch, views, device), dtype
            )
            learner.optimizer.zero_grad(set_to_none=True)
            learner.scaler.scale(loss.total).backward()
            learner.scaler.step(learner.optimizer)
            learner.scaler.update()
            losses.note(step, (loss.total, loss.alignment, loss.trace), lr)

            done, last = step + 1, step + 1 == total
            epoch_ends = done % plan.steps_per_epoch == 0
            epoch = done // plan.steps_per_epoch
            stopping = stop.requested
            if world_size() > 1:
                stopping = done % ASK_RANKS_EVERY[device.type] == 0 and any_rank(stop.requested, device)
            keep = settings.keep_every_epochs
            copy = epoch_ends and keep is not None and epoch % keep == 0
            log = done % settings.log_every == 0 or last
            save = done % settings.save_every == 0 or last or stopping or copy
            if log:
                means = losses.take()
                record = {
                    "step": done, "epoch": done / plan.steps_per_epoch, **means, "lr": lr,
                    "loss_minus_floor": means["loss"] - floor,
                    "images_per_s": means.pop("steps_per_s") * settings.batch_global,
                }  # fmt: skip
                record.pop("steps_per_s")
                record |= _diagnosis(settings, embeddings[-1], alarm=done > plan.warmup)
                if metrics is not None:
                    metrics.write(record)
            if save:
                unlogged = losses.check()
                _check_weights(learner, done)
            if save and is_main():
                also = output / f"checkpoint_epoch{epoch}.pt" if copy else None
                writer.save(_state(settings, learner, done, plan, unlogged), also=also)
            if hook is not None and epoch_ends and epoch % settings.hook_every_epochs == 0:
                if metrics is not None:
                    learner.encoder.eval()
                    metrics.write({"step": done, "epoch": epoch, **hook(learner.encoder.backbone, settings)})
                    learner.encoder.train()
                barrier()
            bar.update(1, **({"loss": means["loss"]} if log else {}))
            if stopping and not last:
                writer.wait(must_be_saved=True)
                barrier()
                stop.hand_over()
    writer.wait(must_be_saved=True)
    if metrics is not None:
        metrics.close()


def _forward(
    settings: Settings, encoder: nn.Module, slow: nn.Module | None, views: list[Tensor], dtype: torch.dtype
) -> tuple[INTLLoss, list[Tensor]]:
    """Embeddings of all views and their loss, the same number on all ranks."""
    with torch.autocast(views[0].device.type, dtype, enabled=dtype != torch.float32):
        if slow is None:
            embeddings = encoder(views)
        else:
            with torch.no_grad():
                target = slow(views[:1])
            embeddings = target + encoder(views[1:])
    return loss_of(settings, embeddings), embeddings


def loss_of(settings: Settings, embeddings: list[Tensor]) -> INTLLoss:
    """What the settings train with: INTL's loss, or that of another power of the spectrum."""
    if settings.power is not None:
        alignment = spectral_loss(
            embeddings, power(settings.power), whitening=settings.whitening, momentum_target=settings.ema
        )
        return INTLLoss(alignment, alignment, torch.zeros_like(alignment))
    return intl_loss(
        embeddings, iterations=settings.iterations, trade_off=settings.trade_off,
        whitening=settings.whitening, momentum_target=settings.ema,
    )  # fmt: skip


def on_device(batch: Batch, views: Views, device: torch.device) -> list[Tensor]:
    """The batch's views, finished, on the device."""
    moved = [v.to(device, non_blocking=True) for v in batch.views]
    if not batch.colours:
        return moved
    mean, std = views.mean.to(device), views.std.to(device)
    return [
        finish(crops, colours.to(device), mean=mean, std=std) for crops, colours in zip(moved, batch.colours)
    ]


def _check_weights(learner: Learner, step: int) -> None:
    """Raises RunFailed before weights that are not finite replace a good checkpoint."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in learner.encoder.parameters()]))
    if not torch.isfinite(norms).all():
        lr = learner.optimizer.param_groups[0]["lr"]
        raise RunFailed(
            f"weights are not finite after step {step} (learning rate {lr:.4g}), though its loss was; the "
            "last good checkpoint is kept. Lower --lr or take --precision float32"
        )


def _diagnosis(settings: Settings, z_ND: Tensor, *, alarm: bool) -> dict[str, float]:
    """The spectrum of this rank's embeddings; an alarm when they have collapsed. All ranks must call."""
    diagnosis = diagnose(z_ND)
    problem = collapse(diagnosis, n=z_ND.shape[0], d=z_ND.shape[1]) if alarm else None
    if problem is not None and is_main():
        logger.warning("%s", problem)
    if settings.on_collapse == "stop" and any_rank(problem is not None, z_ND.device):
        what = problem or "an embedding collapsed on another rank"
        raise RunFailed(f"stopped: {what}; the last checkpoint is kept")
    return diagnosis


def _count_broken(batch: Batch, broken: set[str], limit: int) -> None:
    for message in batch.broken:
        if message not in broken:
            broken.add(message)
            logger.warning("skipped: %s", message)
    if len(broken) > limit:
        raise RunFailed(f"more than --max-broken-images {limit} images cannot be read; the last: {message}")


def _parallel(encoder: nn.Module, device: torch.device, *, compiled: bool) -> nn.Module:
    """The encoder as it is called: in DDP where there are several ranks, compiled on request."""
    if world_size() > 1:
        encoder = nn.parallel.DistributedDataParallel(
            encoder, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )
    return torch.compile(encoder) if compiled else encoder  # type: ignore[return-value]


def _state(
    settings: Settings, learner: Learner, step: int, plan: Plan, unlogged: list[list[float]]
) -> dict[str, Any]:
    epoch, place = divmod(step, plan.steps_per_epoch)
    return {
        "step": step,
        "epoch": epoch,
        "config": settings_as_dict(settings),
        **learner.state(),
        "rng": {"torch": torch.get_rng_state()},
        "unlogged": unlogged,
        "data": {"seed": settings.seed, "epoch": epoch, "step_in_epoch": place},
    }


def _check_same_run(saved: Mapping[str, Any], settings: Settings, output: Path) -> int:
    """The step reached. Raises UserError when the checkpoint is of a run with other settings."""
    now = settings_as_dict(settings)
    other = [k for k, v in now.items() if k not in FREE_TO_CHANGE and saved["config"].get(k) != v]
    if other:
        said = "; ".join(f"{k}: {saved['config'].get(k)} there, {now[k]} now" for k in other)
        raise UserError(f"{output} holds a run with other settings ({said}); choose another --output")
    return int(saved["step"])


def _write_backbones(settings: Settings, learner: Learner, *, step: int, source: str) -> None:
    output = Path(settings.output)
    branches = {"online": (learner.encoder, "backbone.safetensors")}
    if learner.slow is not None:
        branches["ema"] = (learner.slow, "backbone_ema.safetensors")
    for branch, (encoder, file) in branches.items():
        zero = settings.zero_init_last
        metadata = {
            "arch": settings.arch, "stem": settings.stem, "source": source, "branch": branch,
            "stem_padding": cast(nn.Conv2d, encoder.backbone.conv1).padding[0],
            "image_size": settings.image_size, "mean": settings.mean, "std": settings.std,
            "dataset": settings.dataset, "epochs": settings.epochs, "seed": settings.seed, "step": step,
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
        plan = Plan(images=len(images), steps_per_epoch=1, steps=0, warmup=0, batch_per_rank=1, lr=0.0)
        writer = CheckpointWriter(Path(settings.output) / "checkpoint.pt")
        writer.save(_state(settings, learner, 0, plan, []))
        writer.wait(must_be_saved=True)
        _write_backbones(settings, learner, step=0, source="random initialisation")
        logger.info("wrote the random control %s", Path(settings.output) / "backbone.safetensors")
    barrier()


def views_of(settings: Settings) -> list[View]:
    """The settings of each view."""
    per_view = zip(
        settings.view_sizes, *(settings.per_view(k) for k in (
            "min_scales", "max_scales", "jitter_p", "grey_p", "blur_p", "solarise_p", "flip_p",
        ))
    )  # fmt: skip
    return [
        View(
            size=size, min_scale=low, max_scale=high, interpolation=settings.interpolation,
            jitter=tuple(settings.jitter), jitter_p=jitter_p, grey_p=grey_p, blur_p=blur_p,
            blur_sigma=tuple(settings.blur_sigma), solarise_p=solarise_p, flip_p=flip_p,
        )
        for size, low, high, jitter_p, grey_p, blur_p, solarise_p, flip_p in per_view
    ]  # fmt: skip


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of backbone and projector; "auto" is bfloat16 where the device computes in it natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise UserError("--precision float16 needs a GPU; take bfloat16 or float32 on a CPU")
    return DTYPES[precision]


def load_hook(name: str | None) -> Hook | None:
    """The function MODULE:FUNCTION. Raises UserError when there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--hook {name}: wanted MODULE:FUNCTION that can be imported ({error})") from error
