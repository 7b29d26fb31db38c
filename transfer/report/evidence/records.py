"""A line of results.jsonl with its row's name, and whether it is stale or altered."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from pathlib import Path
from typing import Any

from pretrain.common.errors import UserError
from pretrain.common.files import sha256_of
from pretrain.data.datasets import CLASS_COUNTS
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.provenance import weights_name
from transfer.options.weights import RAW_PIXELS

DETECTION_HASHES = {
    "coco_R50_C4_2x@1": ["9fab3e45eb7ca8fb"],
    "voc_R50_C4_24k@1": ["34bc001fe79bfb8d"],
}
"""Of the shipped configurations that published figures are known for: detectron2 is not asked here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a results.jsonl and where it stands."""

    values: dict[str, Any]
    """The line as it was written (see transfer/evaluation/results.py for the fields)."""
    folder: Path
    """Folder of the results.jsonl."""
    root: int
    """Position on the command line of the DIR that it was found under."""
    stale: str = ""
    """Why the result no longer describes what is on the disk; empty when it does or nobody can tell."""
    altered: str = ""
    """In which way it was not evaluated by the protocol that its name stands for."""

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def label(self) -> str:
        """The name of its row: what --label gave, else `weights_name`."""
        return str(self["label"] or weights_name(str((self["weights"] or {}).get("path") or "")))

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the weights file; empty where there is none."""
        return str((self["weights"] or {}).get("sha256") or "")

    @property
    def identity(self) -> tuple[str, str]:
        """What tells weights apart: sha256 and branch; the first empty where there is no file."""
        return self.sha256, str((self["weights"] or {}).get("branch") or "")

    @property
    def checkpoint(self) -> str:
        """Its identity as one word; empty where there is no file."""
        return ":".join(self.identity) if self.sha256 else ""

    @property
    def fixed(self) -> bool:
        """Whether nothing about it is random but the choice of the images."""
        return self["seed"] is None and (self["weights"] or {}).get("path") == RAW_PIXELS

    @property
    def conditions(self) -> dict[str, Any]:
        """What beside protocol, weights, seed and share of labels can change the number (`evaluated_under`);
        of lines without that field what they say elsewhere. What is not in it is unknown."""
        if isinstance(self["evaluated_under"], dict) and self["evaluated_under"]:
            return self["evaluated_under"]
        weights, settings = self["weights"] or {}, self["settings"] or {}
        mixed = {True: "mixed", False: "float32"}.get(settings.get("mixed_precision", ""))
        found = {
            "image_size": self["image_size"], "mean": weights.get("mean"), "std": weights.get("std"),
            "precision": settings.get("precision", mixed), "n": self["n"],
        }  # fmt: skip
        return {key: value for key, value in found.items() if value is not None}

    @property
    def warnings(self) -> list[str]:
        """Why the figure may say nothing; of lines without that field, a loss that guessing has too."""
        if isinstance(self["warnings"], list):
            return [str(w) for w in self["warnings"]]
        loss, classes = (self["settings"] or {}).get("train_loss"), CLASS_COUNTS.get(str(self["dataset"]))
        if isinstance(loss, (int, float)) and classes and loss >= math.log(classes):
            return [
                f"nothing was learnt: a training loss of {loss:.2f}, guessing has {math.log(classes):.2f}"
            ]
        return []

    @property
    def protocol(self) -> str:
        """name@version, the way it is given on the command line."""
        return protocol_name(self["protocol"] or {})


def protocol_name(protocol: dict[str, Any]) -> str:
    """name@version, or the name alone where no version is recorded."""
    name, version = str(protocol.get("name", "unnamed")), protocol.get("version")
    return name if version is None or "@" in name else f"{name}@{version}"


PROTOCOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}@[0-9]{1,9}")


@functools.cache
def _sha256_here(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)


def why_stale(line: dict[str, Any]) -> str:
    """Compare the record with today's weights file, where it is at hand."""
    weights = line.get("weights") or {}
    path = Path(str(weights.get("path") or ""))
    recorded = weights.get("sha256")
    if recorded and os.path.isfile(path):  # which no odd name makes fail
        stat = path.stat()
        if _sha256_here(path, stat.st_size, stat.st_mtime_ns) != recorded:
            return "the weights file has changed since"
    return ""


def why_altered(line: dict[str, Any]) -> str:
    """How the evaluation differs from the protocol that is shipped under its name; empty where it does not,
    or where nothing is shipped under that name."""
    protocol = line.get("protocol") or {}
    told = [str(d) for d in [*(protocol.get("differs") or []), *(line.get("deviations") or [])]]
    name, found = protocol_name(protocol), str(protocol.get("hash") or "")
    shipped = DETECTION_HASHES.get(name) or [protocol_hash_today(name)]
    if not told and found and any(shipped) and found not in shipped:
        told = ["other values than the shipped file has"]
    return "; ".join(told)


@functools.cache
def protocol_hash_today(name: str) -> str:
    """Hash of the protocol file of this name, empty where this version of the project has none."""
    if not PROTOCOL_NAME.fullmatch(name):  # a stranger's may be a path, or too long for one
        return ""
    try:
        return load_protocol(name).hash
    except UserError:
        return ""
