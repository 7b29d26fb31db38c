"""`transfer knn`: k-nearest-neighbour accuracy of a backbone's features, for every k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.common.errors import UserError
from pretrain.common.progress import Progress
from pretrain.data.transfer_sets import metric_of
from pretrain.data.voc07 import refuse_voc07
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.context import Evaluation, judge_frozen, output_of, set_up
from transfer.evaluation.features import Extractor
from transfer.evaluation.pooled_features import LAST, stages_of
from transfer.evaluation.protocol import load_protocol, want
from transfer.evaluation.results import Clock, Result
from transfer.evaluation.transforms import ImageValues
from transfer.evaluators.knn_vote import knn_evaluate
from transfer.options.commands import parse
from transfer.options.evaluation import KnnSettings


@dataclass(frozen=True, kw_only=True)
class KnnProtocol(ImageValues):
    """The values of a k-NN protocol."""

    ks: tuple[int, ...]
    """Numbers of neighbours that vote, each with figures of its own."""
    temperature: float = 0.07
    """Of weighted votes: a neighbour of similarity s has the weight exp(s / temperature)."""
    vote: Literal["weighted", "majority"] = "weighted"
    """weighted: nearer neighbours count more (euclidean: 1 / distance); majority: each counts one."""
    metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    """How near two features are: cosine after both have length 1."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        super().__post_init__()
        each = bool(self.ks) and min(self.ks) >= 1 and len(set(self.ks)) == len(self.ks)
        want(each, "ks", self.ks, "at least one number of neighbours, each once and 1 or more")
        want(0 < self.temperature < math.inf, "temperature", self.temperature, "a number above 0")
        want(len(self.features) == 1, "features", self.features, "one set")
        stages_of(self.features)


def main(argv: list[str]) -> int:
    """`python -m transfer knn`."""
    evaluate(parse("knn", argv))
    return 0


def evaluate(settings: KnnSettings, backbone: Backbone | None = None) -> list[Result]:
    """The result of k-NN, written to OUTPUT; `backbone` in place of the file that the settings name."""
    with output_of(settings, "knn"):
        return _evaluate(settings, backbone)


def _evaluate(settings: KnnSettings, backbone: Backbone | None) -> list[Result]:
    protocol = load_protocol(settings.protocol, "knn")
    values = protocol.settings(KnnProtocol)
    refuse_voc07(settings.dataset)
    evaluation = set_up(settings, protocol, values, Clock(), task="knn", seed=None, backbone=backbone)
    train = evaluation.train
    if max(values.ks) > len(train):
        raise UserError(
            f"{protocol} needs {max(values.ks)} neighbours and {train.root} holds {len(train)} images"
        )
    if evaluation.backbone.model is None and values.features != LAST:
        raise UserError(
            f"{protocol} reads layers or tokens of a backbone; evaluate raw-pixels with dino_knn@2"
        )
    return judge_frozen(
        evaluation, lambda settled, extractor: _judge(settled, extractor, values), stages_of(values.features)
    )


def _judge(evaluation: Evaluation, extractor: Extractor, values: KnnProtocol) -> list[Result]:
    train, test = evaluation.train, evaluation.test
    bank, queries = evaluation.features(extractor, (train, None), (test, None))
    with Progress(len(train), label=f"neighbours of {len(test)} images", unit="training image") as bar:
        metrics = knn_evaluate(
            bank.x_ND, train.labels_N[bank.positions_N], queries.x_ND, test.labels_N[queries.positions_N],
            ks=values.ks, temperature=values.temperature, vote=values.vote, metric=values.metric,
            device=extractor.device, told=bar.update, per_class=metric_of(test.name) == "mean_per_class",
        )  # fmt: skip
    extra = {"bank": len(bank.x_ND), **dict(evaluation.protocol.values)}
    return [evaluation.result(metrics, extractor.device, settings=extra)]
