"""The views of a run's batches, from image files to the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.augment import View, finish
from pretrain.data.datasets import ImageDataset
from pretrain.data.loader import Batch, StepBatches, Views, batches, colour_place, default_workers
from pretrain.settings import Settings


@dataclass(frozen=True, kw_only=True)
class InputPipeline:
    """Loads the views of one step's images after the other, as the settings have them."""

    views: Views
    batch_global: int
    workers: int
    where: str
    """Where colour and blur run, in words."""
    device: torch.device

    @staticmethod
    def of(settings: Settings, images: ImageDataset, device: torch.device) -> InputPipeline:
        """The pipeline of a run on `device`."""
        workers = workers_of(settings, device)
        finish_here, where = colour_place(settings.augment_on, workers, device)
        views = Views(
            images, views_of(settings), seed=settings.seed, mean=settings.mean, std=settings.std,
            finish_here=finish_here, jpeg_draft=settings.jpeg_draft,
        )  # fmt: skip
        return InputPipeline(
            views=views, batch_global=settings.batch_global, workers=workers, where=where, device=device
        )

    def batches(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` of this one of `world` ranks, in the host's memory."""
        steps = StepBatches(
            len(self.views.images), batch_global=self.batch_global, rank=rank, world=world,
            seed=self.views.seed, start=start, stop=stop,
        )  # fmt: skip
        return batches(self.views, steps, workers=self.workers, pin_memory=self.device.type == "cuda")

    def on_device(self, batch: Batch) -> list[Tensor]:
        """The batch's views, finished, on the device: N x 3 x S x S float32 each."""
        moved = [v.to(self.device, non_blocking=True) for v in batch.views]
        if not batch.colours:
            return moved
        mean, std = (_on(self.device, tuple(x.tolist())) for x in (self.views.mean, self.views.std))
        return [
            finish(crops, colours.to(self.device), mean=mean, std=std)
            for crops, colours in zip(moved, batch.colours)
        ]


@functools.cache
def _on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    """Constants, moved once: a copy from pageable memory makes the host wait for what the GPU has to do."""
    return torch.tensor(values, device=device)


def workers_of(settings: Settings, device: torch.device) -> int:
    """The processes that make views: as many as the settings say, or as the cores allow."""
    return default_workers(device) if settings.workers is None else settings.workers


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
