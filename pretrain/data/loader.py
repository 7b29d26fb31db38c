"""Batches of augmented views for each step, the same for any number of workers.

Step s of a run has, on rank r of W, images r, r + W ... of slice s mod steps_per_epoch of the epoch's
permutation, a function of (seed, epoch) alone; one iteration spans all epochs, so that no epoch waits for
workers to start.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pretrain.common.machine import cores_of_rank
from pretrain.data.augment import (
    Colours,
    View,
    crop_box,
    draw_colours,
    finish,
    resized_crop,
    shrunk_crop,
    uniforms,
)
from pretrain.data.datasets import BrokenImage, ImageDataset

logger = logging.getLogger(__name__)

MOST_BROKEN_IN_A_ROW = 100
PARENT_LOOK_S = 5.0  # between two looks of a worker at the process it works for
FIRST_COLOUR_SLOT = 22  # the first 22 uniform numbers place the crop


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's views of one step."""

    views: list[Tensor]
    """N x S x S x 3 uint8 crops with `colours`, or N x 3 x S x S float32 finished ones without."""
    colours: list[Colours]
    broken: list[str]
    """Files that could not be read; the next readable image took their place."""

    def pin_memory(self) -> Batch:
        pinned = [v.pin_memory() for v in self.views]
        return Batch(views=pinned, colours=[c.pin_memory() for c in self.colours], broken=self.broken)


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
        epoch = pairs[0][0]
        wanted = np.array([index for _, index in pairs])
        crops = [torch.empty((len(pairs), v.size, v.size, 3), dtype=torch.uint8) for v in self.views]
        numbers = [uniforms(self.seed, epoch, wanted, v) for v in range(len(self.views))]
        broken: list[str] = []
        for n, index in enumerate(wanted):
            parts = self._crops(int(index), [u[n] for u in numbers], broken)
            for out, part in zip(crops, parts):
                out[n] = part
        colours = [draw_colours(u[:, FIRST_COLOUR_SLOT:], v) for u, v in zip(numbers, self.views)]
        if self.finish_here:
            crops = [finish(c, k, mean=self.mean, std=self.std) for c, k in zip(crops, colours)]
            colours = []
        return Batch(views=crops, colours=colours, broken=broken)

    def _crops(self, index: int, numbers: list[np.ndarray], broken: list[str]) -> list[Tensor]:
        """The crops of image `index`, or of the next one that can be read."""
        boxes: list[tuple[int, int, int, int]] = []
        full = (0, 0)

        def place_crops(size: tuple[int, int]) -> tuple[int, int]:
            nonlocal full
            full = size
            boxes[:] = [crop_box(u, *size, view) for u, view in zip(numbers, self.views)]
            shrink = min(min(w, h) / view.size for (_, _, w, h), view in zip(boxes, self.views))
            shrink = max(shrink / 2, 1.0) if self.jpeg_draft else 1.0
            return int(size[0] / shrink), int(size[1] / shrink)

        for after in range(MOST_BROKEN_IN_A_ROW):
            try:
                image = self.images.image((index + after) % len(self.images), least_size=place_crops)
                break
            except BrokenImage as error:
                broken.append(str(error))
        else:
            raise BrokenImage(
                f"{MOST_BROKEN_IN_A_ROW} images in a row cannot be read, the last: {broken[-1]}"
            )
        shrunk = round(full[0] / image.width)  # 2, 4 or 8 where a JPEG was decoded smaller
        if shrunk > 1:
            return [shrunk_crop(image, box, shrunk, view) for box, view in zip(boxes, self.views)]
        pixels = torch.from_numpy(np.array(image))
        return [resized_crop(pixels, box, view) for box, view in zip(boxes, self.views)]


def batches(views: Views, steps: StepBatches, *, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Batches of the steps, made ahead by `workers` processes (0: in this one)."""
    loader = DataLoader(
        views, batch_sampler=steps, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin_memory,
        prefetch_factor=2 if workers else None, worker_init_fn=set_up_worker,
    )  # fmt: skip
    return iter(loader)


def default_workers(device: torch.device) -> int:
    """This rank's cores but one on a GPU, at most 16; one on a CPU, where the model takes the cores."""
    return min(16, max(1, cores_of_rank() - 1)) if device.type == "cuda" else 1


def finishes_in_workers(augment_on: str, device: torch.device) -> bool:
    """Where colour, blur and solarisation run; "auto": on a GPU, without one in the workers, beside the step.

    `python -m pretrain.profile` times both.
    """
    return augment_on == "workers" or (augment_on == "auto" and device.type == "cpu")


def where_finished(in_workers: bool, workers: int, device: torch.device) -> str:
    """The same in words."""
    if in_workers and workers > 0:
        return "in the workers"
    return "on the GPU" if device.type == "cuda" and not in_workers else "in the training process"


def _as_it_is(batch: Any) -> Any:
    return batch


def set_up_worker(_: int) -> None:
    """Start of a DataLoader's worker: signals are for the main process, OpenCV takes one thread."""
    # A signal to the whole group (SLURM, Ctrl-C) must not take the workers from under the last step.
    for number in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_heed_parent, daemon=True).start()
    cv2.setNumThreads(0)  # the workers are the threads


def _heed_parent() -> None:
    """End this worker when the process it works for terminates it or is gone.

    Otherwise it would wait for ever where an error kept the loader from closing in order, or where that
    process was killed before torch's own watch over it had begun.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        heard = signal.sigtimedwait({signal.SIGTERM}, PARENT_LOOK_S)
        if heard is not None and heard.si_pid == parent.pid:
            break
    os._exit(0)
