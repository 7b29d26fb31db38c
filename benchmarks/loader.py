"""Images per second of the data loader with W workers, beside one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.augment import six_views
from benchmarks.harness import Comparison, Step, interleave
from benchmarks.images import natural_images
from pretrain.loader import Batch, StepBatches, batches
from pretrain.machine import cores

TITLE = "The data loader: W workers beside one, six crops, everything on the CPU"
IMAGES, BATCH = 64, 16


def measure(quick: bool) -> list[Comparison]:
    """W = 2, 4 … up to the cores there are; 0.85 W is wanted."""
    counts = [w for w in (2, 4, 8, 16) if w <= cores()] or [2]
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        views = six_views(natural_images(Path(folder), IMAGES), finish_here=True)

        def running(workers: int) -> Step:
            """A loader that never ends, past its start; a call takes 4 batches for each worker's share."""
            steps = StepBatches(IMAGES, batch_global=BATCH, rank=0, world=1, seed=0, start=0, stop=10**6)
            loader: Iterator[Batch] = batches(views, steps, workers=workers)
            for _ in range(2 * workers + 1):
                next(loader)
            return lambda: [next(loader) for _ in range(4 if quick else 12)]

        for workers in counts[:1] if quick else counts:
            # One loader at a time: both in turns would share the cores.
            one = interleave({"one": running(1)}, repeats=2 if quick else 5)["one"]
            many = interleave({"many": running(workers)}, repeats=2 if quick else 5)["many"]
            comparisons.append(
                Comparison(
                    case=f"{workers} workers on {cores()} cores", reference=one, ours=many,
                    target_speedup=None if quick else 0.85 * workers,
                )
            )  # fmt: skip
    return comparisons
