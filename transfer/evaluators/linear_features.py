"""Training, held-out and test features for probes that are trained on cached features."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.common.process_group import sent
from pretrain.data.datasets import ImageDataset
from pretrain.data.transfer_sets import validation_files
from transfer.evaluation.context import Evaluation
from transfer.evaluation.feature_scaling import Scaled, ScaledRows, scaling, unscaled
from transfer.evaluation.features import Extractor, Features
from transfer.evaluators.linear_protocol import LinearProtocol

logger = logging.getLogger(__name__)

GPU_SHARE = 0.5  # of a GPU's free memory, which features may take so that they need not be sent every epoch


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features of one part, N x D, with their labels."""

    features_ND: Tensor | ScaledRows
    labels_N: Tensor
    """On the device of the heads."""

    @classmethod
    def on(cls, device: torch.device, features: ScaledRows, labels_N: np.ndarray) -> Labelled:
        """For heads on `device`: the features too on a GPU with room for them, else read when asked for."""
        labels = torch.from_numpy(labels_N).to(device)
        if device.type != "cuda":
            return cls(features_ND=features, labels_N=labels)
        torch.cuda.empty_cache()  # what the extraction leaves is room too
        needed, free = 4 * math.prod(features.shape), torch.cuda.mem_get_info(device)[0]
        if needed <= GPU_SHARE * free:
            return cls(features_ND=features.on(device), labels_N=labels)
        logger.info(
            "%.1f GB of features are more than %g of the GPU's %.1f GB that are free: read batch by batch",
            needed / 1e9, GPU_SHARE, free / 1e9,
        )  # fmt: skip
        return cls(features_ND=features, labels_N=labels)

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, which: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        """Features B x D and labels B of some rows, on the labels' device."""
        device = self.labels_N.device
        place = which if isinstance(which, slice) else sent(which, device)
        if isinstance(self.features_ND, Tensor):
            return self.features_ND[place], self.labels_N[place]
        return sent(self.features_ND[which], device), self.labels_N[place]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All features and labels."""
        x = self.features_ND
        return x if isinstance(x, Tensor) else x.on(self.labels_N.device), self.labels_N


def held_out_part(train: ImageDataset, values: LinearProtocol, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images to train on, and of those kept aside as the protocol says."""
    if values.held_out == "published":
        names = validation_files(train.name, train.root)
        own = np.array([train.key(i) in names for i in range(len(train))], bool)
        if own.any():
            return np.flatnonzero(~own), np.flatnonzero(own)
    return held_out_split(
        train.labels_N, values.held_out_percent, seed, per_class=values.held_out == "per_class"
    )


def held_out_split(
    labels_N: np.ndarray, percent: float, seed: int, *, per_class: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on, and `percent` of each class (or of all) kept aside: rounded, never all of it."""
    if percent == 0:
        return np.arange(len(labels_N)), np.arange(0)
    rng = np.random.default_rng([seed, 77])
    aside = []
    for label in np.unique(labels_N) if per_class else [None]:
        members = np.flatnonzero(labels_N == label) if per_class else np.arange(len(labels_N))
        count = min(max(1, round(len(members) * percent / 100)), len(members) - 1)
        aside.append(rng.permutation(members)[:count])
    kept = np.sort(np.concatenate(aside))
    return np.setdiff1d(np.arange(len(labels_N)), kept), kept


def cached_parts(
    evaluation: Evaluation, extractor: Extractor, values: LinearProtocol
) -> tuple[Labelled | None, Labelled | None, Labelled, np.ndarray]:
    """Training, held-out and test features, scaled, and the positions trained on.

    With augmentation there are no training features, and of the training images only the held-out ones are
    extracted.
    """
    train, test, device = evaluation.train, evaluation.test, extractor.device
    fit, aside = held_out_part(train, values, evaluation.seed or 0)

    def part(
        data: ImageDataset, found: Features, rows_N: np.ndarray | None = None, scaled: Scaled = unscaled
    ) -> Labelled:
        rows_N = np.arange(len(found.x_ND)) if rows_N is None else rows_N
        features = ScaledRows(x_ND=found.x_ND, rows_N=rows_N, scaled=scaled)
        return Labelled.on(device, features, data.labels_N[found.positions_N[rows_N]])

    if values.augmentation:
        tested, *asides = evaluation.features(
            extractor, (test, None), *([(train, aside)] if len(aside) else [])
        )
        kept = [part(train, found) for found in asides]
        return None, kept[0] if kept else None, part(test, tested), fit
    # all of the training images: the same file that k-NN uses
    tested, trained = evaluation.features(extractor, (test, None), (train, None))
    fit_N, aside_N = (np.flatnonzero(np.isin(trained.positions_N, chosen)) for chosen in (fit, aside))
    scaled = scaling(values.scaling, trained.x_ND, fit_N)
    held = part(train, trained, aside_N, scaled) if len(aside_N) else None
    judged = part(test, tested, scaled=scaled)
    return part(train, trained, fit_N, scaled), held, judged, trained.positions_N[fit_N]
