"""PNG files of predictions beside ground truth, and of the training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer
from torch import nn

from pretrain.common.files import atomic_path, read_jsonl
from pretrain.data.images import read_image
from transfer.detection.checkpointer import StrictCheckpointer
from transfer.detection.semantic.keys import is_semantic
from transfer.detection.semantic.label_files import read_labels
from transfer.detection.semantic.mapper import mapper_of

SHOWN = 6
LEAST_SCORE = 0.3
SHORT_SIDE = 384  # px of a picture; small images are enlarged to it
GAP = 8  # px between truth and prediction


def show(cfg: CfgNode, folder: Path) -> None:
    """`train_net --show DIR`: load MODEL.WEIGHTS, draw its predictions and the curves of its training."""
    model = build_model(cfg)
    StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    names = draw(cfg, model, folder)
    curves = draw_curves(Path(cfg.MODEL.WEIGHTS).parent / "metrics.json", folder / "curves.png")
    print(f"{folder}: {', '.join(names + (['curves.png'] if curves else []))}")


@torch.no_grad()
def draw(cfg: CfgNode, model: nn.Module, folder: Path) -> list[str]:
    """Ground truth (left) and predictions scored at least LEAST_SCORE (right) on the first SHOWN test
    images that hold objects; the best three are drawn where none scores as much. Of semantic segmentation
    the image with its labels and with those predicted. Returns the file names."""
    name, semantic = cfg.DATASETS.TEST[0], is_semantic(cfg)
    records = [r for r in DatasetCatalog.get(name) if semantic or r.get("annotations")][:SHOWN]
    metadata = MetadataCatalog.get(name)
    mapper = mapper_of(cfg, train=False)
    was_training = model.training
    model.eval()
    names = []
    for number, record in enumerate(records):
        (found,) = model([mapper(record)])
        pixels = np.asarray(read_image(record["file_name"]))
        scale = max(1.0, SHORT_SIDE / min(pixels.shape[:2]))
        left, right = (Visualizer(pixels, metadata, scale) for _ in range(2))
        if semantic:
            truth = left.draw_sem_seg(read_labels(record["sem_seg_file_name"])).get_image()
            guess = right.draw_sem_seg(found["sem_seg"].argmax(dim=0).cpu()).get_image()
        else:
            objects = found["instances"].to("cpu")
            certain = objects[objects.scores >= LEAST_SCORE]
            truth = left.draw_dataset_dict(record).get_image()
            guess = right.draw_instance_predictions(certain if len(certain) else objects[:3]).get_image()
        gap = np.full((truth.shape[0], GAP, 3), 255, np.uint8)
        names.append(f"predictions_{number}.png")
        _write_png(folder / names[-1], np.concatenate([truth, gap, guess], axis=1))
    model.train(was_training)
    return names


def draw_curves(metrics: Path, file: Path) -> bool:
    """Loss, and AP or mIoU where evaluated on the way, over iterations; False where nothing was."""
    lines = read_jsonl(metrics)
    losses = [(line["iteration"], line["total_loss"]) for line in lines if "total_loss" in line]
    if not losses:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    precisions = {
        label: [(line["iteration"], line[key]) for line in lines if key in line]
        for key, label in (("bbox/AP", "boxes"), ("segm/AP", "masks"), ("sem_seg/mIoU", "mean IoU of pixels"))
    }
    panels = 2 if any(precisions.values()) else 1
    figure = Figure(figsize=(5 * panels, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].plot(*zip(*losses))
    axes[0].set(xlabel="iteration", ylabel="loss", title="training loss")
    for label, points in precisions.items():
        if points:
            axes[1].plot(*zip(*points), marker="o", label=label)
            what = ("mIoU", "mean IoU") if "IoU" in label else ("AP", "average precision")
            axes[1].set(xlabel="iteration", ylabel=f"{what[0]}, percent", title=what[1])
            axes[1].legend()
    with atomic_path(file) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return True


def _write_png(file: Path, pixels: np.ndarray) -> None:
    done, data = cv2.imencode(".png", pixels[:, :, ::-1])
    assert done
    with atomic_path(file) as aside:
        aside.write_bytes(data.tobytes())
