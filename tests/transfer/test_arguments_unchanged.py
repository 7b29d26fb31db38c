"""No public function changes what it is given: arrays and tensors are compared with copies made before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from transfer.evaluation.accuracy import accuracy, percentages, places
from transfer.evaluation.feature_scaling import mean_and_std
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators.heads import HeadGrid
from transfer.evaluators.knn_vote import knn_evaluate
from transfer.evaluators.linear_features import held_out_split
from transfer.evaluators.logreg import fit_logreg, sweep
from transfer.evaluators.nearest import nearest
from transfer.evaluators.svm import average_precision, fit_class, fit_class_low_shot, unit_length

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 4)), np.arange(60) % 3
X32 = X.astype(np.float32)
T, L = torch.from_numpy(X), torch.from_numpy(Y)
BINARY = (Y == 1).astype(np.int64)
SVM = {"costs": [1.0], "iterations": 50, "seed": 0}
CALLS: dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]] = {
    **{
        f"knn_evaluate {metric} {x.dtype} {kind.__name__}": (
            knn_evaluate, [kind(x), kind(Y), kind(x[:20]), kind(Y[:20])], {"ks": [5], "metric": metric}
        )
        for metric in ("cosine", "dot", "euclidean") for x in (X, X32)
        for kind in (np.array, torch.from_numpy)
    },
    **{
        f"nearest {metric}": (nearest, [T, T[:9], 3], {"metric": metric, "device": torch.device("cpu")})
        for metric in ("cosine", "dot", "euclidean")
    },
    "fit_logreg": (fit_logreg, [T, L, 3], {"cost": 1.0, "iterations": 20, "start": (T[:4, :3], T[0, :3])}),
    "sweep": (sweep, [T, L, T, L, 3], {"costs": [1.0, 2.0], "iterations": 9}),
    "fit_class": (fit_class, [X, BINARY, X, BINARY], {"folds": 2, **SVM}),
    "fit_class_low_shot": (
        fit_class_low_shot, [X, BINARY, X, BINARY],
        {"classes": 3, "label": 1, "shots": [2], "samples": 2, **SVM},
    ),
    "average_precision": (average_precision, [BINARY, X[:, 0]], {}),
    "unit_length": (unit_length, [X], {}),
    "mean_and_std": (mean_and_std, [X, Y], {}),
    "held_out_split": (held_out_split, [Y, 10, 0], {}),
    "places": (places, [T, L, T > 0], {}),
    "percentages": (percentages, [L, L, 4], {}),
    "accuracy": (accuracy, [T, L], {}),
    "HeadGrid.step": (HeadGrid(4, 3, rates=[0.1], decays=[0.1]).step, [T.float(), L], {"factor": 1.0}),
    "EvalTransform.normalise": (EvalTransform(size=4).normalise, [torch.ones(2, 3, 4, 4).byte()], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_arguments_stay_as_they_are(name: str) -> None:
    function, arguments, options = CALLS[name]
    before = copy.deepcopy((arguments, options))
    function(*arguments, **options)
    for was, given in zip(flat(before), flat((arguments, options)), strict=True):
        np.testing.assert_array_equal(np.asarray(was), np.asarray(given))


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return flat(list(value.values()))
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, (list, tuple)) else [value]


def test_the_bank_of_squares_is_no_more() -> None:
    # Squared in place, the bank [1, 2, 10, 11] would be [1, 4, 100, 121] and the query 10 a 0 (nearest: 4).
    bank, labels = np.array([[1.0], [2.0], [10.0], [11.0]]), np.array([0, 0, 1, 1])
    for _ in range(2):
        got = knn_evaluate(
            bank, labels, np.array([[2.0], [10.0]]), np.array([0, 1]), ks=[1], metric="euclidean"
        )
        assert got["top1_k1"] == 100
    assert bank[:, 0].tolist() == [1, 2, 10, 11]
