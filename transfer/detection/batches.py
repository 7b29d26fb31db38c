"""Training batches that go on where they stopped.

The order of images and their augmentation follow from (seed, position) alone, so a resumed run sees what an
undisturbed one sees, whatever the number of loader workers.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import DataLoader, Dataset

from pretrain.data.workers import set_up_worker
from transfer.detection.semantic.mapper import mapper_of


def seed_of(seed: int, iteration: int, rank: int) -> int:
    """The seed of everything random in one iteration on one rank, 32 bits."""
    return int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1)[0])


def index_batches(
    wide_N: Sequence[bool], *, seed: int, rank: int, world_size: int, batch_per_rank: int, by_shape: bool,
    repeats_N: np.ndarray | None = None,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Endless batches of (position, index) for one rank, a function of the arguments alone.

    Positions count the images of one stream of permutations (the first of seed, 0; the next of seed, 1 …)
    that the ranks share in turn, as detectron2's TrainingSampler; `by_shape` fills a batch with wide or with
    tall images only, as its AspectRatioGroupedDataset. `repeats_N`: how often an epoch holds each image, the
    fraction by chance, as its RepeatFactorTrainingSampler.
    """
    buckets: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    position = 0
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(wide_N) if repeats_N is None else _repeated(repeats_N, rng))
        for index in order.tolist():
            if position % world_size == rank:
                bucket = buckets[int(wide_N[index]) if by_shape else 0]
                bucket.append((position, index))
                if len(bucket) == batch_per_rank:
                    yield list(bucket)
                    bucket.clear()
            position += 1


def _repeated(repeats_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    whole_N = np.floor(repeats_N)
    count_N = whole_N + (rng.random(len(repeats_N)) < repeats_N - whole_N)
    return np.repeat(np.arange(len(repeats_N)), count_N.astype(int))


class _Positioned(Dataset):
    """Records whose augmentation is seeded by (seed, position)."""

    def __init__(self, records: list[dict[str, Any]], mapper: Any, seed: int) -> None:
        self.records, self.mapper, self.seed = DatasetFromList(records, copy=False), mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, where: tuple[int, int]) -> dict[str, Any]:
        position, index = where
        words = np.random.SeedSequence((self.seed, position)).generate_state(4)
        earlier, earlier_plain = np.random.get_state(), random.getstate()
        np.random.seed(words)  # detectron2's augmentations draw from numpy's global generator
        random.seed(int(words[0]))
        try:
            return self.mapper(self.records[index])
        finally:
            np.random.set_state(earlier)
            random.setstate(earlier_plain)


class _From:
    """A batch sampler: `index_batches` from the batch numbered `start` on."""

    def __init__(self, wide_N: Sequence[bool], start: int, **kwargs: Any) -> None:
        self.wide_N, self.start, self.kwargs = wide_N, start, kwargs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(index_batches(self.wide_N, **self.kwargs), self.start, None)


def train_loader(
    cfg: CfgNode, *, seed: int, rank: int, world_size: int, start: int = 0, num_workers: int | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Endless training batches of this rank, from iteration `start` on."""
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
    )
    repeats = None
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeats = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        ).numpy()
    sampler = _From(
        [r["width"] > r["height"] for r in records],
        start,
        seed=seed,
        rank=rank,
        world_size=world_size,
        batch_per_rank=cfg.SOLVER.IMS_PER_BATCH // world_size,
        by_shape=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        repeats_N=repeats,
    )
    workers = cfg.DATALOADER.NUM_WORKERS if num_workers is None else num_workers
    return iter(DataLoader(
        _Positioned(records, mapper_of(cfg, train=True), seed),
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_set_up_worker if workers else None,
    ))  # fmt: skip


def _set_up_worker(number: int) -> None:
    set_up_worker(number)
    torch.set_num_threads(1)
