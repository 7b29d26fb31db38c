"""Training, held-out and test features for probes that are trained on cached features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.data.datasets import ImageDataset
from pretrain.data.transfer_sets import validation_files
from transfer.evaluation.context import Evaluation
from transfer.evaluation.feature_scaling import mean_and_std, standardise, to_unit_length
from transfer.evaluation.features import Extractor
from transfer.evaluators.linear_protocol import LinearProtocol


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features of one part with their labels, on the device of the heads or memory-mapped."""

    features_ND: Tensor
    labels_N: Tensor


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


def scale(
    scaling: Literal["none", "standardise", "l2", "centred l2"], fit_ND: np.ndarray, *others: np.ndarray
) -> None:
    """Scale features in place as a protocol says; mean and standard deviation are those of `fit_ND`."""
    if scaling == "standardise":
        mean_D, std_D = mean_and_std(fit_ND)
        for x_ND in (fit_ND, *others):
            standardise(x_ND, mean_D, std_D)
    elif scaling in ("l2", "centred l2"):
        for x_ND in (fit_ND, *others) if scaling == "centred l2" else ():
            x_ND -= x_ND.mean(1, keepdims=True)
        for x_ND in (fit_ND, *others):
            to_unit_length(x_ND)


def cached_parts(
    evaluation: Evaluation, extractor: Extractor, values: LinearProtocol
) -> tuple[Labelled | None, Labelled | None, Labelled, np.ndarray]:
    """Training, held-out and test features, scaled, and the positions trained on.

    With augmentation there are no training features, and of the training images only the held-out ones are
    extracted.
    """
    train, test, device = evaluation.train, evaluation.test, extractor.device
    fit, aside = held_out_part(train, values, evaluation.seed or 0)

    def labelled(x_ND: np.ndarray, labels_N: np.ndarray) -> Labelled:
        return Labelled(
            features_ND=torch.from_numpy(x_ND).to(device), labels_N=torch.from_numpy(labels_N).to(device)
        )

    if values.augmentation:
        tested, *asides = evaluation.features(
            extractor, (test, None), *([(train, aside)] if len(aside) else [])
        )
        kept = [labelled(np.array(f.x_ND), train.labels_N[f.positions_N]) for f in asides]
        judged = labelled(np.array(tested.x_ND), test.labels_N[tested.positions_N])
        return None, kept[0] if kept else None, judged, fit
    # all of the training images: the same file that k-NN uses
    tested, every = evaluation.features(extractor, (test, None), (train, None))
    test_ND, test_labels_N = np.array(tested.x_ND), test.labels_N[tested.positions_N]
    row_N = np.full(len(train), -1)
    row_N[every.positions_N] = np.arange(len(every.positions_N))
    fit, aside = fit[row_N[fit] >= 0], aside[row_N[aside] >= 0]
    fit_ND, aside_ND = every.x_ND[row_N[fit]], every.x_ND[row_N[aside]]  # copies, unlike the cached file
    scale(values.scaling, fit_ND, aside_ND, test_ND)
    held = labelled(aside_ND, train.labels_N[aside]) if len(aside) else None
    return labelled(fit_ND, train.labels_N[fit]), held, labelled(test_ND, test_labels_N), fit
