"""What notebooks and scripts call: features, probes and whole evaluations, of files or of any module."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.common.process_group import local_device
from pretrain.data.datasets import ImageDataset
from transfer.checkpoints.backbone import Backbone, backbone_of_module, load_backbone
from transfer.conversion import convert as conversion
from transfer.evaluation import results
from transfer.evaluation.feature_scaling import ScaledRows, scaling
from transfer.evaluation.features import extract, make_extractor
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Result
from transfer.evaluation.transforms import ImageValues, eval_transform
from transfer.evaluators import knn, linear, semisup
from transfer.evaluators.linear_features import Labelled, held_out_split
from transfer.evaluators.linear_protocol import LinearProtocol
from transfer.options.commands import SETTINGS
from transfer.options.weights import ConvertSettings

EVALUATORS: dict[str, Callable[[Any, Backbone | None], list[Result]]] = {
    "knn": knn.evaluate,
    "linear": linear.evaluate,
    "semisup": semisup.evaluate,
}


def extract_features(
    network: Backbone | nn.Module,
    images: ImageDataset,
    *,
    image_size: int | None = None,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
) -> np.ndarray:
    """Features of every image in order, N x D float32; `images.labels_N` are the labels.

    `images` come from `open_dataset`. They are resized and cropped as the field evaluates ImageNet (256,
    224), small ones (CIFAR) taken whole, `image_size` in px changing either; normalised by the backbone's own
    mean and std, ImageNet's for a module. `precision` auto is bfloat16 where it agrees with float32. With
    `cache_dir` the features are kept there and read back the next time. Raises ValueError for an image that
    cannot be read and for features that are not finite.
    """
    backbone = _backbone(network)
    transform = eval_transform(
        ImageValues(), native_size=images.native_size, image_size=image_size, metadata=backbone.metadata
    )
    extractor = make_extractor(backbone, images, transform, local_device(), precision)

    def run(cache: str | Path) -> np.ndarray:
        return extract(extractor, backbone, images, cache=Path(cache), batch_size=batch_size, workers=workers)

    if cache_dir is not None:
        return run(cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        return np.array(run(folder))


def linear_probe(
    train_ND: np.ndarray | Tensor,
    train_labels_N: np.ndarray | Tensor,
    test_MD: np.ndarray | Tensor,
    test_labels_M: np.ndarray | Tensor,
    *,
    protocol: str = "cached_linear@1",
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, float]:
    """top1, top5 and mean_per_class in percent of the best linear head on given features.

    `protocol` is one that trains heads without augmentation (`intl-transfer protocols` lists them): its grid
    of learning rates and weight decays is trained at once, and the head that is best on its held-out share of
    the training features is reported; with a single head nothing is held out. Labels count from 0.
    Nothing that is given is changed. Raises ValueError for another kind of protocol.
    """
    loaded = load_protocol(protocol, "linear")
    values = loaded.settings(LinearProtocol)
    if values.method != "heads" or values.augmentation:
        raise UserError(f"protocol {loaded}: wanted one of heads on cached features, such as cached_linear@1")
    device = local_device() if device is None else torch.device(device)
    labels, test_labels = (_on_cpu(x, np.int64) for x in (train_labels_N, test_labels_M))
    fit, aside = held_out_split(labels, values.held_out_percent, seed)
    train_ND, test_MD = (_on_cpu(x, np.float32) for x in (train_ND, test_MD))
    scaled = scaling(values.scaling, train_ND, fit)
    train, held, test = (
        Labelled.on(device, ScaledRows(x_ND=x_ND, rows_N=rows_N, scaled=scaled), labels_N[rows_N])
        for x_ND, rows_N, labels_N in (
            (train_ND, fit, labels),
            (train_ND, aside, labels),
            (test_MD, np.arange(len(test_MD)), test_labels),
        )
    )
    classes = int(max(labels.max(), test_labels.max())) + 1
    sets = {"given": torch.arange(train_ND.shape[1])}
    heads = linear.heads_of(values, sets, classes, seed=seed, device=device)

    def batches_of(_: int, rows: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        return (train[b] for b in rows)

    for _ in linear.train_heads(heads, values, len(fit), batches_of, seed=seed):
        pass
    scores = linear.judge_heads(heads, classes, held if len(aside) else None, test)
    best = linear.first_largest([m["top1"] for m in scores["held"]]) if len(aside) else 0
    return scores["test"][best]


def _on_cpu(x: np.ndarray | Tensor, dtype: Any) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x  # NumPy has no bfloat16
    return np.asarray(x, dtype)


def evaluate(
    network: str | Path | Backbone | nn.Module,
    task: Literal["knn", "linear", "semisup"],
    *,
    protocol: str,
    dataset: str,
    data_dir: str | Path,
    output: str | Path | None = None,
    **options: Any,
) -> list[Result]:
    """The results of one evaluation, as `intl-transfer TASK` writes them.

    `network` is a checkpoint file in any known format, a loaded Backbone, or any module that maps normalised
    images N x 3 x H x W to features N x D. `options` are the command's own by their names (label, seed,
    image_size, mean, std, precision, label_percent ...). With `output` the results are appended there, and
    an evaluation that it holds already is read instead of run. Raises ValueError for wrong input, before the
    work.
    """
    if task not in EVALUATORS:
        raise UserError(f"task {task!r}: wanted one of {', '.join(EVALUATORS)}")
    known = {f.name for f in fields(SETTINGS[task])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"{task}: no option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    backbone = None if isinstance(network, (str, Path)) else _backbone(network)
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS[task](
            weights=str(network) if backbone is None else backbone.path, protocol=protocol, dataset=dataset,
            data_dir=Path(data_dir), output=Path(output or folder), **options,
        )  # fmt: skip
        return EVALUATORS[task](settings, backbone)


def convert(weights: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write a checkpoint's backbone as detectron2 weights (.pkl), proved equal; what the file records of it.

    `options` are those of `intl-transfer convert` by their names (branch, arch ...). The record has the
    source's path and sha256, the config options of the network, and the largest difference of a stage's
    features. Raises ValueError where the backbone does not convert or detectron2 is missing.
    """
    return conversion.convert(ConvertSettings(weights=Path(weights), output=Path(output), **options))


def read_results(*folders: str | Path) -> list[Result]:
    """Every result line in the results.jsonl files under `folders`, by folder and in the order written."""
    files: Sequence[Path] = [f for folder in folders for f in sorted(Path(folder).rglob(results.FILE))]
    return [result for file in files for result in results.read(file)]


def _backbone(network: Backbone | nn.Module | str | Path) -> Backbone:
    if isinstance(network, Backbone):
        return network
    return backbone_of_module(network) if isinstance(network, nn.Module) else load_backbone(network)
