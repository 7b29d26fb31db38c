"""Accuracies in percent from the scores of classes.

N images, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def places(scores_NC: Tensor, labels_N: Tensor, counted_NC: Tensor | None = None) -> Tensor:
    """How many classes are placed before the true one, N: 0 where it is first.

    Equal scores: the smaller label first; NaN: last. A class that is not `counted` has no place: it is
    before no other, and where it is the true one the answer is C.
    """
    scores_NC = scores_NC.nan_to_num(nan=-math.inf)
    classes = scores_NC.shape[1]
    own_N1 = scores_NC.gather(1, labels_N[:, None])
    smaller = torch.arange(classes, device=scores_NC.device) < labels_N[:, None]
    before = (scores_NC > own_N1) | ((scores_NC == own_N1) & smaller)
    if counted_NC is None:
        return before.sum(1)
    own = counted_NC.gather(1, labels_N[:, None])[:, 0]
    return (before & counted_NC).sum(1).where(own, classes)


def percentages(place_N: Tensor, labels_N: Tensor, classes: int) -> dict[str, float]:
    """top1, top5 and the mean over classes of top-1, from `places`; classes without images do not count."""
    hit = (place_N < 1).double()
    total, count = (torch.zeros(classes, dtype=torch.float64, device=hit.device) for _ in range(2))
    total.scatter_add_(0, labels_N, hit)
    count.scatter_add_(0, labels_N, torch.ones_like(hit))
    seen = count > 0
    return {
        "top1": 100 * float(hit.mean()),
        "top5": 100 * float((place_N < 5).double().mean()),
        "mean_per_class": 100 * float((total[seen] / count[seen]).mean()),
    }


def accuracy(scores_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """top1, top5 and mean_per_class of the classes' scores."""
    return percentages(places(scores_NC, labels_N), labels_N, scores_NC.shape[1])
