"""The views of a run's batches, from image files, or images on the device, to the network's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.data.datasets import ImageDataset
from pretrain.settings import Settings
from pretrain.views.augment import View, resized_crops
from pretrain.views.batch import Batch, each_tensor
from pretrain.views.colours import finish
from pretrain.views.loader import StepBatches, Views, batches, colour_place, default_workers
from pretrain.views.resident import ResidentImages


@dataclass(frozen=True, kw_only=True)
class InputPipeline:
    """Makes the views of one step's images after the other, as the settings have them."""

    views: Views
    batch_global: int
    workers: int
    where: str
    """Where crops, colour and blur are made, in words."""
    device: torch.device
    resident: ResidentImages | None
    """The images, where they lie on the device; there the views are made then, without workers."""
    mean: Tensor
    std: Tensor
    cropped: Callable[..., Tensor] = resized_crops
    coloured: Callable[..., Tensor] = finish

    @staticmethod
    def of(
        settings: Settings, images: ImageDataset, device: torch.device, *, must_fit: bool | None = None
    ) -> InputPipeline:
        """The pipeline of a run.

        Raises UserError where the images do not fit the device and must (default: with --data-on device).
        """
        workers = workers_of(settings, device)
        finish_here, where = colour_place(settings.augment_on, workers, device)
        resident = None
        if images_on_device(settings, device):
            resident = ResidentImages.of(images, device, batch=settings.batch_global, workers=workers)
            if resident is not None:
                finish_here, workers, where = False, 0, f"views made on the {device.type} from {resident}"
            elif settings.data_on == "device" if must_fit is None else must_fit:
                raise UserError(
                    f"--data-on device: {len(images):,} images take more than their share of the memory; "
                    "leave the option out, and workers load them"
                )
        if resident is None:
            where = f"{workers} loader workers, colour and blur {where} (--augment-on {settings.augment_on})"
        views = Views(
            images, views_of(settings), seed=settings.seed, mean=settings.mean, std=settings.std,
            finish_here=finish_here, jpeg_draft=settings.jpeg_draft,
        )  # fmt: skip
        return InputPipeline(
            views=views, batch_global=settings.batch_global, workers=workers, where=where, device=device,
            resident=resident, mean=views.mean.to(device), std=views.std.to(device),
        )  # fmt: skip

    def batches(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` of this one of `world` ranks, in the host's memory."""
        steps = StepBatches(
            len(self.views.images), batch_global=self.batch_global, rank=rank, world=world,
            seed=self.views.seed, start=start, stop=stop,
        )  # fmt: skip
        pinned = self.device.type == "cuda"
        if self.resident is None:
            return batches(self.views, steps, workers=self.workers, pin_memory=pinned)
        return self._placed(steps, self.resident, pinned)

    def _placed(self, steps: StepBatches, resident: ResidentImages, pinned: bool) -> Iterator[Batch]:
        broken = resident.broken
        for pairs in steps:
            batch = self.views.places(pairs, resident.sizes_A2)._replace(broken=broken)
            broken = []
            yield each_tensor(batch, Tensor.pin_memory) if pinned else batch

    def finished(self, batch: Batch) -> list[Tensor]:
        """The views of a batch that lies on the device: N x 3 x S x S float32 each."""
        crops = batch.views
        if self.resident is not None:
            pixels = self.resident.pixels
            crops = [self.cropped(pixels[i], box, v) for (i, box), v in zip(batch.places, self.views.views)]
        if not batch.colours:
            return crops
        return [self.coloured(c, k, mean=self.mean, std=self.std) for c, k in zip(crops, batch.colours)]

    def views_by(self, step: str) -> Callable[[Batch], list[Tensor]]:
        """`finished`, for compiled_graph by kernels that torch.compile makes once for views of one size."""
        if step != "compiled_graph":  # a CPU, which captures no graph, blurs by OpenCV
            return self.finished
        cropped, coloured = (torch.compile(f, dynamic=False) for f in (self.cropped, self.coloured))
        return dataclasses.replace(self, cropped=cropped, coloured=coloured).finished


def images_on_device(settings: Settings, device: torch.device) -> bool:
    """Whether the images are to lie on the device if they fit."""
    asked = settings.data_on == "auto" and device.type == "cuda" and settings.augment_on != "workers"
    return asked or settings.data_on == "device"


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
