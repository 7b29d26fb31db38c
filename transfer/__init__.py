"""Measuring a self-supervised checkpoint: loading, evaluation, conversion to detectron2, the report."""

from typing import TYPE_CHECKING

from pretrain.common.lazy import lazily
from pretrain.common.version import __version__ as __version__

if TYPE_CHECKING:
    from transfer.checkpoints.backbone import Backbone, load_backbone
    from transfer.conversion.layout import from_detectron2, to_detectron2
    from transfer.evaluation.protocol import load_protocol
    from transfer.evaluation.results import Result
    from transfer.evaluators.knn_vote import knn_evaluate

__all__ = [
    "Backbone", "Result", "from_detectron2", "knn_evaluate", "load_backbone", "load_protocol",
    "to_detectron2",
]  # fmt: skip

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Backbone": "transfer.checkpoints.backbone",
        "Result": "transfer.evaluation.results",
        "from_detectron2": "transfer.conversion.layout",
        "knn_evaluate": "transfer.evaluators.knn_vote",
        "load_backbone": "transfer.checkpoints.backbone",
        "load_protocol": "transfer.evaluation.protocol",
        "to_detectron2": "transfer.conversion.layout",
    },
)
