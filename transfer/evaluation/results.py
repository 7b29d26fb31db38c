"""Results: one JSON line each in OUTPUT/results.jsonl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import platform
import reprlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.common.files import append_jsonl, read_jsonl
from pretrain.common.progress import counted
from transfer.evaluation.provenance import commit

logger = logging.getLogger(__name__)

FILE = "results.jsonl"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "detectron2", "sal-detectron2")
NONE = type(None)
KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "str | None": (str, NONE), "int": (int,), "int | None": (int, NONE), "float": (int, float),
    "dict[str, float]": (dict,), "dict[str, Any]": (dict,), "dict[str, str]": (dict,), "list[str]": (list,),
}  # fmt: skip
"""What a field of a Result may be, by its annotation; words of a Literal are those of later versions too."""
NUMBER = (int, float, NONE)
INSIDE: dict[str, dict[str, tuple[type, ...]]] = {
    "protocol": {"name": (str, NONE), "version": (int, str, NONE), "hash": (str, NONE),
                 "differs": (list, NONE)},
    "weights": {
        "path": (str, NONE), "sha256": (str, NONE), "format": (str, NONE), "branch": (str, NONE),
    },
    "settings": {
        "folder": (str, NONE), "train_loss": NUMBER, "world_size": NUMBER, "num_gpus": NUMBER, "bank": NUMBER,
        "metric": (str, NONE), "sweep": (list, NONE), "intervals": (dict, NONE), "unreadable": (dict,),
    },
}  # fmt: skip
"""What the entries that are read again may be; others are shown at most."""
LONGEST_NAME = 100  # of a metric
LARGEST = 2**63
_short = reprlib.repr


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure or set of figures that one evaluation gave, with all that is needed to compare it."""

    task: Literal[
        "knn", "linear", "semisup", "detection", "segmentation", "keypoints", "semantic", "spectrum"
    ]
    dataset: str
    split: str
    """test, and in brackets which split of several, and what is missing of the set."""
    n: int
    """Images evaluated, each counted once."""
    metrics: dict[str, float]
    """In percent: knn top1_k20, top5_k20 … (and mean_per_class_k20 … where the data set is reported in it);
    linear and semisup top1, top5, mean_per_class or mAP; detection, segmentation and keypoints COCO's or
    VOC's AP and AR; semantic mIoU, mACC, pACC and fwIoU. Of task spectrum in units of their
    own (transfer/spectrum/)."""
    protocol: dict[str, Any]
    """name, version and hash of its content; `differs`: what a detector's run has otherwise than the
    config of that name as it ships (the hash is then that of both)."""
    weights: dict[str, Any]
    """path, sha256, format and branch (online or ema); mean and std that images were normalised with."""
    arch: str | None = None
    label: str | None = None
    """The row's name in the report."""
    label_percent: float = 100
    """Share of the training labels that were used."""
    epoch: int | None = None
    iteration: int | None = None
    selection: Literal["last", "best", "held-out"] = "last"
    """last: at the end of training. best: the epoch or head that is best on the split reported, as some
    published protocols have it. held-out: chosen on a part of the training images kept aside."""
    seed: int | None = None
    """None where nothing is random."""
    image_size: int | None = None
    """Side of the evaluated images, px."""
    evaluated_under: dict[str, Any] = field(default_factory=dict)
    """Everything beside protocol, weights, seed and share of labels that can change the number: image_size,
    resize, fit (crop or whole), interpolation, mean, std, precision, n and n_train, images (a hash of which,
    where the data set's name does not say it), labels (a hash of the labelled ones) and world_size (where
    BatchNorm is trained on a rank's own images) of a fine-tuning."""
    evaluated_under_hash: str = ""
    """The first 12 hexadecimal digits of the SHA-256 of `evaluated_under` as canonical JSON."""
    deviations: list[str] = field(default_factory=list)
    """In which ways the evaluation was not the protocol's own, and by whose wish."""
    warnings: list[str] = field(default_factory=list)
    """Why the figure may say nothing: a classifier that learnt nothing, training and test images alike."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else matters: the chosen head, temperature, configuration file; parameters of the backbone, and
    multiply_adds of its convolutions and matrix products over one image (a product and its sum are one). Of
    imagefolder and webdataset `folder`, the folder's name: to be shown, a copy may have another."""
    seconds: float = 0.0
    started_at: str = ""
    """UTC, ISO 8601."""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None

    def __post_init__(self) -> None:
        """Derives the hash. Raises ValueError for figures that are no percentages, fields of another kind."""
        check(vars(self))
        digest = hash_of(self.evaluated_under) if self.evaluated_under else ""
        object.__setattr__(self, "evaluated_under_hash", digest)


def check(values: Mapping[str, Any]) -> None:
    """Raises ValueError unless what `values` holds of a Result's fields is of their kinds, its figures
    percentages, but those of task spectrum."""
    for f in dataclasses.fields(Result):
        value, kinds = values.get(f.name), KINDS.get(str(f.type), (str,))
        if f.name in values and not _is(value, kinds):
            raise ValueError(f"{f.name} is {_short(value)}, which is no {f.type}")
        found: dict[str, Any] = value if isinstance(value, dict) else {}
        inside = INSIDE.get(f.name, {})
        for key in sorted(inside.keys() & found.keys()):
            if not _is(found[key], inside[key]):
                known = " or ".join("null" if k is NONE else k.__name__ for k in inside[key])
                raise ValueError(f"{f.name}.{key} is {_short(found[key])}, which is no {known}")
        if f.name != "metrics" and not _plain(value):
            raise ValueError(f"{f.name} holds a number that is not finite or too large")
    for key in ("deviations", "warnings"):
        _all_of(str, key, values.get(key, []))
    _all_of(str, "protocol.differs", values.get("protocol", {}).get("differs") or [])
    _all_of(dict, "settings.sweep", values.get("settings", {}).get("sweep") or [])
    for name, value in values.get("metrics", {}).items():
        if len(name) > LONGEST_NAME:
            raise ValueError(f"{_short(name)} is no name of a metric: {len(name):,} characters")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {_short(value)}, which is no number")
        if values.get("task") != "spectrum" and not -1 <= value <= 100:
            raise ValueError(f"{name} is {_short(value)}, which is no percentage")
        if not _plain(value):
            raise ValueError(f"{name} is {_short(value)}: not finite, or too large")
    if values.get("n", 1) <= 0:
        raise ValueError("a result over no image")
    left_out = values.get("settings", {}).get("unreadable", {})
    if not all(type(n) is int for n in left_out.values()):
        raise ValueError(f"unreadable is {_short(left_out)}, which are no counts of images")


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _all_of(kind: type, name: str, entries: Sequence[Any]) -> None:
    wrong = next((e for e in entries if not isinstance(e, kind)), None)
    if wrong is not None:
        raise ValueError(f"{name} holds {_short(wrong)}, which is no {kind.__name__}")


def _plain(value: Any) -> bool:
    """Whether all numbers in it can be computed with: finite, whole ones below LARGEST."""
    if isinstance(value, dict | list):
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < LARGEST


def hash_of(conditions: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]


def append(output: str | Path, *results: Result) -> None:
    """Append `results`, a line each, to `output`/results.jsonl: all of them or, where a kill comes, none."""
    append_jsonl(Path(output) / FILE, *map(dataclasses.asdict, results))


def read(path: str | Path) -> list[Result]:
    """The results of a results.jsonl, or of the one in a folder, in its order. Lines that hold none are told,
    left out and left where they are."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    known = {f.name for f in dataclasses.fields(Result)}
    found, wrong = [], []
    for record in read_jsonl(path, nan=False):
        try:
            found.append(Result(**{k: v for k, v in record.items() if k in known}))
        except (TypeError, ValueError) as error:
            wrong.append(str(error).removeprefix("Result.__init__() "))
    if wrong:
        logger.warning(
            "%s: %s without a result left out (%s)", path, counted(len(wrong), "line"), "; ".join(wrong[:3])
        )
    return found


def find(output: str | Path, like: Result, *, most_unreadable: int = 0) -> list[Result]:
    """The results in `output` of the same evaluation. A precision "auto" of `like` stands for any.

    `like` counts all images; a result may have left out `most_unreadable` of them.
    """
    return [r for r in read(output) if _same(r, like, most_unreadable)]


def _same(found: Result, like: Result, most_unreadable: int) -> bool:
    """What one result is: task, data, protocol, weights, seed and share of labels, under equal conditions."""
    under, wanted = found.evaluated_under, like.evaluated_under
    if wanted.get("precision") == "auto" and under:
        under = under | {"precision": "auto"}
    left_out = found.settings.get("unreadable")
    if isinstance(left_out, dict) and 0 < sum(left_out.values()) <= most_unreadable:
        parts = {"n": "test", "n_train": "train"}
        wanted = wanted | {key: wanted[key] - left_out.get(part, 0) for key, part in parts.items()}
    return _identity(found) == _identity(like) and under == wanted


def _identity(r: Result) -> tuple[Any, ...]:
    weights = (*(r.weights.get(key) for key in ("sha256", "branch", "read_with")), r.arch)
    return r.task, r.dataset, r.split, r.protocol, weights, r.seed, r.label_percent


class Clock:
    """When an evaluation began and how long it took; `stamp()` gives a Result's fields of origin."""

    def __init__(self) -> None:
        self.started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._began = time.monotonic()

    def stamp(self, device: torch.device) -> dict[str, Any]:
        """seconds, started_at, device, versions and commit."""
        return {
            "seconds": round(time.monotonic() - self._began, 2),
            "started_at": self.started_at,
            "device": device_name(device),
            "versions": versions(),
            "commit": commit(),
        }


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU" with its number of cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
