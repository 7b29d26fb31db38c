"""The steps of a run, and what is due after each."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.errors import UserError
from pretrain.settings import Settings


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
        """The plan for so many images and ranks. Raises UserError for a batch that does not fit them."""
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


@dataclass(frozen=True, kw_only=True)
class StepEvents:
    """What the settings want once so many steps are done."""

    epoch: int
    last: bool
    log: bool
    save: bool
    copy: bool
    hook: bool

    @staticmethod
    def after(done: int, plan: Plan, settings: Settings) -> StepEvents:
        """What is due once `done` steps are done."""
        epoch, place = divmod(done, plan.steps_per_epoch)
        last, epoch_ends = done == plan.steps, place == 0
        keep = settings.keep_every_epochs
        copy = epoch_ends and keep is not None and epoch % keep == 0
        return StepEvents(
            epoch=epoch, last=last, copy=copy,
            log=done % settings.log_every == 0 or last,
            save=done % settings.save_every == 0 or last or copy,
            hook=epoch_ends and epoch % settings.hook_every_epochs == 0,
        )  # fmt: skip
