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
STOP = 1e-8
"""The share at which a fit is good enough to stop."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A logistic regression: scores are x W + b."""

    weight_DC: Tensor
    bias_C: Tensor
    objective: float
    """sum_n CE(x_n W + b, y_n) + |W|^2 / (2 cost)."""
    gap: float
    """At most about so much is the objective above its minimum."""
    iterations: int

    @property
    def converged(self) -> bool:
        """Whether the objective is within a share of GAP of its minimum."""
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
    intercept: bool = True,
) -> Fit:
    """W (D x C) and b (C) that minimise sum_n CE(x_n W + b, y_n) + |W|^2 / (2 cost), by L-BFGS in float64;
    without `intercept` b is 0.

    scikit-learn's LogisticRegression(C=cost) has the same minimum; `start` warm-starts. The bias is free, so
    the steps are taken on centred features, each scaled by its curvature, with the penalty of the features as
    they are: the same minimum, reached in far fewer steps. The objective is strongly convex in W with modulus
    1 / cost, so it is at most cost |gradient|^2 / 2 above its minimum over W; the bias adds what a Newton
    step on it would still gain. Works on the device of `x_ND`; SciPy steps.
    """
    from scipy.optimize import minimize

    x_ND = x_ND.double()
    mean_D = x_ND.mean(0) if intercept else torch.zeros_like(x_ND[0])
    # What a feature's own curvature is about: that of the data, at most N var / 4, and the penalty's.
    scale_D = (x_ND.var(0, correction=0) + 4 / (cost * len(x_ND))).sqrt()
    z_ND = (x_ND - mean_D) / scale_D
    width = z_ND.shape[1]
    last = {"objective": math.inf, "gap": math.inf}

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).to(z_ND.device).view(width + 1, classes)
        scaled_DC, bias_C = parameters[:-1], parameters[-1]
        weight_DC = scaled_DC / scale_D[:, None]
        log_p = (z_ND @ scaled_DC + bias_C).log_softmax(1)
        loss = -log_p.gather(1, labels_N[:, None]).sum() + weight_DC.square().sum() / (2 * cost)
        p_NC = log_p.exp()
        curvature_C = (p_NC * (1 - p_NC)).sum(0).clamp_min(1e-300)
        delta = p_NC.scatter_add_(1, labels_N[:, None], torch.full_like(p_NC[:, :1], -1.0))
        scaled_gradient = z_ND.T @ delta + weight_DC / scale_D[:, None] / cost
        bias_gradient = delta.sum(0) if intercept else torch.zeros_like(bias_C)
        gap = cost / 2 * (scaled_gradient * scale_D[:, None]).square().sum()
        gap = gap + (bias_gradient.square() / curvature_C).sum()
        last.update(objective=float(loss), gap=float(gap))
        gradient = torch.cat([scaled_gradient, bias_gradient[None]])
        return last["objective"], gradient.flatten().cpu().numpy()

    def close_enough(_: np.ndarray) -> None:
        if last["gap"] <= STOP * last["objective"]:
            raise StopIteration

    first = np.zeros((width + 1, classes))
    if start is not None:
        weight_DC, bias_C = (part.to(z_ND) for part in start)
        first[:-1] = (weight_DC * scale_D[:, None]).cpu().numpy()
        first[-1] = (bias_C + mean_D @ weight_DC).cpu().numpy()
    # ftol and gtol 0: the gap alone says when to stop; slow progress, as with a large cost, does not
    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 10, "ftol": 0.0, "gtol": 0.0}
    found = minimize(
        objective, first.ravel(), jac=True, method="L-BFGS-B", callback=close_enough, options=options
    )
    objective(found.x)  # of the point that is returned, not of the last one tried
    parameters = torch.from_numpy(found.x).to(z_ND.device).view(width + 1, classes)
    weight_DC = parameters[:-1] / scale_D[:, None]
    return Fit(
        weight_DC=weight_DC, bias_C=parameters[-1] - mean_D @ weight_DC, objective=last["objective"],
        gap=last["gap"], iterations=int(found.nit),
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
    """Choose C on the held-out part by the data set's metric, refit on all training images, evaluate on test;
    a single C is fitted on them at once.

    All ranks must call; rank 0 alone fits.
    """
    from transfer.evaluators.linear_features import cached_parts

    train, held, test, _ = cached_parts(evaluation, extractor, values)
    assert train is not None and (held is not None or len(values.costs) == 1)
    found: list[Result] = []
    if is_main():
        classes = len(evaluation.train.classes)
        metric = metric_of(evaluation.test.name)
        file = evaluation.settings.output / "progress.json"
        with Progress(len(values.costs) + 1, label="logistic regression", unit="fit", file=file) as bar:
            (x_ND, labels_N), chosen, choice = train.whole(), 0, {}
            if held is not None:
                held_MD, held_M = held.whole()
                scores = sweep(
                    x_ND, labels_N, held_MD, held_M, classes, costs=values.costs,
                    iterations=values.iterations, metric=metric, bar=bar,
                )  # fmt: skip
                chosen = max(range(len(scores)), key=lambda i: (scores[i], -i))
                x_ND, labels_N = torch.cat([x_ND, held_MD]), torch.cat([labels_N, held_M])
                choice = {f"held_out_{metric}": round(scores[chosen], 4), "chosen_on": "held-out"}
            fit = fit_logreg(
                x_ND, labels_N, classes, cost=values.costs[chosen], iterations=values.iterations,
                intercept=values.intercept,
            )  # fmt: skip
            bar.update(1)
        extra = {"C": values.costs[chosen], "augmentation": False, **choice}
        extra |= {"iterations": fit.iterations, "converged": fit.converged}
        warnings = []
        if not fit.converged:
            warnings.append(
                f"not converged: {fit.iterations} iterations left the objective up to {fit.gap:.2g} above "
                f"its minimum, of {fit.objective:.4g}; copy {evaluation.protocol} into a file of your own "
                "with more iterations"
            )
            logger.warning("%s", warnings[0])
        test_MD, test_M = test.whole()
        metrics = accuracy(fit.scores(test_MD), test_M)
        found = [
            evaluation.result(
                metrics,
                extractor.device,
                selection="held-out" if choice else "last",
                settings=extra,
                warnings=warnings,
            )
        ]
    barrier()
    return found
