"""`transfer inspect`: what a checkpoint holds, and whether its backbone loads completely."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.common.errors import UserError
from transfer.checkpoints.backbone import (
    BRANCHES,
    Backbone,
    Reading,
    choose,
    faults_of,
    load_reading,
    printable,
    read_all,
    unwrap,
)
from transfer.checkpoints.safe_load import RawFile, load_file
from transfer.options import InspectSettings, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `python -m transfer inspect` says about one file."""

    path: str
    size_bytes: int
    packed_as: str
    holds: dict[str, str]
    """Top-level key -> what is under it."""
    branches: dict[str, str]
    """online, ema -> complete, or what is wrong with the nearest reading."""
    loaded: Backbone | None
    """The backbone of the branch asked for, or of the only complete one; None when none is complete."""
    problem: str
    """Why nothing could be loaded; "" otherwise."""


def inspect_file(path: str | Path, *, arch: str | None = None, branch: str | None = None) -> Inspection:
    """Look through `path` and load its backbone as evaluations do. Raises UserError for no checkpoint."""
    raw = load_file(path)
    readings = read_all(raw, arch=arch)
    branches = {name: _state(readings, name) for name in BRANCHES}
    wanted = branch or next((name for name in BRANCHES if branches[name] == "complete"), "online")
    loaded, problem = None, ""
    try:
        loaded = load_reading(raw, readings, path, arch=arch, branch=wanted)
    except UserError as error:
        problem = str(error)
    return Inspection(
        path=str(path),
        size_bytes=Path(path).stat().st_size,
        packed_as=raw.container,
        holds=_outline(raw),
        branches=branches,
        loaded=loaded,
        problem=problem,
    )


def _state(readings: list[Reading], branch: str) -> str:
    writers = {r.format.name for r in readings if r.complete} or {r.format.name for r in readings}
    of_branch = [r for r in readings if r.branch == branch and r.format.name in writers]
    if not of_branch:
        return "none"
    if any(r.complete for r in of_branch):
        try:
            choose(of_branch, branch, Path("the file"))
        except UserError:
            return "ambiguous"
        return "complete"
    best = min(of_branch, key=lambda r: r.faults)
    return f"incomplete as {best.format.name}: {'; '.join(faults_of(best, limit=2))}"


def _outline(raw: RawFile) -> dict[str, str]:
    """Top-level keys and what is under them; a plain state dict by the first part of its keys."""
    value = raw.value
    if not isinstance(value, dict):
        return {"(top)": type(value).__name__}
    if any(isinstance(v, Tensor) for v in value.values()):
        return {"(top)": _prefixes(value)}
    return {str(key): _kind(item) for key, item in list(value.items())[:30]}


def _kind(item: Any) -> str:
    if isinstance(item, dict) and any(isinstance(v, Tensor) for v in item.values()):
        return _prefixes(item)
    if isinstance(item, Tensor):
        return f"tensor {tuple(item.shape)}"
    if isinstance(item, (dict, list, tuple)):
        return f"{type(item).__name__} of {len(item)}"
    text = repr(item)
    return text if len(text) <= 60 else text[:57] + "..."


def _prefixes(state: dict[Any, Any]) -> str:
    counts = Counter(unwrap(str(key)).partition(".")[0] for key, v in state.items() if isinstance(v, Tensor))
    shown = ", ".join(f"{name} ({count})" for name, count in counts.most_common(8))
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    return f"{sum(counts.values())} tensors: {shown}{more}"


def as_dict(found: Inspection) -> dict[str, Any]:
    """Plain values for `--json`."""
    out = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "loaded"}
    out["loads"] = found.loaded is not None
    if found.loaded is not None:
        loaded = found.loaded
        out |= {"arch": loaded.arch, **loaded.weights, "metadata": loaded.metadata, "used": loaded.used}
        out |= {"dropped": loaded.dropped, "notes": loaded.notes}
        out |= {"parameters": _parameters(loaded), "features": loaded.network().num_features}
    return out


def _parameters(loaded: Backbone) -> int:
    return sum(p.numel() for p in loaded.network().parameters())


def rows(found: Inspection) -> list[tuple[str, str]]:
    """The table: what is asked, and the answer."""
    out = [
        ("file", f"{found.path}, {found.size_bytes / 1e6:.1f} MB, {found.packed_as}"),
        ("holds", "\n".join(f"{key}: {kind}" for key, kind in found.holds.items())),
    ]
    loaded = found.loaded
    if loaded is not None:
        stem = "" if loaded.stem == "imagenet" else f", padding {loaded.stem_padding}"
        out += [
            ("format", loaded.format),
            ("architecture", f"{loaded.arch}, {loaded.stem} stem{stem}"),
            ("backbone", f"{_parameters(loaded):,} parameters, {loaded.network().num_features} features"),
        ]
    out += [("branches", "\n".join(f"{name}: {state}" for name, state in found.branches.items()))]
    if loaded is not None:
        reasons = Counter(loaded.dropped.values())
        dropped = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        out += [
            ("used", f"{len(loaded.used)} tensors of the {loaded.branch} branch, each once"),
            ("dropped", dropped or "nothing"),
            ("sha256", loaded.sha256),
            ("metadata", "\n".join(f"{key}: {value}" for key, value in loaded.metadata.items())),
            ("notes", "\n".join(loaded.notes)),
        ]
    out += [("result", found.problem or "complete: the backbone loads")]
    return [(name, printable(text)) for name, text in out if text]


def _print_table(found: Inspection, *, keys: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(found):
        style = {"result": "green" if found.loaded else "red"}.get(name, "")
        table.add_row(name, Text(text, style=style))
    console.print(table)
    if keys and found.loaded is not None:
        for key, target in found.loaded.used.items():
            print(printable(f"{key} -> {target}"))
        for key, reason in found.loaded.dropped.items():
            print(printable(f"{key} dropped: {reason}"))


def main(argv: list[str]) -> int:
    """`python -m transfer inspect FILE`: exit code 0 when the backbone loads, 2 when it does not."""
    options: InspectSettings = parse("inspect", argv)
    found = inspect_file(options.file, arch=options.arch, branch=options.branch)
    if options.json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        _print_table(found, keys=options.keys)
    return 0 if found.loaded is not None else 2
