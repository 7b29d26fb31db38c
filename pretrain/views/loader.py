"""Batches of augmented views for each step, the same for any number of workers.

Step s of a run has, on rank r of W, images r, r + W ... of slice s mod steps_per_epoch of the epoch's
permutation, a function of (seed, epoch) alone; one iteration spans all epochs, so that no epoch waits for
workers to start.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pretrain.common.machine import cores_of_rank
from pretrain.data.datasets import ImageDataset
from pretrain.data.images import BrokenImage
from pretrain.data.workers import load
from pretrain.views.augment import Box, View, box_of, boxes_of, resized_crop, shrunk_crop, uniforms
from pretrain.views.batch import Batch, Place
from pretrain.views.colours import Colours, draw_colours, finish

MOST_BROKEN_IN_A_ROW = 100
FIRST_COLOUR_SLOT = 22  # the first 22 uniform numbers place the crop


class StepBatches(Sampler[list[tuple[int, int]]]):
    """For each step from `start` to `stop`: this rank's (epoch, image index) pairs."""

    def __init__(
        self, images: int, *, batch_global: int, rank: int, world: int, seed: int, start: int, stop: int
    ) -> None:
        self.images, self.batch_global, self.rank, self.world = images, batch_global, rank, world
        self.seed, self.start, self.stop = seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.images // self.batch_global
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            first = place * self.batch_global
            order = epoch_order(self.images, self.seed, epoch)
            mine = order[first + self.rank : first + self.batch_global : self.world]
            yield [(epoch, int(i)) for i in mine]


@functools.lru_cache(maxsize=2)
def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the images in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(images)


class Views(Dataset[Any]):
    """(epoch, image index) pairs -> a Batch."""

    def __init__(
        self,
        images: ImageDataset,
        views: Sequence[View],
        *,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        finish_here: bool,
        jpeg_draft: bool = True,
    ) -> None:
        self.images, self.views, self.seed = images, views, seed
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.finish_here, self.jpeg_draft = finish_here, jpeg_draft

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Batch:
        wanted, numbers = self._drawn(pairs)
        crops = [torch.empty((len(pairs), v.size, v.size, 3), dtype=torch.uint8) for v in self.views]
        broken: list[str] = []
        for n, index in enumerate(wanted):
            parts = self._crops(int(index), [u[n] for u in numbers], broken)
            for out, part in zip(crops, parts):
                out[n] = part
        colours = self._colours(numbers)
        if self.finish_here:
            crops = [finish(c, k, mean=self.mean, std=self.std) for c, k in zip(crops, colours)]
            colours = []
        return Batch(views=crops, places=[], colours=colours, broken=broken)

    def places(self, pairs: list[tuple[int, int]], sizes_N2: np.ndarray) -> Batch:
        """The same views still to be taken, from images of widths and heights `sizes_N2`."""
        wanted, numbers = self._drawn(pairs)
        images_N, sizes = torch.from_numpy(wanted), sizes_N2[wanted]
        places = [
            Place(images_N, torch.from_numpy(boxes_of(u, sizes, v))) for u, v in zip(numbers, self.views)
        ]
        return Batch(views=[], places=places, colours=self._colours(numbers), broken=[])

    def _drawn(self, pairs: list[tuple[int, int]]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The images' indices, and for each view the N x SLOTS random numbers."""
        wanted = np.array([index for _, index in pairs])
        return wanted, [uniforms(self.seed, pairs[0][0], wanted, v) for v in range(len(self.views))]

    def _colours(self, numbers: list[np.ndarray]) -> list[Colours]:
        return [draw_colours(u[:, FIRST_COLOUR_SLOT:], v) for u, v in zip(numbers, self.views)]

    def _crops(self, index: int, numbers: list[np.ndarray], broken: list[str]) -> list[Tensor]:
        """The crops of image `index`, or of the next one that can be read."""
        for after in range(MOST_BROKEN_IN_A_ROW):
            try:
                with self.images.open((index + after) % len(self.images)) as image:
                    width, height = image.size
                    boxes = [box_of(u, width, height, view) for u, view in zip(numbers, self.views)]
                    decoded = image.decode(self._least(width, height, boxes))
                break
            except BrokenImage as error:
                broken.append(str(error))
        else:
            raise BrokenImage(
                f"{MOST_BROKEN_IN_A_ROW} images in a row cannot be read, the last: {broken[-1]}"
            )
        shrunk = round(width / decoded.width)  # 2, 4 or 8 where a JPEG was decoded smaller
        if shrunk > 1:
            return [shrunk_crop(decoded, box, shrunk, view) for box, view in zip(boxes, self.views)]
        pixels = torch.from_numpy(np.array(decoded))
        return [resized_crop(pixels, box, view) for box, view in zip(boxes, self.views)]

    def _least(self, width: int, height: int, boxes: list[Box]) -> tuple[int, int] | None:
        """The least size to decode at, where each crop has at least twice the pixels of its view a side."""
        if not self.jpeg_draft:
            return None
        shrink = min(min(w, h) / view.size for (_, _, w, h), view in zip(boxes, self.views))
        shrink = max(shrink / 2, 1.0)
        return int(width / shrink), int(height / shrink)


def batches(views: Views, steps: StepBatches, *, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches of the steps, made ahead by `workers` processes (0: in this one)."""
    here = steps.batch_global // steps.world
    size = sum(3 * view.size**2 for view in views.views) * here * (4 if views.finish_here else 1)
    return load(
        views, steps, workers=workers, collate=as_it_is, batch_bytes=size, pin_memory=pin_memory, prefetch=2
    )


def default_workers(device: torch.device) -> int:
    """This rank's cores but one on a GPU, at most 16; one on a CPU, where the model takes the cores."""
    return min(16, max(1, cores_of_rank() - 1)) if device.type == "cuda" else 1


def colour_place(augment_on: str, workers: int, device: torch.device) -> tuple[bool, str]:
    """Whether `Views` does colour, blur and solarisation too, and where they run then, in words.

    "auto": on a GPU, without one in the workers, beside the step. `python -m pretrain.profile` times both.
    """
    by_views = augment_on == "workers" or (augment_on == "auto" and device.type == "cpu")
    if by_views and workers > 0:
        return by_views, "in the workers"
    return by_views, "on the GPU" if device.type == "cuda" and not by_views else "in the training process"


def as_it_is(batch: Any) -> Any:
    """What a dataset makes, for a loader that would put it together."""
    return batch
