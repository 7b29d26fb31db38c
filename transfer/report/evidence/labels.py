"""Labels that tell different weights apart, and one label for the same weights."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from transfer.evaluation.provenance import file_labels
from transfer.report.evidence.records import Record


def named(records: Sequence[Record]) -> list[Record]:
    """Each record with the label of its row.

    A label given in one command names the same weights where another gave none. Without any it is that of
    `file_labels`; labels that were given alike are seeds of one method. The momentum network of a file whose
    online one was evaluated too is "LABEL (ema)".
    """
    records = _told_apart(_named_alike(list(records)))
    branches: dict[tuple[str, str], set[str]] = defaultdict(set)
    for r in records:
        branches[r.label, r.sha256].add(r.identity[1])
    return [
        _labelled(r, f"{r.label} (ema)")
        if r.identity[1] == "ema" and len(branches[r.label, r.sha256]) > 1
        else r
        for r in records
    ]


def _labelled(r: Record, label: str) -> Record:
    return dataclasses.replace(r, values={**r.values, "label": label})


def _named_alike(records: list[Record]) -> list[Record]:
    given: dict[str, set[str]] = defaultdict(set)
    for r in records:
        if r.sha256 and r["label"]:
            given[r.sha256].add(r.label)
    return [
        _labelled(r, *given[r.sha256]) if not r["label"] and len(given.get(r.sha256, ())) == 1 else r
        for r in records
    ]


def _told_apart(records: list[Record]) -> list[Record]:
    unnamed = [r for r in records if not r["label"] and r.sha256]
    places: dict[str, str] = {}  # of one file found in several places the first
    for r in unnamed:
        places.setdefault(r.sha256, str((r["weights"] or {}).get("path") or ""))
    labels = file_labels(list(places.values()))
    return [
        _labelled(r, labels[places[r.sha256]]) if not r["label"] and r.sha256 in places else r
        for r in records
    ]


def printable(value: Any) -> Any:
    """Texts anywhere in `value` without control characters, which a terminal would act on."""
    if isinstance(value, str):
        return (
            value
            if value.isprintable()
            else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
        )
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [printable(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: printable(v) for k, v in fields.items()})
    return value


def file_name(text: str) -> str:
    """`text` in letters, digits, points, dashes and underscores alone, as a file's name may have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:100] or "unnamed"
