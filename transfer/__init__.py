"""Measuring a self-supervised checkpoint: loading, evaluation, conversion to detectron2, the report."""

from typing import TYPE_CHECKING

from pretrain.common.package import __version__ as __version__
from pretrain.common.package import lazily

if TYPE_CHECKING:
    from pretrain.data.datasets import open_dataset
    from transfer.api import convert, evaluate, extract_features, linear_probe, read_results
    from transfer.checkpoints.backbone import Backbone, load_backbone
    from transfer.evaluation.protocol import load_protocol
    from transfer.evaluation.results import Result
    from transfer.evaluators.knn_vote import knn_evaluate

__all__ = [
    "Backbone", "Result", "convert", "evaluate", "extract_features", "knn_evaluate", "linear_probe",
    "load_backbone", "load_protocol", "open_dataset", "read_results",
]  # fmt: skip

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Backbone": "transfer.checkpoints.backbone",
        "Result": "transfer.evaluation.results",
        "convert": "transfer.api",
        "evaluate": "transfer.api",
        "extract_features": "transfer.api",
        "knn_evaluate": "transfer.evaluators.knn_vote",
        "linear_probe": "transfer.api",
        "load_backbone": "transfer.checkpoints.backbone",
        "load_protocol": "transfer.evaluation.protocol",
        "open_dataset": "pretrain.data.datasets",
        "read_results": "transfer.api",
    },
)
