"""k-NN accuracy of a backbone while it is pretrained.

`python -m pretrain --hook transfer.hooks:knn` calls it on rank 0 every --hook-every-epochs.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.common.signals import StopSignals
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.network.model import build_backbone
from pretrain.settings import Settings
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation.features import Decoded, Extractor, image_batches, make_extractor
from transfer.evaluation.split_checks import check_pair
from transfer.evaluation.transforms import eval_transform
from transfer.evaluators.knn_vote import knn_evaluate

logger = logging.getLogger(__name__)

K, TEMPERATURE = 20, 0.07  # solo_knn@2
MOST_BANK, MOST_QUERIES = 100_000, 10_000  # images; ImageNet: 100 a class and 10 a class, a minute or two
BATCH = 128  # images a forward pass


def knn(backbone: nn.Module, settings: Settings) -> dict[str, float]:
    """knn_top1 and knn_top5 in percent: weighted 20-NN as in solo_knn@2 on the run's own data set.

    Training images are the bank, test images the queries, both as the finished weights will be evaluated on
    them: no augmentation, and `image_size`, mean and standard deviation of the settings. Of more than
    MOST_BANK or MOST_QUERIES images so many are taken, evenly spaced, the same at every call. Features come
    from a copy, so the backbone stays as it is; random states are put back.

    Only one rank may call. An image that cannot be read is left out; where nothing can be evaluated (no test
    images, features that are not finite, no memory left) or the run was told to stop, a warning is all: to
    look on must not end the run.
    """
    device = next(backbone.parameters()).device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            return _knn(backbone, settings, device)
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: no memory left, a worker was killed
        logger.warning("no k-NN of the running backbone: %s", error)
        return {}


def _knn(backbone: nn.Module, settings: Settings, device: torch.device) -> dict[str, float]:
    train, test = (open_dataset(settings.dataset, settings.data_dir, split) for split in ("train", "test"))
    check_pair(train, test)
    transform = eval_transform(
        native_size=train.native_size, image_size=settings.image_size,
        metadata={k: ",".join(map(str, getattr(settings, k))) for k in ("mean", "std")},
    )  # fmt: skip
    model = build_backbone(settings.arch, stem=settings.stem)  # whose BatchNorm is of no process group
    model.load_state_dict(backbone.state_dict())
    under_way = Backbone(model=model.eval(), arch=settings.arch, weights={})
    precision: Literal["float32", "auto"] = "float32" if settings.precision in ("float32", "tf32") else "auto"
    extractor = make_extractor(under_way, train, transform, device, precision, over_ranks=False)
    workers = 0 if settings.workers == 0 else None
    parts = []
    for images, most in ((train, MOST_BANK), (test, MOST_QUERIES)):
        found = _features(extractor, images, evenly_spaced(len(images), most), workers)
        if found is None:
            logger.warning("no k-NN of the running backbone: the run was told to stop")
            return {}
        parts.append(found)
    (bank, bank_labels), (queries, query_labels) = parts
    found_percent = knn_evaluate(
        bank, bank_labels, queries, query_labels, ks=[K], temperature=TEMPERATURE, device=device,
        over_ranks=False,
    )  # fmt: skip
    top1, top5 = found_percent[f"top1_k{K}"], found_percent[f"top5_k{K}"]
    logger.info(
        "k-NN of the running backbone: top-1 %.2f %% (%d of %d bank images, %d of %d queries)",
        top1, len(bank), len(train), len(queries), len(test),
    )  # fmt: skip
    return {"knn_top1": top1, "knn_top5": top5}


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """`most` of range(n) at equal distances, or all. Folders are sorted by class: each has its share."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(np.int64)


def _features(
    extractor: Extractor, images: ImageDataset, indices: np.ndarray, workers: int | None
) -> tuple[Tensor, np.ndarray] | None:
    """Features and labels of the images that can be read; None as soon as the run is told to stop."""
    batches = [indices[s : s + BATCH] for s in range(0, len(indices), BATCH)]
    rows: list[Tensor] = []
    labels: list[np.ndarray] = []
    for pixels, positions in image_batches(
        Decoded(images, extractor.transform), batches, extractor.transform, workers,
        on_broken=lambda *_: None,
    ):  # fmt: skip
        if StopSignals.heard is not None:
            return None
        if len(positions):
            rows.append(extractor(pixels).cpu())
            labels.append(images.labels_N[positions])
    return torch.cat(rows), np.concatenate(labels)
