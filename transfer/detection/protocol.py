"""The protocol of a detection run: its config compared with the shipped config of the same name.

A result may stand beside others of a protocol's name only where nothing that can change the number differs.
`protocol_of` says what does, in words, and gives such a run a hash of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from transfer.conversion.availability import CONFIGS

MACHINE = (
    "OUTPUT_DIR", "SEED", "VIS_PERIOD", "VERSION", "PROTOCOL", "CUDNN_BENCHMARK", "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE", "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "SOLVER.AMP.ENABLED",  # on every result as settings.mixed_precision
)  # fmt: skip
"""The place, the machine, the seed: no part of a protocol."""
OF_THE_WEIGHTS = (
    "MODEL.WEIGHTS", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "MODEL.RESNETS.STRIDE_IN_1X1",
)  # fmt: skip
"""How the backbone was pretrained; on every result as weights.mean and std, and in its settings."""
OF_THE_ARCHITECTURE = (
    "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.NUM_GROUPS", "MODEL.RESNETS.WIDTH_PER_GROUP",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
)  # fmt: skip
"""Left out of the hash of a config, but a ResNet-101 is not what a ResNet-50's config of that name gives."""
OF_EACH_RESULT = re.compile(r"DATASETS\.TEST$|TEST\.AUG\.")
"""Results name their own test set, and whether test-time augmentation was used."""
JUDGING = re.compile(
    r"INPUT\.(MIN|MAX)_SIZE_TEST$|TEST\.(DETECTIONS_PER_IMAGE|KEYPOINT_OKS_SIGMAS|FLIP|SLIDE\.\w+)$"
    r"|MODEL\..*(_TEST|PIXEL_MEAN|PIXEL_STD|STRIDE_IN_1X1|NMS_THRESH|ANCHOR_GENERATOR\..*|BBOX_REG_WEIGHTS"
    r"|POOLER_\w+|OUTPUT_STRIDE|ALIGN_CORNERS|IGNORE_VALUE)$|INPUT\.FORMAT$"
)
"""What changes the numbers of a model that is trained already."""
IMAGES = {
    "coco_2014_train": 82783, "coco_2014_val": 40504, "coco_2017_train": 118287, "coco_2017_val": 5000,
    "coco_2017_train.1@1": 1174, "coco_2017_train.1@2": 2329, "coco_2017_train.1@5": 5764,
    "coco_2017_train.1@10": 11285, "coco_2017_train.first@5": 5863, "coco_2017_train.first@10": 11726,
    "keypoints_coco_2017_train": 118287, "keypoints_coco_2017_val": 5000,
    "voc_2007_trainval": 5011, "voc_2007_test": 4952, "voc_2012_trainval": 11540,
    "voc_2012_sem_seg_train": 1464, "voc_2012_sem_seg_aug": 9118, "voc_2012_sem_seg_val": 1449,
    "ade20k_sem_seg_train": 20210, "ade20k_sem_seg_val": 2000,
    "cityscapes_fine_sem_seg_train": 2975, "cityscapes_fine_sem_seg_val": 500,
}  # fmt: skip
"""Images of the public sets, as counted in their own files (https://cocodataset.org/#download,
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/dbstats.html, https://www.cityscapes-dataset.com/dataset-overview/,
https://github.com/CSAILVision/sceneparsing); of shares (label_shares.py) as they follow from these counts and
from 117266 images with objects (https://github.com/facebookresearch/detectron2/issues/1134)."""
UNKNOWN: dict[str, Any] = {"name": "unknown", "version": None, "hash": "unknown"}
"""Of a detector whose file does not say how it was trained."""


def protocol_of(
    cfg: CfgNode, shipped: CfgNode | None, images: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """name, version, hash, and `differs` where the run is not that of the config `shipped` under its name.

    `images`: how many there are by training set. A user's own config (`shipped` None) is known by its hash.
    """
    name, _, version = cfg.PROTOCOL.partition("@")
    protocol: dict[str, Any] = {"name": name, "version": version or "1"}
    ours = _values(cfg)
    if shipped is None:
        return {**protocol, "hash": _digest(ours)}
    theirs = _values(shipped)
    found = [
        f"{key} {spell(ours.get(key))} instead of {spell(theirs.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not OF_EACH_RESULT.match(key)
    ]
    found += [_fewer(name, count) for name, count in (images or {}).items() if _is_part(name, count)]
    return with_differences({**protocol, "hash": _digest(theirs)}, found)


def judged(
    protocol: Mapping[str, Any], dataset: str, images: int, also: Sequence[str] = ()
) -> dict[str, Any]:
    """The protocol of one result: what is peculiar to the test set and to how it was evaluated added."""
    part = [_fewer(dataset, images)] if _is_part(dataset, images) else []
    return with_differences(protocol, [*also, *part])


def with_differences(protocol: Mapping[str, Any], found: Sequence[str]) -> dict[str, Any]:
    """`protocol` with `found` added to `differs` and a hash of its own; as it is where nothing was found."""
    if not found:
        return dict(protocol)
    differs = [*protocol.get("differs", ()), *found]
    text = json.dumps([protocol["hash"], *found])
    return {**protocol, "hash": hashlib.sha256(text.encode()).hexdigest()[:16], "differs": differs}


def judged_otherwise(cfg: CfgNode, settings: Mapping[str, Any]) -> list[str]:
    """What the evaluation's config says otherwise than the config that the model was trained by."""
    ours = flat(cfg)
    return [
        f"{key} {spell(ours.get(key))} at evaluation instead of {spell(value)}"
        for key, value in sorted(settings.items())
        if JUDGING.match(key) and ours.get(key) != value
    ]


def shipped_name(protocol: str) -> str | None:
    """The file in detection_configs that a config of this PROTOCOL is compared with, if there is one."""
    name = protocol.partition("@")[0]
    return name if re.fullmatch(r"\w+", name) and (CONFIGS / f"{name}.yaml").is_file() else None


def flat(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as {"MODEL.RESNETS.DEPTH": 18, ...}, tuples as lists."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            values.update(flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = json.loads(json.dumps(value, default=str))
    return values


def spell(value: Any) -> str:
    """A config's value as it is typed on the command line."""
    if isinstance(value, list):
        return f"({', '.join(map(spell, value))}{',' if len(value) == 1 else ''})"
    return '""' if value == "" else str(value)


def _values(cfg: CfgNode) -> dict[str, Any]:
    """What can change the number."""
    return {k: v for k, v in flat(cfg).items() if k not in MACHINE + OF_THE_WEIGHTS}


def _digest(values: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in values.items() if k not in OF_THE_ARCHITECTURE}
    kept |= {"SOLVER.REFERENCE_WORLD_SIZE": 0, "TEST.EXPECTED_RESULTS": []}  # part of the hash since @1
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_part(dataset: str, images: int) -> bool:
    return IMAGES.get(dataset, images) != images


def _fewer(dataset: str, images: int) -> str:
    return f"{dataset} of {images} images instead of {IMAGES[dataset]}"
