"""Images per second of the data loader with W workers, beside one."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.augment import six_views
from benchmarks.harness import Comparison, timing
from benchmarks.images import natural_images
from pretrain.common.machine import cores
from pretrain.views.loader import StepBatches, Views, batches

TITLE = "The data loader: W workers beside one, six crops, everything on the CPU"
IMAGES, BATCH = 64, 16


def measure(quick: bool) -> list[Comparison]:
    """W = 2, 4 … up to the cores there are; 0.85 W is wanted."""
    counts = [w for w in (2, 4, 8, 16) if w <= cores()] or [2]
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        views = six_views(natural_images(Path(folder), IMAGES), finish_here=True)
        for workers in counts[:1] if quick else counts:
            times = in_turns(views, workers, turns=2 if quick else 5, taken=4 if quick else 12)
            comparisons.append(
                Comparison(
                    case=f"{workers} workers on {cores()} cores",
                    reference=timing(times[1]), ours=timing(times[workers]),
                    target_speedup=None if quick else 0.85 * workers,
                )
            )  # fmt: skip
    return comparisons


def in_turns(views: Views, workers: int, *, turns: int, taken: int) -> dict[int, list[float]]:
    """Seconds by number of workers; one loader at a time, as two that live would share the cores."""
    seconds: dict[int, list[float]] = {1: [], workers: []}
    for turn in range(turns):
        for count in (1, workers) if turn % 2 == 0 else (workers, 1):
            seconds[count].append(seconds_of(views, count, taken))
    return seconds


def seconds_of(views: Views, workers: int, taken: int) -> float:
    """Time `taken` batches of a loader past its start, which never ends by itself; then close it."""
    steps = StepBatches(IMAGES, batch_global=BATCH, rank=0, world=1, seed=0, start=0, stop=10**6)
    loader = batches(views, steps, workers=workers)
    for _ in range(2 * workers + 1):
        next(loader)
    start = time.perf_counter()
    for _ in range(taken):
        next(loader)
    seconds = time.perf_counter() - start
    del loader  # torch has no other way to end the workers
    return seconds
