"""`transfer spectrum`: what the spectrum of checkpoints' features says, without labels.

OUTPUT/results.jsonl gets one line a checkpoint (task spectrum), spectra.json their eigenvalues, pictures/
the spectra of all of them, of each one's layers, and the metrics by the number of images. Letters of
shapes: N images, Q views of each, D features.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.common.cli import save_settings
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.process_group import is_main
from pretrain.common.progress import Progress
from pretrain.data.datasets import ImageDataset, open_dataset
from pretrain.data.voc07 import refuse_voc07
from pretrain.views.augment import View
from pretrain.views.loader import Views, epoch_order
from transfer.evaluation.context import Evaluation, backbone_of, judge_frozen, output_of, settle
from transfer.evaluation.features import Extractor
from transfer.evaluation.pooled_features import LAST, STAGES, columns
from transfer.evaluation.protocol import Protocol, load_protocol, want
from transfer.evaluation.provenance import file_labels
from transfer.evaluation.results import Clock, Result
from transfer.evaluation.transforms import ImageValues
from transfer.options.commands import SpectrumSettings, parse
from transfer.options.evaluation import EvaluationSettings
from transfer.spectrum import diagnosis_pictures
from transfer.spectrum.cluster_metrics import clid, neural_collapse
from transfer.spectrum.half_samples import MOST, intervals
from transfer.spectrum.rank_metrics import rank_metrics, spectrum
from transfer.spectrum.view_metrics import MOST_FEATURES, alignment, lidar, uniformity

logger = logging.getLogger(__name__)

SPECTRA = "spectra.json"
Metrics = Callable[[np.ndarray], Mapping[str, float]]
"""Of some of the images, by position."""
WIDE = 4096  # features: metrics of more are computed one after the other, for their memory
VIEW_BATCH = 32  # images whose views are made at once


@dataclass(frozen=True, kw_only=True)
class SpectrumProtocol(ImageValues):
    """The values of a diagnosis."""

    images: int
    """At most so many training images, drawn with seed 0."""
    sizes: tuple[int, ...]
    """Numbers of images at which the ranks are told as well."""
    decay_range: tuple[int, ...]
    """First and last eigenvalue, counted from 1, of the fitted decay."""
    view_images: int
    """Images of several views, of uniformity and of CLID."""
    views: int
    """Augmented views of each."""
    view_min_scale: float
    """Least share of the image's area in a view."""
    lidar_delta: float
    """Added to the diagonal of LiDAR's within-class covariance."""
    clusters: int
    """Of CLID: clusters that k-means finds."""
    neighbours: int
    """Of CLID: nearest neighbours."""
    repeats: int
    """Random halves of the images that an interval comes from."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        super().__post_init__()
        for key, least in (
            ("images", 8), ("view_images", 8), ("views", 2), ("clusters", 2), ("neighbours", 1), ("repeats",
            2),
        ):  # fmt: skip
            want(getattr(self, key) >= least, key, getattr(self, key), f"{least} or more")
        ends = len(self.decay_range) == 2 and 1 <= self.decay_range[0] < self.decay_range[1]
        want(ends, "decay_range", self.decay_range, "first and last place, such as [11, 100]")
        want(0 < self.view_min_scale <= 1, "view_min_scale", self.view_min_scale, "a number above 0, up to 1")
        want(self.lidar_delta > 0, "lidar_delta", self.lidar_delta, "a number above 0")
        want(min(self.sizes, default=2) >= 2, "sizes", self.sizes, "numbers of 2 or more")


def main(argv: list[str]) -> int:
    """`python -m transfer spectrum`."""
    diagnose_all(parse("spectrum", argv))
    return 0


def diagnose_all(settings: SpectrumSettings) -> list[Result]:
    """The diagnosis of each checkpoint, written to OUTPUT with pictures of all of them."""
    protocol = load_protocol(settings.protocol, "spectrum")
    values = protocol.settings(SpectrumProtocol)
    refuse_voc07(settings.dataset)
    with output_of(settings.of(settings.weights[0]), "spectrum"):
        data = open_dataset(settings.dataset, settings.data_dir, "train", labelled=False)
        if len(data) < 8:
            raise UserError(f"{data.root}: {len(data)} images, wanted 8 or more")
        every = [_evaluation(settings, settings.of(w), protocol, values, data) for w in settings.weights]
        found = []
        before = read_spectra(settings.output)
        for evaluation in every:
            stages = STAGES if settings.layers and _has_stages(evaluation) else LAST
            found += judge_frozen(
                evaluation, lambda settled, extractor: _judge(settled, extractor, values, settings), stages
            )
        if is_main():
            save_settings(settings, settings.output / "config.yaml")
            spectra = read_spectra(settings.output)
            pictures = settings.output / "pictures"
            if spectra != before or not (pictures / "spectra.svg").exists():
                diagnosis_pictures.draw(spectra, pictures)
    return found


def read_spectra(output: Path) -> dict[str, Any]:
    """spectra.json: by weights, branch and data set what pictures are drawn of; {} without any."""
    try:
        found = json.loads((output / SPECTRA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _evaluation(
    settings: SpectrumSettings, one: EvaluationSettings, protocol: Protocol, values: SpectrumProtocol,
    data: ImageDataset,
) -> Evaluation:  # fmt: skip
    return settle(
        one, values, backbone_of(one), data, data, task="spectrum", protocol=protocol, clock=Clock(),
        seed=None, more_conditions={
            "n": min(values.images, len(data)), "views": settings.views, "labelled": _has_labels(data),
        },
    )  # fmt: skip


def _has_stages(evaluation: Evaluation) -> bool:
    return all(hasattr(evaluation.backbone.model, stage) for stage in STAGES)


def _has_labels(data: ImageDataset) -> bool:
    return len(data.classes) > 1 and bool((data.labels_N >= 0).all())


def _judge(
    evaluation: Evaluation, extractor: Extractor, values: SpectrumProtocol, settings: SpectrumSettings
) -> list[Result]:
    data = evaluation.train
    chosen = np.sort(epoch_order(len(data), 0, 0)[: values.images])
    (features,) = evaluation.features(extractor, (data, None if len(chosen) == len(data) else chosen))
    if not is_main():
        return []
    by_layer = {
        stage: np.asarray(features.x_ND)[:, columns(stage, extractor.widths).numpy()]
        for stage in extractor.widths
    }
    x_ND = by_layer[[*extractor.widths][-1]]
    labels_N = data.labels_N[features.positions_N] if _has_labels(data) else None
    few = epoch_order(len(x_ND), 1, 0)[: values.view_images]
    last = (values.decay_range[0], values.decay_range[1])
    parts: list[tuple[Metrics, int]] = [
        (lambda at: rank_metrics(x_ND[at], decay_range=last), len(x_ND)),
        (lambda at: _of_pairs(x_ND[few][at], values), len(few)),
    ]
    if labels_N is not None:
        parts.append((lambda at: neural_collapse(x_ND[at], labels_N[at]), len(x_ND)))
    notes = []
    if settings.views:
        x_NQD = _view_features(evaluation, extractor, features.positions_N[few], values)
        parts.append((lambda at: _of_views(x_NQD[at], values), len(few)))
        if x_NQD.shape[2] > MOST_FEATURES:
            notes.append(f"no LiDAR of {x_NQD.shape[2]} features: more than {MOST_FEATURES}")
    metrics: dict[str, float] = {}
    ranges: dict[str, tuple[float, float]] = {}
    with Progress((values.repeats + 1) * len(parts), label="metrics", unit="round") as bar:
        for part, n in parts:
            found, its = intervals(
                part,
                n,
                repeats=values.repeats,
                told=lambda: bar.update(1),
                ratios=("condition_number",),
                at_once=MOST if x_ND.shape[1] <= WIDE else 1,
            )
            metrics, ranges = metrics | found, ranges | its
    notes += [f"{k} cannot be told of these features" for k, v in metrics.items() if not math.isfinite(v)]
    result = evaluation.result(
        {}, extractor.device, warnings=notes,
        settings={
            "intervals": {k: [_rounded(v) for v in r] for k, r in ranges.items()}, "features": x_ND.shape[1],
        },
    )  # fmt: skip
    result = replace(result, n=len(x_ND), metrics={k: _rounded(v) for k, v in _finite(metrics).items()})
    order = epoch_order(len(x_ND), 2, 0)
    sizes = sorted({*(s for s in values.sizes if s < len(x_ND)), len(x_ND)})
    by_images = {str(n): _finite(rank_metrics(x_ND[order[:n]], decay_range=last)) for n in sizes}
    said = {
        "name": evaluation.settings.label or file_labels(settings.weights)[evaluation.settings.weights],
        "n": len(x_ND),
        "step": int(evaluation.backbone.metadata.get("step") or 0), "by_images": by_images,
        "layers": {stage: spectrum(x).tolist() for stage, x in by_layer.items()},
    }  # fmt: skip
    key = ":".join((evaluation.backbone.sha256, evaluation.backbone.branch, data.name))
    write_json(settings.output / SPECTRA, read_spectra(settings.output) | {key: said})
    return [result]


def _of_pairs(x_ND: np.ndarray, values: SpectrumProtocol) -> dict[str, float]:
    found = clid(x_ND, clusters=values.clusters, neighbours=values.neighbours)
    return {"uniformity": uniformity(x_ND), **found}


def _of_views(x_NQD: np.ndarray, values: SpectrumProtocol) -> dict[str, float]:
    found = {"alignment": alignment(x_NQD)}
    if x_NQD.shape[2] <= MOST_FEATURES:
        found["lidar"] = lidar(x_NQD, delta=values.lidar_delta)
    return found


@torch.no_grad()
def _view_features(
    evaluation: Evaluation, extractor: Extractor, positions_N: np.ndarray, values: SpectrumProtocol
) -> np.ndarray:
    """Features of `values.views` augmented views of each image, N x Q x D float32, the same at every call."""
    look = evaluation.transform
    view = View(size=look.size, min_scale=values.view_min_scale, solarise_p=0.0)
    views = Views(
        evaluation.train, [view] * values.views, seed=0, mean=look.mean, std=look.std, finish_here=True
    )
    last = columns([*extractor.widths][-1], extractor.widths)
    rows = []
    with Progress(len(positions_N), label=f"{values.views} views of each image", unit="image") as bar:
        for start in range(0, len(positions_N), VIEW_BATCH):
            at = positions_N[start : start + VIEW_BATCH]
            batch = views.__getitems__([(0, int(i)) for i in at])
            rows.append(torch.stack([extractor.of_normalised(v).cpu()[:, last] for v in batch.views], 1))
            bar.update(len(at))
    return torch.cat(rows).numpy()


def _rounded(value: float) -> float:
    """Six significant digits: shares of a collapsed spectrum are small, condition numbers large."""
    return float(f"{value:.6g}")


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if math.isfinite(v)}
