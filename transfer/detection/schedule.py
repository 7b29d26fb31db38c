"""The schedule of a detection config made for 8 GPUs on another number of GPUs.

The rule (Goyal et al., https://arxiv.org/abs/1706.02677; facebookresearch/moco issue 11): with the global
batch scaled by k, the learning rate is scaled by k; iterations, steps, warm-up and the periods by 1/k.
"""

from __future__ import annotations

import json
import os
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


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """State the schedule that is equivalent to a config's on another number of GPUs."""

    config_file: str
    """YAML file, or a name in detection_configs/."""
    num_gpus: int
    """GPUs that will run it, over all machines."""
    ims_per_gpu: int | None = None
    """Images a GPU takes at a time; by default as many as on the 8 GPUs of the published runs."""
    output: Path | None = None
    """YAML file to write, for train_net's --config-file; printed only when not given."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"--num-gpus {self.num_gpus}: wanted 1 or more")
        if self.ims_per_gpu is not None and self.ims_per_gpu < 1:
            raise ValueError(f"--ims-per-gpu {self.ims_per_gpu}: wanted 1 or more")


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

    path = find_config(settings.config_file)
    cfg = load_config(path, [], to_run_here=False)
    before = {name: flat(cfg)[f"SOLVER.{name}"] for name in SCHEDULE}
    per_gpu = settings.ims_per_gpu or max(1, before["IMS_PER_BATCH"] // REFERENCE_GPUS)
    batch = per_gpu * settings.num_gpus
    after = equivalent(before, batch=batch)
    k = batch / before["IMS_PER_BATCH"]
    precise = max(1, round(cfg.TEST.PRECISE_BN.NUM_ITER / k))
    norms = {f"MODEL.{part}.NORM": cfg.MODEL[part].NORM for part in
             ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}  # fmt: skip
    overrides: dict[str, Any] = {f"SOLVER.{name}": value for name, value in after.items()}
    overrides["TEST.EVAL_PERIOD"] = round(cfg.TEST.EVAL_PERIOD / k)
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
    for note in result["notes"]:
        print(f"note: {note}")
    print("append to train_net: " + " ".join(f"{k} {_spell(v)}" for k, v in result["overrides"].items()))
    return None


def _spell(value: Any) -> str:
    return f'"{tuple(value)}"' if isinstance(value, list) else str(value)
