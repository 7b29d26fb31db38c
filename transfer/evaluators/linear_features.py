"""Training, held-out and test features for probes that are trained on cached features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.evaluation.context import Evaluation
from transfer.evaluation.feature_scaling import mean_and_std, standardise, to_unit_length
from transfer.evaluation.features import Extractor, extract
from transfer.evaluators.linear_protocol import LinearProtocol


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features of one part with their labels, on the device of the heads or memory-mapped."""

    features_ND: Tensor
    labels_N: Tensor


def held_out_split(labels_N: np.ndarray, percent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on, and `percent` of each class (rounded, never all of it) kept aside."""
    if percent == 0:
        return np.arange(len(labels_N)), np.arange(0)
    rng = np.random.default_rng([seed, 77])
    aside = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        count = min(max(1, round(len(members) * percent / 100)), len(members) - 1)
        aside.append(rng.permutation(members)[:count])
    kept = np.sort(np.concatenate(aside))
    return np.setdiff1d(np.arange(len(labels_N)), kept), kept


def cached_parts(
    evaluation: Evaluation, extractor: Extractor, values: LinearProtocol, device: torch.device
) -> tuple[Labelled | None, Labelled | None, Labelled, np.ndarray]:
    """Training, held-out and test features, scaled, and the positions trained on.

    With augmentation there are no training features, and of the training images only the held-out ones are
    extracted.
    """
    settings, train, test = evaluation.settings, evaluation.train, evaluation.test
    fit, aside = held_out_split(train.labels_N, values.held_out_percent, evaluation.seed or 0)

    def features(part: Any, indices: np.ndarray | None) -> np.ndarray:
        return extract(
            extractor, evaluation.backbone, part, cache=settings.cache, indices=indices,
            batch_size=settings.batch_size, workers=settings.workers,
            progress=settings.output / "progress.json",
        )  # fmt: skip

    def labelled(x_ND: np.ndarray, labels_N: np.ndarray) -> Labelled:
        return Labelled(
            features_ND=torch.from_numpy(x_ND).to(device), labels_N=torch.from_numpy(labels_N).to(device)
        )

    test_ND = np.array(features(test, None))
    if values.augmentation:
        held = labelled(np.array(features(train, aside)), train.labels_N[aside]) if len(aside) else None
        return None, held, labelled(test_ND, test.labels_N), fit
    all_ND = features(train, None)  # all of them: the same file that k-NN uses
    fit_ND, aside_ND = all_ND[fit], all_ND[aside]  # copies, which the cached file is not
    if values.scaling == "standardise":
        mean_D, std_D = mean_and_std(fit_ND)
        for x_ND in (fit_ND, aside_ND, test_ND):
            standardise(x_ND, mean_D, std_D)
    elif values.scaling == "l2":
        for x_ND in (fit_ND, aside_ND, test_ND):
            to_unit_length(x_ND, least=1e-12)
    held = labelled(aside_ND, train.labels_N[aside]) if len(aside) else None
    return labelled(fit_ND, train.labels_N[fit]), held, labelled(test_ND, test.labels_N), fit
