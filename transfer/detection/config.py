"""detectron2's frozen config from a YAML file, a weights file's record and KEY VALUE overrides.

Later ones win: the file, then what the weights were made with (groups, width, pixel mean and deviation),
then the command line. What could not work (a C4 head on a ResNet-18, a batch that the ranks cannot share) is
refused here, before anything starts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from pretrain.common.errors import UserError
from transfer.conversion.availability import find_config
from transfer.detection import heads  # noqa: F401 - registers the head that C4 configs name

# Not part of the protocol: the place, the machine, the seed, and what belongs to the weights.
NOT_PROTOCOL = (
    "OUTPUT_DIR", "SEED", "VIS_PERIOD", "VERSION", "PROTOCOL", "CUDNN_BENCHMARK", "MODEL.WEIGHTS",
    "MODEL.DEVICE", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP", "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.RESNETS.STRIDE_IN_1X1", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
    "SOLVER.AMP.ENABLED",
)  # fmt: skip
# What may differ when a run goes on where it stopped: none of it changes the numbers.
NOT_THE_RUN = ("OUTPUT_DIR", "VIS_PERIOD", "VERSION", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS",
               "SOLVER.CHECKPOINT_PERIOD")  # fmt: skip


def load_config(
    file: str | Path,
    overrides: Sequence[str],
    record: Mapping[str, Any] | None = None,
    *,
    ranks: int = 1,
    to_run_here: bool = True,
) -> CfgNode:
    """The config to run with, on this machine or (`to_run_here` False) as it stands.

    `record` is what `convert` wrote into the weights file, if it did.
    """
    path = find_config(file)
    cfg = get_cfg()
    cfg.PROTOCOL = f"{path.stem}@1"  # the name under which results may be compared
    try:
        cfg.merge_from_file(str(path))
        if record:
            _merge_record(cfg, record)
    except (KeyError, ValueError, TypeError, AssertionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {_said(error)}") from error
    _override(cfg, overrides)
    if to_run_here:
        _suit_the_machine(cfg)
    _check(cfg, record, ranks)
    cfg.freeze()
    return cfg


def pairs(words: Sequence[str]) -> dict[str, str]:
    """The trailing KEY VALUE pairs of a command line. Raises UserError for what is none."""
    late = next((w for w in words if w.startswith("--")), None)
    if late:
        raise UserError(f"{late} stands after KEY VALUE: options come first, pairs of KEY VALUE last")
    if len(words) % 2:
        raise UserError(f"{' '.join(words)}: wanted pairs of KEY VALUE after the options")
    return dict(zip(words[::2], words[1::2]))


def _override(cfg: CfgNode, words: Sequence[str]) -> None:
    """Merge KEY VALUE pairs. Raises UserError that names the pair which detectron2's config does not take."""
    known = flat(cfg)
    for key, value in pairs(words).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{key}: detectron2's config has no such key{hint}")
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, TypeError, AssertionError) as error:
            raise UserError(f"{key} {value}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def protocol_of(cfg: CfgNode) -> dict[str, str]:
    """Name, version and hash of what makes two results comparable."""
    name, _, version = cfg.PROTOCOL.partition("@")
    return {"name": name, "version": version or "1", "hash": digest(cfg, without=NOT_PROTOCOL)}


def digest(cfg: CfgNode, *, without: Sequence[str]) -> str:
    """sha256 of a config, some keys left out."""
    values = {k: v for k, v in flat(cfg).items() if k not in without}
    values = {k: "SyncBN" if v == "naiveSyncBN" else v for k, v in values.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flat(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as {"MODEL.RESNETS.DEPTH": 18, ...}, tuples as lists."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            values.update(flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = json.loads(json.dumps(value, default=str))
    return values


def _merge_record(cfg: CfgNode, record: Mapping[str, Any]) -> None:
    """Take groups, width and normalisation from the weights; the depth must be the config's own."""
    options = record.get("options", {})
    keys = ("NUM_GROUPS", "WIDTH_PER_GROUP", "STRIDE_IN_1X1")
    cfg.merge_from_list([v for k in keys for v in _pair(options, f"MODEL.RESNETS.{k}")])
    metadata = record.get("metadata", {})
    cfg.INPUT.FORMAT = "RGB"
    for name, key in (("mean", "PIXEL_MEAN"), ("std", "PIXEL_STD")):
        if metadata.get(name):
            values = metadata[name]
            numbers = [float(v) for v in (values.split(",") if isinstance(values, str) else values)]
            cfg.MODEL[key] = [round(255 * v, 4) for v in numbers]


def _pair(options: Mapping[str, Any], key: str) -> list[Any]:
    return [key, options[key]] if key in options else []


def _suit_the_machine(cfg: CfgNode) -> None:
    """Without a GPU: device cpu, detectron2's own synchronised BatchNorm, since torch's refuses CPU tensors
    (naiveSyncBN computes the same where all ranks have as many pixels), and mixed precision in bfloat16 only
    where the processor computes in it (1.7x; elsewhere it is emulated, slowly)."""
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
            if node.NORM == "SyncBN":
                node.NORM = "naiveSyncBN"
        if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
            cfg.SOLVER.AMP.ENABLED = False


def _check(cfg: CfgNode, record: Mapping[str, Any] | None, ranks: int) -> None:
    """Refuse what detectron2 would build and half-load, or fail on late."""
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth < 50 and "Res5ROIHeads" in cfg.MODEL.ROI_HEADS.NAME:
        raise UserError(
            f"a C4 config with a ResNet-{depth}: detectron2's res5 head is built of bottleneck blocks and "
            "would be left unloaded; use an FPN config with ResNet-18 and 34"
        )
    if depth < 50 and cfg.MODEL.RESNETS.RES2_OUT_CHANNELS != 64:
        raise UserError(f"a ResNet-{depth} has 64 channels in res2: add MODEL.RESNETS.RES2_OUT_CHANNELS 64")
    if record:
        wanted = record.get("options", {})
        ours = flat(cfg)
        wrong = {k: v for k, v in wanted.items() if ours.get(k) != v}
        if wrong:
            raise UserError(
                f"the weights are those of a {record.get('arch', 'different ResNet')}, the config says "
                + ", ".join(f"{k} {ours.get(k)}" for k in wrong)
                + "; add "
                + " ".join(f"{k} {v}" for k, v in wrong.items())
            )
    if cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be shared by {ranks} processes; "
            "`python -m transfer plan` states an equivalent schedule"
        )
    steps = list(cfg.SOLVER.STEPS)
    if cfg.SOLVER.MAX_ITER < 1 or steps != sorted(steps):
        raise UserError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} STEPS {tuple(steps)}: wanted at least one iteration and "
            "steps in rising order"
        )
