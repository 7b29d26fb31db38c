"""The schedule of a detection config made for 8 GPUs on another number of GPUs.

The rule (Goyal et al., https://arxiv.org/abs/1706.02677; facebookresearch/moco issue 11): with the global
batch scaled by k, the learning rate is scaled by k; iterations, steps, warm-up and the periods by 1/k.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from pretrain.common.files import write_text
from transfer.conversion.availability import need_detectron2

SCHEDULE = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD")
REFERENCE_GPUS = 8  # what published detectron2 schedules were run on
REFERENCE_GPUS_OF_SCENES = 4  # and those of semantic segmentation, by mmsegmentation
WARM_UP = 3  # iterations before those that are measured
OBJECTS = 7  # in an image of COCO


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """State the schedule that is equivalent to a config's on another number of GPUs."""

    config_file: str
    """YAML file, or a name in detection_configs/."""
    num_gpus: int
    """GPUs that will run it, over all machines."""
    ims_per_gpu: int | None = None
    """Images a GPU takes at a time; by default as many as on the 8 GPUs of the published runs, of semantic
    segmentation 4."""
    measure: int | None = None
    """Run as many iterations here, after three that do not count, and say how many hours and how much memory
    the schedule takes."""
    output: Path | None = None
    """YAML file to write, for train_net's --config-file; printed only when not given."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"--num-gpus {self.num_gpus}: wanted 1 or more")
        if self.ims_per_gpu is not None and self.ims_per_gpu < 1:
            raise ValueError(f"--ims-per-gpu {self.ims_per_gpu}: wanted 1 or more")
        if self.measure is not None and self.measure < 1:
            raise ValueError(f"--measure {self.measure}: wanted 1 iteration or more")


def equivalent(solver: dict[str, Any], *, batch: int) -> dict[str, Any]:
    """`solver`'s schedule for a global batch of `batch` images; every number of iterations is rounded.

    Keys: IMS_PER_BATCH, BASE_LR, MAX_ITER, STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD.
    """
    k = batch / solver["IMS_PER_BATCH"]
    return {
        "IMS_PER_BATCH": batch,
        "BASE_LR": solver["BASE_LR"] * k,
        "MAX_ITER": round(solver["MAX_ITER"] / k),
        "STEPS": [round(step / k) for step in solver["STEPS"]],
        "WARMUP_ITERS": round(solver["WARMUP_ITERS"] / k),
        "CHECKPOINT_PERIOD": max(1, round(solver["CHECKPOINT_PERIOD"] / k)),
    }


def plan(settings: PlanSettings) -> dict[str, Any]:
    """The schedule before and after, the norm types, the rule in words, and the overrides."""
    need_detectron2()
    from transfer.conversion.availability import find_config
    from transfer.detection.config import flat, load_config
    from transfer.detection.semantic.keys import is_semantic

    path = find_config(settings.config_file)
    cfg = load_config(path, [], to_run_here=False)
    before = {name: flat(cfg)[f"SOLVER.{name}"] for name in SCHEDULE}
    reference = REFERENCE_GPUS_OF_SCENES if is_semantic(cfg) else REFERENCE_GPUS
    per_gpu = settings.ims_per_gpu or max(1, before["IMS_PER_BATCH"] // reference)
    batch = per_gpu * settings.num_gpus
    after = equivalent(before, batch=batch)
    k = batch / before["IMS_PER_BATCH"]
    precise = max(1, round(cfg.TEST.PRECISE_BN.NUM_ITER / k))
    heads = ("SEM_SEG_HEAD",) if is_semantic(cfg) else ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    norms = {f"MODEL.{part}.NORM": cfg.MODEL[part].NORM for part in ("RESNETS", *heads)}
    overrides: dict[str, Any] = {f"SOLVER.{name}": value for name, value in after.items()}
    overrides["TEST.EVAL_PERIOD"] = round(cfg.TEST.EVAL_PERIOD / k)
    if cfg.SOLVER.BASE_LR_END:
        overrides["SOLVER.BASE_LR_END"] = cfg.SOLVER.BASE_LR_END * k
    if cfg.TEST.PRECISE_BN.ENABLED:
        overrides["TEST.PRECISE_BN.NUM_ITER"] = precise
    rule = (
        "the same global batch, so nothing else changes"
        if k == 1
        else f"batch and learning rate x {k:g}; iterations, steps, warm-up and periods x {1 / k:g}"
    )
    notes = []
    synchronised = any("Sync" in v for v in norms.values())
    if synchronised and settings.num_gpus == 1:
        notes.append("on one GPU synchronised BatchNorm is BatchNorm over its own images: nothing to change")
    if synchronised and batch < before["IMS_PER_BATCH"]:
        notes.append(
            f"BatchNorm's statistics come from {batch} images instead of {before['IMS_PER_BATCH']}: expect "
            "another result even with the schedule scaled"
        )
    if k > 4:
        notes.append("a batch more than 4 times the published one is outside what the rule was checked for")
    return {
        "config_file": str(path), "num_gpus": settings.num_gpus, "ims_per_gpu": per_gpu, "rule": rule,
        "before": before, "after": after, "norm": norms, "notes": notes,
        "images_seen": after["IMS_PER_BATCH"] * after["MAX_ITER"], "overrides": overrides,
    }  # fmt: skip


def cost(result: dict[str, Any], iterations: int) -> dict[str, Any]:
    """What the planned schedule takes, from `iterations` of one process on this machine.

    Keys: device, seconds (median of an iteration), images_per_second (of all processes), hours, memory_gib
    (peak). Images and objects are made up, of COCO's shape; loading them and the exchange between processes
    are not in it.
    """
    import torch
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from pretrain.common.signals import StopSignals
    from transfer.detection.config import load_config
    from transfer.detection.train_loop import DetectionTrainer, peak_memory_mib
    from transfer.evaluation.results import device_name

    words = [w for key, value in result["overrides"].items() for w in (key, _text(value))]
    batch = result["ims_per_gpu"]
    cfg = load_config(result["config_file"], [*words, "SOLVER.IMS_PER_BATCH", str(batch)])
    torch.manual_seed(0)
    trainer = DetectionTrainer(cfg, build_model(cfg))
    trainer.seed, trainer.stop = 0, StopSignals()
    trainer.batches = iter(lambda: [_made_up(cfg) for _ in range(batch)], None)
    trainer.model.train()
    seconds = []
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(WARM_UP + iterations):
            began = time.perf_counter()
            trainer.run_step()
            if trainer.on_gpu:
                torch.cuda.synchronize()
            waited = trainer.storage.history("data_time").latest()
            seconds.append(time.perf_counter() - began - waited)
    median = statistics.median(seconds[WARM_UP:])
    return {
        "device": device_name(torch.device(cfg.MODEL.DEVICE)),
        "seconds": median,
        "images_per_second": batch * result["num_gpus"] / median,
        "hours": median * result["after"]["MAX_ITER"] / 3600,
        "memory_gib": peak_memory_mib(trainer.on_gpu) / 1024,
    }


def _made_up(cfg: Any) -> dict[str, Any]:
    """A training image of the config's size with as many objects as COCO's have (860,001 in 117,266)."""
    import torch

    from transfer.detection.semantic.keys import is_semantic

    if is_semantic(cfg):
        height, width = (int(side) for side in cfg.INPUT.CROP.SIZE)
        labels = torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (height, width))
        return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8), "sem_seg": labels}
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

    sizes = sorted(cfg.INPUT.MIN_SIZE_TRAIN)
    height = sizes[len(sizes) // 2]
    width = min(height * 4 // 3, cfg.INPUT.MAX_SIZE_TRAIN)
    corner = torch.rand(OBJECTS, 2) * torch.tensor([width * 0.7, height * 0.7])
    boxes = torch.cat([corner, corner + torch.tensor([width * 0.25, height * 0.25])], dim=1)
    instances = Instances((height, width), gt_boxes=Boxes(boxes))
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    classes = cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    instances.gt_classes = torch.randint(classes, (OBJECTS,))
    if cfg.MODEL.MASK_ON:
        polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for box in boxes]
        masks = PolygonMasks(polygons)
        instances.gt_masks = (
            masks if cfg.INPUT.MASK_FORMAT == "polygon" else BitMasks.from_polygon_masks(masks, height, width)
        )
    if cfg.MODEL.KEYPOINT_ON:
        points = torch.rand(OBJECTS, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3)
        points[..., :2] = boxes[:, None, :2] + points[..., :2] * (boxes[:, None, 2:] - boxes[:, None, :2])
        points[..., 2] = 2  # visible
        instances.gt_keypoints = Keypoints(points)
    return {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8),
        "height": height, "width": width, "instances": instances,
    }  # fmt: skip


def as_config(result: dict[str, Any], folder: Path) -> str:
    """The plan as a YAML file of detectron2, based on the original (paths as seen from `folder`)."""
    nested: dict[str, Any] = {"_BASE_": os.path.relpath(result["config_file"], folder)}
    for key, value in result["overrides"].items():
        *parts, last = key.split(".")
        node = nested
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    head = f"# {Path(result['config_file']).name} for {result['num_gpus']} GPUs: {result['rule']}\n"
    return head + yaml.safe_dump(nested, sort_keys=False)


def main(argv: list[str]) -> int | None:
    """`python -m transfer plan`."""
    settings = parse_settings(
        PlanSettings, argv, prog="python -m transfer plan", description=PlanSettings.__doc__ or ""
    )
    if settings.output is not None and settings.output.suffix != ".yaml":
        raise UserError(f"--output {settings.output}: wanted a file name that ends in .yaml")
    result = plan(settings)
    if settings.measure is not None:
        result["cost"] = cost(result, settings.measure)
    if settings.output is not None:
        write_text(settings.output, as_config(result, settings.output.resolve().parent))
    if settings.json:
        print(json.dumps(result, indent=2))
        return None
    print(f"{result['config_file']} on {result['num_gpus']} GPUs, {result['ims_per_gpu']} images each")
    print(f"rule: {result['rule']}")
    for key, value in result["before"].items():
        print(f"  SOLVER.{key:18s} {value!s:>18}  ->  {result['after'][key]}")
    for key, value in result["norm"].items():
        print(f"  {key:25s} {value or 'none'}")
    if "cost" in result:
        c = result["cost"]
        print(
            f"measured on one {c['device']}: {c['seconds']:.3g} s an iteration, {c['images_per_second']:.3g} "
            f"images/s on {result['num_gpus']} without their exchange and loading, {c['hours']:.3g} hours, "
            f"{c['memory_gib']:.3g} GiB of memory"
        )
    for note in result["notes"]:
        print(f"note: {note}")
    print("append to train_net: " + " ".join(f"{k} {_spell(v)}" for k, v in result["overrides"].items()))
    return None


def _text(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _spell(value: Any) -> str:
    return f'"{_text(value)}"' if isinstance(value, list) else str(value)
