"""detectron2's frozen config from a YAML file, a weights file's record and KEY VALUE overrides.

Later ones win: the file, then what the weights were made with (groups, width, pixel mean and deviation),
then the command line. What could not work (a C4 head on a ResNet-18, a batch that the ranks cannot share) is
refused here, before anything starts.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from pretrain.common.errors import UserError
from pretrain.common.files import read_yaml
from pretrain.common.machine import computes_bfloat16
from transfer.conversion.availability import CONFIGS, find_config
from transfer.detection import heads  # noqa: F401 - registers the head that C4 configs name
from transfer.detection.protocol import flat, shipped_name, spell
from transfer.detection.semantic import keys, networks  # noqa: F401 - registers the networks of scenes
from transfer.detection.semantic.learning_rate import POLY

# What may differ when a run goes on where it stopped: none of it changes what is learned.
NOT_THE_RUN = ("OUTPUT_DIR", "VIS_PERIOD", "VERSION", "CUDNN_BENCHMARK", "MODEL.DEVICE",
               "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
               "TEST.EXPECTED_RESULTS")  # fmt: skip
SCENES = f"whole scenes are labelled by MODEL.META_ARCHITECTURE {keys.SEGMENTOR} here"
# Keys without effect here, and why: refused where they are not at their default.
REFUSED = {
    "MODEL.LOAD_PROPOSALS": "proposals come from the network alone",
    "DATASETS.PROPOSAL_FILES_TRAIN": "proposals come from the network alone",
    "DATASETS.PROPOSAL_FILES_TEST": "proposals come from the network alone",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": "proposals come from the network alone",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": "proposals come from the network alone",
    "MODEL.ANCHOR_GENERATOR.ANGLES": "rotated boxes are not evaluated here",
    "MODEL.PANOPTIC_FPN.": SCENES,
    "MODEL.SEM_SEG_HEAD.": SCENES,
    "GLOBAL.HACK": "nothing reads it",
}
CHOICES = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "RetinaNet", keys.SEGMENTOR),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
}
"""The values that this project can train and evaluate; detectron2 has others."""
WORDS = {
    r".*\.NORM": ("", "BN", "SyncBN", "naiveSyncBN", "FrozenBN", "GN"), r"INPUT\.FORMAT": ("RGB", "BGR"),
    r"INPUT\.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    r"INPUT\.MASK_FORMAT": ("polygon", "bitmask"), r"INPUT\.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    r"INPUT\.CROP\.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    r"SOLVER\.WARMUP_METHOD": ("linear", "constant"), r"SOLVER\.CLIP_GRADIENTS\.CLIP_TYPE": ("value", "norm"),
    r"SOLVER\.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", POLY),
    r"MODEL\.RESNETS\.DEPTH": (18, 34, 50, 101, 152), r"MODEL\.RESNETS\.RES5_DILATION": (1, 2),
    r"MODEL\.RESNETS\.OUT_FEATURES": ("stem", "res2", "res3", "res4", "res5"),
    r"MODEL\.FPN\.FUSE_TYPE": ("sum", "avg"),
    r"MODEL\..*\.POOLER_TYPE": ("ROIAlignV2", "ROIAlign", "ROIPool"),
    r"MODEL\..*\.BBOX_REG_LOSS_TYPE": ("smooth_l1", "giou", "diou", "ciou"),
}  # fmt: skip
"""The values of keys whose names match, or each of several."""
LARGE = 10**6
MOST_BASES = 20
NUMBERS: dict[str, tuple[float, float]] = {
    r"SEED": (-1, 2**31 - 1), r"VIS_PERIOD|TEST\.EVAL_PERIOD|SOLVER\.WARMUP_ITERS": (0, 10**9),
    r"INPUT\.MIN_SIZE_(TRAIN|TEST)|TEST\.AUG\.MIN_SIZES": (0, 10**4),  # 0: as it is
    r"INPUT\.MAX_SIZE_(TRAIN|TEST)|TEST\.AUG\.MAX_SIZE": (32, 10**4), r"TEST\.SLIDE\.\w+": (0, 10**4),
    r"MODEL\.BACKBONE\.FREEZE_AT": (0, 5), r"MODEL\.PIXEL_STD": (1e-6, 1e6),
    r"MODEL\.PIXEL_MEAN": (-1e6, 1e6),
    r"SOLVER\.BASE_LR": (1e-12, 1e6), r"SOLVER\.POLY_LR_POWER": (1e-6, 100), r"SOLVER\.GAMMA": (1e-12, 1),
    r"SOLVER\.(MOMENTUM|WARMUP_FACTOR)": (0, 1),
    r"SOLVER\.(BASE_LR_END|WEIGHT_DECAY\w*|BIAS_LR_FACTOR)": (0, 1e6),
    r"SOLVER\.(MAX_ITER|CHECKPOINT_PERIOD|STEPS)": (1, 10**9), r"SOLVER\.IMS_PER_BATCH": (1, LARGE),
    r"SOLVER\.CLIP_GRADIENTS\.CLIP_VALUE": (1e-12, 1e12), r"SOLVER\.NUM_DECAYS": (1, LARGE),
    r"SOLVER\.CLIP_GRADIENTS\.NORM_TYPE": (1e-6, math.inf),
    r"INPUT\.CROP\.SINGLE_CATEGORY_MAX_AREA": (1e-6, 1), r"DATALOADER\.NUM_WORKERS": (0, 1024),
    r"DATALOADER\.REPEAT_THRESHOLD": (0, 1), r"TEST\.(DETECTIONS_PER_IMAGE|PRECISE_BN\.NUM_ITER)": (1, LARGE),
    r"MODEL\.SEM_SEG_HEAD\.LOSS_WEIGHT": (1e-6, 1e6), r"MODEL\..*(LOSS|AUX)_WEIGHT": (0, 1e6),
    r"MODEL\..*\.(POSITIVE_FRACTION|SCORE_THRESH_TEST|NMS_THRESH(_TEST)?|IOU_THRESHOLDS|IOUS)": (0, 1),
    r"MODEL\..*\.(NUM_CLASSES|NUM_GROUPS|BATCH_SIZE_PER_IMAGE|P(RE|OST)_NMS_TOPK_\w+|TOPK_\w+)": (1, LARGE),
    r"MODEL\..*\.(CONV_DIM|CONVS_DIM|FC_DIM|AUX_DIM|\w+_CHANNELS|WIDTH_PER_GROUP)": (1, 2**15),
    r"MODEL\..*\.(NUM_CONVS?|NUM_FC|POOLER_SAMPLING_RATIO)": (0, 100),
    r"MODEL\..*\.POOLER_RESOLUTION": (1, 256),
    r"MODEL\.SEM_SEG_HEAD\.DILATION": (1, 1000),
    r"MODEL\.ANCHOR_GENERATOR\.(SIZES|ASPECT_RATIOS)": (1e-6, 1e6),
    r".*": (-1e12, 1e12),
}  # fmt: skip
"""Least and largest number of keys whose names match, or of each of several: the first that fits counts."""
NAMES = re.compile(r"DATASETS\.(TRAIN|TEST)|MODEL\..*\.(IN|OUT)_FEATURES")
LENGTHS = {"MODEL.PIXEL_MEAN": (3, 3), "MODEL.PIXEL_STD": (3, 3), "INPUT.CROP.SIZE": (2, 2),
           "INPUT.MIN_SIZE_TRAIN": (1, 1000), "MODEL.RESNETS.OUT_FEATURES": (1, 5)}  # fmt: skip
CHOICES_OF_SCENES = {"MODEL.META_ARCHITECTURE": (keys.SEGMENTOR,), **keys.CHOICES}


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
    _check_files(path)
    try:
        cfg = _default(semantic=keys.is_semantic(CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)))
        cfg.PROTOCOL = f"{path.stem}@1"  # the name under which results may be compared
        cfg.merge_from_file(str(path), allow_unsafe=False)  # a YAML tag may otherwise run any code
        if record:
            _merge_record(cfg, record)
    except (
        AttributeError,
        KeyError,
        OSError,
        ValueError,
        TypeError,
        AssertionError,
        LookupError,
        ArithmeticError,
        yaml.YAMLError,
    ) as error:
        raise UserError(f"{path}: {_said(error)}") from error
    _override(cfg, overrides)
    _refuse_without_effect(cfg)
    _check_values(cfg)
    cfg = _scaled(cfg, ranks)
    if to_run_here:
        _suit_the_machine(cfg)
    _check(cfg, record, ranks)
    cfg.freeze()
    return cfg


def _check_files(path: Path) -> None:
    """Read a config and those that its _BASE_ names. Raises UserError for what is no small YAML file."""
    left = [path]
    for _ in range(MOST_BASES):
        if not left:
            return
        path = left.pop()
        try:
            content = read_yaml(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise UserError(f"{path}: wanted entries KEY: VALUE, as detectron2's configs have them")
        sections = (key for key, value in get_cfg().items() if isinstance(value, CfgNode))
        if wrong := [key for key in sections if not isinstance(content.get(key, {}), dict)]:
            raise UserError(f"{path}: {wrong[0]}: {content[wrong[0]]!r:.60}: wanted entries KEY: VALUE")
        bases = content.get("_BASE_", [])
        bases = bases if isinstance(bases, list) else [bases]
        if not all(isinstance(base, str) for base in bases):
            raise UserError(f"{path}: _BASE_: wanted a file's name")
        left += [path.parent / os.path.expanduser(base) for base in bases]
    raise UserError(f"{path}: its _BASE_ leads back to itself, or to more than {MOST_BASES} files")


def _default(*, semantic: bool) -> CfgNode:
    """detectron2's own values, and those of this project's keys."""
    cfg = get_cfg()
    if semantic:
        keys.add_keys(cfg)
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


def shipped(protocol: str) -> CfgNode | None:
    """The config of detection_configs that a PROTOCOL names, as it stands there; None where there is none."""
    name = shipped_name(protocol)
    return load_config(CONFIGS / f"{name}.yaml", [], to_run_here=False) if name else None


def _scaled(cfg: CfgNode, ranks: int) -> CfgNode:
    """SOLVER.REFERENCE_WORLD_SIZE: batch, rate and schedule suited to the processes by detectron2."""
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0 or (reference and batch % reference):
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference}: wanted 0, or a number of processes that share "
            f"SOLVER.IMS_PER_BATCH {batch}"
        )
    return DefaultTrainer.auto_scale_workers(cfg, ranks)


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
        parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
        for node in (cfg.MODEL[part] for part in parts):
            if node.NORM == "SyncBN":
                node.NORM = "naiveSyncBN"
        if not computes_bfloat16(torch.device("cpu")):
            cfg.SOLVER.AMP.ENABLED = False


def _check(cfg: CfgNode, record: Mapping[str, Any] | None, ranks: int) -> None:
    """Refuse what detectron2 would build and half-load, or fail on late."""
    if keys.is_semantic(cfg):
        keys.check(cfg)
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth < 50 and not keys.is_semantic(cfg) and "Res5ROIHeads" in cfg.MODEL.ROI_HEADS.NAME:
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
    if cfg.TEST.AUG.ENABLED and (cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.KEYPOINT_ON):
        raise UserError("TEST.AUG.ENABLED True: detectron2 has test-time augmentation for boxes and masks of "
                        "an R-CNN alone")  # fmt: skip
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and cfg.DATALOADER.REPEAT_THRESHOLD <= 0:
        raise UserError("DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler repeats nothing with "
                        "DATALOADER.REPEAT_THRESHOLD 0: set the share of images below which a category is "
                        "rare (LVIS: 0.001)")  # fmt: skip
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN {tuple(sizes)} MIN_SIZE_TRAIN_SAMPLING range: wanted the least and the "
            "largest size"
        )
    steps = list(cfg.SOLVER.STEPS)
    if cfg.SOLVER.MAX_ITER < 1 or steps != sorted(steps):
        raise UserError(
            f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} STEPS {tuple(steps)}: wanted at least one iteration and "
            "steps in rising order"
        )


def _check_values(cfg: CfgNode) -> None:
    """Refuse by its key what is no number, no word or no list that anything here could work with."""
    default = flat(_default(semantic=keys.is_semantic(cfg)))
    for key, value in flat(cfg).items():
        if value is None and default.get(key) is not None:  # which takes any type's place in a config
            raise UserError(f"{key} None: wanted a value, such as {_shown(default[key])}")
        entries = list(_leaves(value))
        words = next((known for name, known in WORDS.items() if re.fullmatch(name, key)), None)
        least, most = next(limits for name, limits in NUMBERS.items() if re.fullmatch(name, key))
        fewest, longest = LENGTHS.get(key, (0, LARGE))
        if isinstance(value, list) and not fewest <= len(value) <= longest:
            count = str(fewest) if fewest == longest else f"{fewest} to {longest}"
            raise UserError(f"{key} {_shown(value)}: wanted {count} values")
        if words and not all(entry in words for entry in entries):
            raise UserError(f"{key} {_shown(value)}: wanted {' or '.join(map(spell, words))}")
        numbers = [e for e in entries if isinstance(e, int | float) and not isinstance(e, bool)]
        if not all(least <= number <= most for number in numbers):
            raise UserError(f"{key} {_shown(value)}: wanted {least:g} to {most:g}")
        if NAMES.fullmatch(key) and not all(isinstance(entry, str) for entry in value):
            raise UserError(f"{key} {_shown(value)}: wanted names")
        if key in LENGTHS and not words and len(numbers) < len(entries):
            raise UserError(f"{key} {_shown(value)}: wanted numbers")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE {_shown(cfg.MODEL.DEVICE)}: wanted cuda or cpu") from error
    crop = cfg.INPUT.CROP
    whole = crop.TYPE.startswith("absolute")
    fits = (side >= 1 and side == int(side) if whole else 0 < side <= 1 for side in crop.SIZE)
    if crop.ENABLED and not all(fits):
        wanted = "height and width in pixels" if whole else "shares of height and width, above 0, at most 1"
        raise UserError(f"INPUT.CROP.SIZE {_shown(list(crop.SIZE))}: wanted {wanted}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _shown(value: Any) -> str:
    return f"{spell(value):.80}"


def _refuse_without_effect(cfg: CfgNode) -> None:
    """A key that nothing reads, or a choice that this project cannot evaluate, would go unnoticed."""
    semantic = keys.is_semantic(cfg)
    ours, default = flat(cfg), flat(_default(semantic=semantic))
    if cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"):
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: {SCENES}; take a sem_seg config "
            "of detection_configs for the same backbone, or detectron2's own tools for its other networks"
        )
    refused, choices = (keys.REFUSED, CHOICES_OF_SCENES) if semantic else (REFUSED, CHOICES)
    if cfg.MODEL.SEM_SEG_HEAD.NAME == keys.LINEAR:
        refused = {**refused, **{f"MODEL.SEM_SEG_HEAD.{k}": why for k, why in keys.OF_THE_FCN.items()}}
    if semantic != ("OUTPUT_STRIDE" in cfg.MODEL.RESNETS):
        raise UserError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: detectors and {keys.SEGMENTOR} have "
            "keys of their own; take a --config-file of the one wanted instead of changing this key"
        )
    for key, why in refused.items():
        changed = [k for k in ours if (k == key or (key[-1] in "._" and k.startswith(key)))
                   and ours[k] != default.get(k)]  # fmt: skip
        if changed:
            raise UserError(
                f"{changed[0]} {spell(ours[changed[0]])} would have no effect: {why}; leave it at "
                f"{spell(default[changed[0]])}"
            )
    for key, known in choices.items():
        if ours[key] not in known:
            raise UserError(f"{key} {ours[key]}: can be {' or '.join(map(str, known))} here")
