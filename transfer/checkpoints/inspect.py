"""`transfer inspect`: what a checkpoint holds, and whether its backbone loads completely."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.common.terminal import console, printable
from transfer.checkpoints.backbone import Found, find
from transfer.checkpoints.families.match import COUNTER, features_of
from transfer.checkpoints.forward import check
from transfer.checkpoints.inert_values import Placeholder
from transfer.checkpoints.reading import BRANCHES, Reading, choose, faults_of, read_all
from transfer.checkpoints.safe_load import RawFile, load_file
from transfer.checkpoints.sanity import doubts_of
from transfer.checkpoints.search import containers, unwrap
from transfer.options.commands import parse
from transfer.options.weights import InspectSettings, WeightsOptions
from transfer.zoo.download import located


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `python -m transfer inspect` says about one file."""

    path: str
    size_bytes: int
    packed_as: str
    holds: dict[str, str]
    """Top-level key -> what is under it."""
    branches: dict[Literal["online", "ema"], str]
    """online, ema -> complete, or what is wrong with the nearest reading."""
    found: Found | None
    """The backbone of the branch asked for, or of the only complete one; None when none is complete."""
    doubts: tuple[str, ...]
    """What should make a user look again."""
    problem: str
    """Why nothing could be loaded; "" otherwise."""


def inspect_file(path: str | Path, asked: WeightsOptions | None = None) -> Inspection:
    """Look through `path` and check its backbone as evaluations do. Raises UserError for no checkpoint."""
    path, asked, entry = located(path, asked or WeightsOptions())
    raw = load_file(path)
    branches = dict.fromkeys(BRANCHES, "none")
    found, problem, doubts = None, "", []
    try:
        readings = read_all(raw, asked)
        branches = {name: _state(readings, name, asked) for name in BRANCHES}
        wanted = asked.branch or next((name for name in BRANCHES if branches[name] == "complete"), "online")
        found = find(raw, path, asked.reading(branch=wanted))
        check(found.reading)
        doubts = doubts_of(found.reading.tensors)
        if entry is not None:
            doubts += entry.doubts(found.reading.arch, found.reading.format.name)
    except UserError as error:
        found, problem = None, str(error)
    return Inspection(
        path=str(path),
        size_bytes=Path(path).stat().st_size,
        packed_as=raw.container,
        holds=_outline(raw),
        branches=branches,
        found=found,
        doubts=tuple(doubts),
        problem=problem,
    )


def _state(readings: list[Reading], branch: str, asked: WeightsOptions) -> str:
    writers = {r.format.name for r in readings if r.complete} or {r.format.name for r in readings}
    of_branch = [r for r in readings if r.branch == branch and r.format.name in writers]
    if not of_branch:
        return "none"
    if any(r.complete for r in of_branch):
        try:
            choose(of_branch, asked.reading(branch=branch), Path("the file"))
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
    return {str(key)[:80]: _kind(item) for key, item in list(value.items())[:30]}


def _kind(item: Any) -> str:
    if isinstance(item, dict) and any(isinstance(v, Tensor) for v in item.values()):
        return _prefixes(item)
    if isinstance(item, Tensor):
        return f"tensor {tuple(item.shape)}"
    if isinstance(item, (dict, list, tuple)):
        return f"{type(item).__name__} of {len(item)}"
    if isinstance(item, (str, bytes)):
        return repr(item[:60])
    if isinstance(item, int) and item.bit_length() > 200:
        return f"a number of {item.bit_length()} bits"
    if isinstance(item, (set, frozenset)):
        return f"{type(item).__name__} of {len(item)}"
    if isinstance(item, Placeholder) and isinstance(item.state, dict):
        return f"{item.name}, not loaded, with {', '.join(str(k)[:20] for k in list(item.state)[:5])}"
    text = repr(item)
    return text if len(text) <= 60 else text[:57] + "..."


def _prefixes(state: dict[Any, Any]) -> str:
    counts = Counter(
        unwrap(str(key)).partition(".")[0][:40] for key, v in state.items() if isinstance(v, Tensor)
    )
    shown = ", ".join(f"{name} ({count})" for name, count in counts.most_common(8))
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    return f"{sum(counts.values())} tensors: {shown}{more}"


def as_dict(found: Inspection) -> dict[str, Any]:
    """Plain values for `--json`."""
    out = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "found"}
    out["loads"] = found.found is not None
    if found.found is not None:
        reading = found.found.reading
        out |= {"arch": reading.arch, **found.found.weights, "metadata": found.found.metadata}
        out |= {"used": reading.used, "dropped": reading.dropped, "notes": found.found.notes}
        out |= {"parameters": _parameters(reading), "features": _features(reading)}
    return out


def _parameters(reading: Reading) -> int:
    buffers = (COUNTER, "running_mean", "running_var", "rope.periods", "relative_position_index", "attn_mask")
    return sum(t.numel() for k, t in reading.tensors.items() if not k.endswith(buffers))


def _features(reading: Reading) -> int:
    """Length of the features: channels of the last block."""
    if reading.family != "resnet":
        return features_of(str(reading.arch), reading.network.match.options)
    block = max(int(k.split(".")[1]) for k in reading.tensors if k.startswith("layer4."))
    norms = [k for k in reading.tensors if k.startswith(f"layer4.{block}.bn") and k.endswith(".weight")]
    return reading.tensors[max(norms)].numel()


def rows(found: Inspection) -> list[tuple[str, str]]:
    """The table: what is asked, and the answer."""
    out = [
        ("file", f"{found.path}, {found.size_bytes / 1e6:.1f} MB, {found.packed_as}"),
        ("holds", "\n".join(f"{key}: {kind}" for key, kind in found.holds.items())),
    ]
    if found.found is not None:
        reading, forward = found.found.reading, found.found.forward
        if forward.stem is None:
            what = found.found.weights["network"]
        else:
            what = f"{forward.stem} stem"
            what += "" if forward.stem == "imagenet" else f", padding {forward.stem_padding}"
        place = reading.network
        out += [
            ("format", reading.format.name),
            ("place", f"{place.container.path or 'top'}, prefix {place.prefix or '(bare)'}"),
            ("architecture", f"{reading.arch}, {what}" if what else str(reading.arch)),
            ("backbone", f"{_parameters(reading):,} parameters, {_features(reading)} features"),
        ]
    out += [("branches", "\n".join(f"{name}: {state}" for name, state in found.branches.items()))]
    if found.found is not None:
        reading, weights = found.found.reading, found.found.weights
        reasons = Counter(reading.dropped.values())
        dropped = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        out += [
            ("used", f"{len(reading.used)} tensors of the {reading.branch} branch, each once"),
            ("dropped", dropped or "nothing"),
            ("read with", weights.get("read_with", "")),
            ("sha256", weights["sha256"]),
            ("metadata", "\n".join(f"{key}: {value}" for key, value in found.found.metadata.items())),
            ("notes", "\n".join(found.found.notes)),
            ("doubts", "\n".join(found.doubts)),
        ]
    out += [("result", found.problem or "complete: the backbone loads")]
    return [(name, printable(text)) for name, text in out if text]


def _print_table(found: Inspection, *, keys: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(found):
        style = {"result": "green" if found.found else "red"}.get(name, "")
        table.add_row(name, Text(text, style=style))
    screen.print(table)
    if keys and found.found is not None:
        for key, target in found.found.reading.used.items():
            print(printable(f"{key} -> {target}"))
        for key, reason in found.found.reading.dropped.items():
            print(printable(f"{key} dropped: {reason}"))
    elif keys:
        for container in containers(load_file(found.path).value):
            for key, tensor in container.tensors.items():
                print(printable(f"{container.path[:200] or 'top'}: {key[:200]} {tuple(tensor.shape)}"))


def main(argv: list[str]) -> int:
    """`python -m transfer inspect FILE`: exit code 0 when the backbone loads, 2 when it does not."""
    options: InspectSettings = parse("inspect", argv)
    found = inspect_file(options.file, options)
    if options.json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        _print_table(found, keys=options.keys)
    return 0 if found.found is not None else 2
