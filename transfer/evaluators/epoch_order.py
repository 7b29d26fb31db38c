"""The order in which an epoch's training images are seen, as global batches: the same on every rank."""

from __future__ import annotations

import math

import numpy as np


def steps_of(n: int, batch: int, *, drop_last: bool = False) -> int:
    """Batches in one pass through `n` images; `drop_last`: whole ones only, but at least one."""
    return max(1, n // batch) if drop_last else math.ceil(n / batch)


def epoch_batches(
    n: int, batch: int, *, seed: int, epoch: int, steps: int | None = None, least: int = 1
) -> list[np.ndarray]:
    """A permutation of range(n) drawn from (seed, epoch), cut into batches.

    `steps` asks for another number of batches than one pass gives: fewer leave images out, for more further
    permutations follow. A last batch of fewer than `least` images, on which BatchNorm cannot be trained, is
    filled up from the epoch's first ones.
    """
    rng = np.random.default_rng([seed, epoch])
    once = math.ceil(n / batch)
    steps = once if steps is None else steps
    passes = 1 if steps == once else max(1, math.ceil(steps * batch / max(n, 1)))
    order = np.concatenate([rng.permutation(n) for _ in range(passes)])
    cut = [order[s * batch : (s + 1) * batch] for s in range(steps)]
    if len(cut[-1]) < least:
        cut[-1] = np.concatenate([cut[-1], np.resize(order, least - len(cut[-1]))])
    return cut
