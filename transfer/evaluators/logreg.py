"""Logistic regressions on features over a range of C, and the accuracy of the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pretrain.common.process_group import barrier, is_main
from pretrain.common.progress import Progress
from pretrain.data.transfer_sets import metric_of
from transfer.evaluation.features import Extractor
from transfer.evaluation.results import Result
from transfer.evaluators.heads import accuracies

if TYPE_CHECKING:
    from transfer.evaluation.context import Evaluation
    from transfer.evaluators.linear_protocol import LinearProtocol


def fit_logreg(
    x_ND: Tensor,
    labels_N: Tensor,
    classes: int,
    *,
    cost: float,
    iterations: int,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """W (D x C) and b (C) that minimise sum_n CE(x_n W + b, y_n) + |W|^2 / (2 cost), by L-BFGS.

    scikit-learn's LogisticRegression(C=cost) has the same minimum; `start` warm-starts. The bias is free.
    """
    n, width = x_ND.shape
    weight, bias = start if start is not None else (x_ND.new_zeros(width, classes), x_ND.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe",
        tolerance_grad=1e-6, tolerance_change=1e-9,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x_ND @ weight + bias, labels_N) + weight.square().sum() / (2 * cost * n)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def sweep(
    x_ND: Tensor, labels_N: Tensor, held_MD: Tensor, held_M: Tensor, classes: int, *,
    costs: Sequence[float], iterations: int, metric: str = "top1", bar: Progress | None = None,
) -> list[float]:  # fmt: skip
    """`metric` in percent on the held-out part for each cost, each fit started from the one before."""
    start, found = None, []
    for cost in costs:
        start = fit_logreg(x_ND, labels_N, classes, cost=cost, iterations=iterations, start=start)
        found.append(accuracies(held_MD @ start[0] + start[1], held_M)[metric])
        if bar is not None:
            bar.update(1, C=cost, **{metric: found[-1]})
    return found


def run_logreg(
    evaluation: Evaluation, extractor: Extractor, values: LinearProtocol, device: torch.device
) -> list[Result]:
    """Choose C on the held-out part by the data set's metric, refit on all training images, judge on test.

    All ranks must call; rank 0 alone fits.
    """
    from transfer.evaluators.linear_features import cached_parts

    train, held, test, _ = cached_parts(evaluation, extractor, values, device)
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
            weight, bias = fit_logreg(
                torch.cat([train.features_ND, held.features_ND]), torch.cat([train.labels_N, held.labels_N]),
                classes, cost=values.costs[chosen], iterations=values.iterations,
            )  # fmt: skip
            bar.update(1)
        extra = {
            "C": values.costs[chosen], f"held_out_{metric}": round(scores[chosen], 4), "augmentation": False,
            "precision": extractor.precision, "chosen_on": "held-out",
        }  # fmt: skip
        metrics = accuracies(test.features_ND @ weight + bias, test.labels_N)
        found = [evaluation.result(metrics, device, selection="held-out", settings=extra)]
    barrier()
    return found
