"""Logistic regressions on features over a range of C, and the accuracy of the chosen one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pretrain.common.process_group import barrier, is_main
from pretrain.common.progress import Progress
from pretrain.data.transfer_sets import metric_of
from transfer.evaluation.accuracy import accuracy
from transfer.evaluation.features import Extractor
from transfer.evaluation.results import Result

if TYPE_CHECKING:
    from transfer.evaluation.context import Evaluation
    from transfer.evaluators.linear_protocol import LinearProtocol


logger = logging.getLogger(__name__)

GAP = 1e-3
"""Share of a fit's objective by which it may lie above the minimum and count as converged."""
STOP = 1e-4
"""The share at which a fit is good enough to stop."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A logistic regression: scores are x W + b."""

    weight_DC: Tensor
    bias_C: Tensor
    objective: float
    """sum_n CE(x_n W + b, y_n) + |W|^2 / (2 cost)."""
    gap: float
    """At most so much is the objective above its minimum (but for the bias, which is free)."""
    iterations: int

    @property
    def converged(self) -> bool:
        return self.gap <= GAP * self.objective

    def scores(self, x_ND: Tensor) -> Tensor:
        """N x C float64."""
        return x_ND.double() @ self.weight_DC + self.bias_C


def fit_logreg(
    x_ND: Tensor,
    labels_N: Tensor,
    classes: int,
    *,
    cost: float,
    iterations: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> Fit:
    """W (D x C) and b (C) that minimise sum_n CE(x_n W + b, y_n) + |W|^2 / (2 cost), by L-BFGS in float64.

    scikit-learn's LogisticRegression(C=cost) has the same minimum; `start` warm-starts. The bias is free.
    The objective is strongly convex in W with modulus 1 / cost, so it is at most cost |gradient|^2 / 2 above
    its minimum: the gap by which convergence is told. Works on the device of `x_ND`; SciPy steps.
    """
    from scipy.optimize import minimize

    x_ND = x_ND.double()
    width = x_ND.shape[1]
    penalty = 1 / (2 * cost)
    last = {"objective": math.inf, "gap": math.inf}

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).to(x_ND.device).view(width + 1, classes)
        weight, bias = parameters[:-1], parameters[-1]
        log_p = (x_ND @ weight + bias).log_softmax(1)
        loss = -log_p.gather(1, labels_N[:, None]).sum() + penalty * weight.square().sum()
        delta = log_p.exp()
        delta.scatter_add_(1, labels_N[:, None], torch.full_like(delta[:, :1], -1.0))
        gradient = torch.cat([x_ND.T @ delta + 2 * penalty * weight, delta.sum(0, keepdim=True)])
        last.update(objective=float(loss), gap=float(gradient.square().sum()) * cost / 2)
        return last["objective"], gradient.flatten().cpu().numpy()

    def close_enough(_: np.ndarray) -> None:
        if last["gap"] <= STOP * last["objective"]:
            raise StopIteration

    first = np.zeros((width + 1, classes))
    if start is not None:
        first[:-1], first[-1] = (part.detach().cpu().numpy() for part in start)
    # ftol and gtol 0: the gap alone says when to stop; slow progress, as with a large cost, does not
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 10, "ftol": 0.0, "gtol": 0.0}
    found = minimize(
        objective, first.ravel(), jac=True, method="L-BFGS-B", callback=close_enough, options=options
    )
    parameters = torch.from_numpy(found.x).to(x_ND.device).view(width + 1, classes)
    return Fit(
        weight_DC=parameters[:-1], bias_C=parameters[-1], objective=float(found.fun),
        gap=float(np.square(found.jac).sum()) * cost / 2, iterations=int(found.nit),
    )  # fmt: skip


def sweep(
    x_ND: Tensor, labels_N: Tensor, held_MD: Tensor, held_M: Tensor, classes: int, *,
    costs: Sequence[float], iterations: int, metric: str = "top1", bar: Progress | None = None,
) -> list[float]:  # fmt: skip
    """`metric` in percent on the held-out part for each cost, each fit started from the one before."""
    start, found = None, []
    for cost in costs:
        fit = fit_logreg(x_ND, labels_N, classes, cost=cost, iterations=iterations, start=start)
        start = (fit.weight_DC, fit.bias_C)
        found.append(accuracy(fit.scores(held_MD), held_M)[metric])
        if bar is not None:
            bar.update(1, C=cost, **{metric: found[-1]})
    return found


def run_logreg(evaluation: Evaluation, extractor: Extractor, values: LinearProtocol) -> list[Result]:
    """Choose C on the held-out part by the data set's metric, refit on all training images, judge on test.

    All ranks must call; rank 0 alone fits.
    """
    from transfer.evaluators.linear_features import cached_parts

    train, held, test, _ = cached_parts(evaluation, extractor, values)
    assert train is not None and held is not None
    found: list[Result] = []
    if is_main():
        classes = len(evaluation.train.classes)
        metric = metric_of(evaluation.test.name)
        file = evaluation.settings.output / "progress.json"
        with Progress(len(values.costs) + 1, label="logistic regression", unit="fit", file=file) as bar:
            scores = sweep(
                train.features_ND, train.labels_N, held.features_ND, held.labels_N, classes,
                costs=values.costs, iterations=values.iterations, metric=metric, bar=bar,
            )  # fmt: skip
            chosen = max(range(len(scores)), key=lambda i: (scores[i], -i))
            fit = fit_logreg(
                torch.cat([train.features_ND, held.features_ND]), torch.cat([train.labels_N, held.labels_N]),
                classes, cost=values.costs[chosen], iterations=values.iterations,
            )  # fmt: skip
            bar.update(1)
        extra = {
            "C": values.costs[chosen], f"held_out_{metric}": round(scores[chosen], 4), "augmentation": False,
            "chosen_on": "held-out",
        }  # fmt: skip
        extra |= {"iterations": fit.iterations, "converged": fit.converged}
        warnings = []
        if not fit.converged:
            warnings.append(
                f"not converged: {fit.iterations} iterations left the objective up to {fit.gap:.2g} above "
                f"its minimum, of {fit.objective:.4g}; copy {evaluation.protocol} into a file of your own "
                "with more iterations"
            )
            logger.warning("%s", warnings[0])
        metrics = accuracy(fit.scores(test.features_ND), test.labels_N)
        found = [
            evaluation.result(
                metrics, extractor.device, selection="held-out", settings=extra, warnings=warnings
            )
        ]
    barrier()
    return found
