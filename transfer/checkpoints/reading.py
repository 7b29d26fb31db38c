"""How a file can be read: which network, by which format, as which branch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.common.terminal import printable
from transfer.checkpoints.format import Format
from transfer.checkpoints.formats import CMC, FOREIGN, FOUND, OWN_BACKBONE, OWN_BACKBONE_EMA, OWN_RUN
from transfer.checkpoints.other_networks import all_networks
from transfer.checkpoints.safe_load import RawFile
from transfer.checkpoints.search import (
    EMA_WORDS,
    ONLINE_WORDS,
    Container,
    Network,
    containers,
    role_of,
    unwrap,
)
from transfer.checkpoints.user_format import read_user_format
from transfer.options.weights import WeightsOptions

OWN_FORMAT = "intl-bench/"
BRANCHES: tuple[Literal["online", "ema"], ...] = ("online", "ema")
ANYWHERE = ("", "state_dict", "model", "model_state_dict")
"""Containers of formats whose writer's choice says nothing: others put the same under other names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One network of the file read as `format`."""

    network: Network
    format: Format
    branch: str
    exact: bool
    """The network lies in the container that the format names, not in another one."""
    dropped: dict[str, str]
    """Key as written -> why it is no part of this backbone."""
    left_over: tuple[str, ...]
    reason: str
    """Why the file can not be of this format at all."""
    marked: bool = False
    """The file's top has the key that only this format's writer puts there."""

    @property
    def arch(self) -> str | None:
        """The architecture, or the nearest one where something is missing, left over or wrong."""
        return self.network.match.arch

    @property
    def family(self) -> str:
        """resnet, vit, convnext or timm (others)."""
        return self.network.family

    @property
    def stem(self) -> str:
        """imagenet (7x7) or cifar (3x3), by the shape of conv1."""
        return self.network.match.stem

    @property
    def used(self) -> dict[str, str]:
        """Key as written -> timm's name."""
        return self.network.used

    @property
    def tensors(self) -> dict[str, Tensor]:
        """timm's name -> tensor."""
        return self.network.tensors

    @property
    def faults(self) -> int:
        """How many keys are missing, left over or of a wrong shape under this format."""
        match = self.network.match
        return len(match.missing) + len(self.left_over) + len(match.wrong) + bool(self.reason)

    @property
    def complete(self) -> bool:
        """Whether every tensor of the backbone is there and every other one is explained."""
        return self.faults == 0


def read_all(raw: RawFile, asked: WeightsOptions) -> list[Reading]:
    """Every network of the file, read by every format that has one there; else as found by its layers.

    A file that says it is this project's is read as nothing else. Raises UserError for a --container,
    --prefix or --drop that fits nothing.
    """
    formats, hint = _formats(raw, asked)
    held = _asked_containers(containers(raw.value), asked)
    renames = tuple(
        (place.prefix + old, place.prefix + new)
        for f in formats
        for place in (*f.online, *f.ema)
        for old, new in f.rename
    )
    said: dict[str, Any] = {"arch": asked.arch, "heads": asked.heads, "hint": hint}
    everything = found = [n for c in held for n in all_networks(c, renames, **said)]
    if asked.prefix is not None:
        wanted = unwrap(asked.prefix.strip("."))
        named = [n for n in found if n.prefix in (wanted, f"{wanted}." if wanted else "")]
        if not named:
            there = ", ".join(f"`{n.prefix or '.'}`" for n in found[:8]) or "none"
            raise UserError(f"--prefix {asked.prefix}: no network under it; there are {there}")
        found = named
    return [reading for c in held for reading in _read(c, found, everything, formats, raw, asked)]


def _formats(raw: RawFile, asked: WeightsOptions) -> tuple[tuple[Format, ...], str | None]:
    """The formats to try, and the architecture that the file names."""
    value = raw.value
    if asked.weights_format is not None:
        return (read_user_format(asked.weights_format),), None
    if raw.metadata.get("format", "").startswith(OWN_FORMAT):
        held = raw.metadata.get("branch", "online")
        return ((OWN_BACKBONE,) if held == "online" else (OWN_BACKBONE_EMA,)), raw.metadata.get("arch")
    formats, hint = (*FOREIGN, CMC), None
    if isinstance(value, dict):
        if str(value.get("format", ""))[:40].startswith(OWN_FORMAT):
            formats = (OWN_RUN,)
        named = value.get("arch", "")  # MoCo's and timm's training scripts write it beside the weights
        hint = named if isinstance(named, str) and 0 < len(named) < 80 else None
    return formats, hint


def _asked_containers(found: list[Container], asked: WeightsOptions) -> list[Container]:
    if asked.container is not None:
        wanted = asked.container.strip(".")
        named = [c for c in found if c.path == wanted]
        if not named:
            there = ", ".join(f"`{c.path or '.'}`" for c in found[:8]) or "none"
            raise UserError(f"--container {asked.container}: no tensors there; they are in {there}")
        found = named
    if asked.drop is None:
        return found
    drops = [unwrap(part) for part in asked.drop.split(",") if part]
    names = [name for c in found for name in c.names.values()]
    for drop in drops:
        if not any(name.startswith(drop) for name in names):
            raise UserError(f"--drop {drop}: no key begins like this; `transfer inspect --keys` lists them")
    kept = []
    for c in found:
        out = tuple(key for key, name in c.names.items() if name.startswith(tuple(drops)))
        tensors = {key: tensor for key, tensor in c.tensors.items() if key not in set(out)}
        kept.append(dataclasses.replace(c, tensors=tensors, dropped=out))
    return kept


def _read(
    container: Container, found: list[Network], everything: list[Network], formats: tuple[Format, ...],
    raw: RawFile, asked: WeightsOptions,
) -> list[Reading]:  # fmt: skip
    """The container's networks that are `found` by every format, and as they lie where no format is complete
    there, beside `everything` else."""
    here = [n for n in found if n.container is container]
    role = _role(container, raw.value)
    readings: list[Reading] = []
    for format_ in formats:
        for branch, places in (("online", format_.online), ("ema", format_.ema)):
            for place in dict.fromkeys(places):
                exact = place.container == container.path
                if not exact and place.container not in ANYWHERE:
                    continue
                taken = branch
                if role == "ema" and place.container != container.path:
                    if branch == "ema":
                        continue
                    taken = "ema"
                if role == "averaged":
                    if branch == "ema":
                        continue
                    taken, exact = "ema", True
                marked = bool(format_.top) and isinstance(raw.value, dict) and format_.top in raw.value
                readings += [
                    dataclasses.replace(_by_format(n, format_, taken, place.prefix, exact), marked=marked)
                    for n in here
                    if n.prefix == place.prefix
                ]
    if any(r.complete for r in readings) or formats in ((OWN_RUN,), (OWN_BACKBONE,), (OWN_BACKBONE_EMA,)):
        return readings
    beside = [n for n in everything if n.container is container]
    return readings + [_by_layers(n, beside, role) for n in here]


def _role(container: Container, value: Any) -> str | None:
    """What the container's names say of its branch.

    Lightning's weight averaging puts the average under state_dict and the network in training under
    current_model_state (pytorch_lightning/callbacks/weight_averaging.py, since 2.6).
    """
    if container.path == "state_dict" and isinstance(value, dict) and "current_model_state" in value:
        return "averaged"
    return role_of(container.path)


def _by_format(network: Network, format_: Format, branch: str, prefix: str, exact: bool) -> Reading:
    names = network.container.names
    others = [
        (p.prefix, f"{name} branch")
        for name, places in (("online", format_.online), ("ema", format_.ema))
        for p in places
        if p.prefix and p.prefix != prefix and p.container in (*ANYWHERE, network.container.path)
    ]
    reason = network.match.reason
    if format_.families and network.family not in format_.families:
        reason = reason or f"{format_.name} is of other networks"
    for needs in (format_.needs, format_.also_needs):
        if needs and not any(name.startswith(needs) for name in names.values()):
            reason = reason or f"a file of {format_.name} has {' or '.join(needs)}"
    dropped, left_over = _sort_beside(network, (*format_.drop, *others))
    return Reading(
        network=network, format=format_, branch=branch, exact=exact, dropped=dropped,
        left_over=left_over, reason=reason,
    )  # fmt: skip


def _by_layers(network: Network, here: list[Network], role: str | None) -> Reading:
    """The network without a known writer: beside it only its own classifier and the other branch."""
    roles = {id(n): role_of(n.prefix) for n in here}
    online = [_core(n.prefix) for n in here if roles[id(n)] == "online"]
    for n in here:
        if roles[id(n)] is None and _core(n.prefix) in online:  # backbone beside student_backbone
            roles[id(n)] = "ema"
    mine = roles[id(network)]
    branch = "ema" if role in ("ema", "averaged") else mine or "online"
    heads = ("fc.",) if network.family == "resnet" else ("head.", "head_dist.", "classifier.", "fc.")
    explained = [(f"{network.prefix}{head}", "classifier") for head in heads]
    for other in here:
        theirs = roles[id(other)]
        if other is not network and other.complete and (theirs or "online") != (mine or "online"):
            explained.append((other.prefix, f"{theirs or 'online'} branch"))
    dropped, left_over = _sort_beside(network, explained)
    return Reading(
        network=network, format=FOUND, branch=branch, exact=False, dropped=dropped, left_over=left_over,
        reason=network.match.reason,
    )  # fmt: skip


def _core(prefix: str) -> list[str]:
    """The words of a prefix that do not name a branch."""
    words = re.split(r"[^a-z0-9]+", prefix.lower())
    return [word for word in words if word and word not in EMA_WORDS | ONLINE_WORDS]


def _sort_beside(
    network: Network, explained: Iterable[tuple[str, str]]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The container's keys beside the network: those explained, and those left over."""
    container = network.container
    dropped = dict.fromkeys(container.others, "not a tensor") | dict.fromkeys(container.dropped, "--drop")
    doubled = {text.partition(" (a second ")[0] for text in network.doubled}
    left_over = list(network.doubled)
    for key, name in container.names.items():
        if key in network.used or key in doubled:
            continue
        why = longest(name, explained)
        if why:
            dropped[key] = why
        else:
            left_over.append(key)
    file_key = {target: key for key, target in network.used.items()}
    return dropped, (*left_over, *(file_key.get(target, target) for target in network.match.extra))


def longest(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """What the longest prefix of `name` stands for; "" when none fits."""
    fitting = [(len(p), why) for p, why in prefixes if name.startswith(p)]
    return max(fitting)[1] if fitting else ""


# ------------------------------------------------------------------ choosing one, or saying how to


def choose(readings: list[Reading], asked: WeightsOptions, path: Path) -> Reading:
    """The complete reading of the branch. Several count as one when they load the same tensors alike."""
    branch = asked.branch or "online"
    complete = [r for r in readings if r.complete]
    fitting = [r for r in complete if r.branch == branch]
    if not fitting and complete:
        if asked.prefix is not None or asked.container is not None:
            fitting = complete
        else:
            other = complete[0]
            raise UserError(
                f"{path} ({other.format.name}) has no {branch} branch, but a complete {other.branch} one: "
                f"take it with --branch {other.branch}"
            )
    if not fitting:
        raise UserError(_incomplete(readings, branch, path))
    places: list[Reading] = []
    for reading in fitting:
        if not any(_same(reading.network, other.network) for other in places):
            places.append(reading)
    if len(places) > 1:
        ways = "; ".join(f"{r.network.place}: {words(r, readings, place=True)}" for r in places)
        raise UserError(
            f"{path} is ambiguous, several networks could be its {branch} branch; name one. {ways}"
        )
    return max(
        (r for r in fitting if _same(r.network, places[0].network)),
        key=lambda r: (
            r.exact, r.marked, bool(r.format.needs), len(set(r.dropped.values())),
            r.stem == "cifar" and bool(r.format.cifar_padding),
        ),
    )  # fmt: skip


def _same(one: Network, other: Network) -> bool:
    """Whether two networks are one, or hold the same numbers."""
    if one is other or (one.container is other.container and one.used == other.used):
        return True
    a, b = one.tensors, other.tensors
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


def words(reading: Reading, readings: list[Reading], *, place: bool = False) -> str:
    """The options that take this network: --container and --prefix where there are others, --drop."""
    nets = {id(r.network): r.network for r in readings if r.network.complete}.values()
    network = reading.network
    out = []
    if len({n.container.path for n in nets}) > 1:
        out.append(f"--container {network.container.path or '.'}")
    if network.prefix or len([n for n in nets if n.container is network.container]) > 1:
        out.append(f"--prefix {network.prefix or '.'}")
    groups = _groups(reading)
    if groups:
        out.append(f"--drop {','.join(groups)}")
    if place and not out:
        out.append("--prefix .")
    return " ".join(out)


def _groups(reading: Reading) -> dict[str, int]:
    """Beginnings of the keys left over that no key of the backbone shares -> how many keys each has."""
    names = reading.network.container.names
    mine = [names[key] for key in reading.used]
    groups: dict[str, int] = {}
    for key in reading.left_over:
        name = names.get(key, key)
        parts = name.split(".")
        starts = [".".join(parts[: i + 1]) + "." for i in range(len(parts) - 1)] + [name]
        start = next((s for s in starts if not any(m.startswith(s) for m in mine)), name)
        groups[start] = groups.get(start, 0) + 1
    return groups


def _incomplete(readings: list[Reading], branch: str, path: Path) -> str:
    if not readings:
        return f"{path} holds no network of timm's"
    whole: dict[int, Reading] = {}
    for r in readings:
        if r.network.complete and not r.network.doubled and not r.reason:
            best = whole.get(id(r.network))
            if best is None or len(r.left_over) < len(best.left_over):
                whole[id(r.network)] = r
    if whole:
        lines = []
        for r in list(whole.values())[:6]:
            groups = _groups(r)
            shown = ", ".join(f"`{start}` ({n})" for start, n in list(groups.items())[:12])
            left = f"; left over: {shown}" if shown else ""
            lines.append(f"{r.network.place}{left}. Take it with {words(r, readings, place=True)}")
        return printable(f"{path}: " + "\n  ".join(lines))
    reasons = [r.network.match.reason for r in readings]
    if all(reasons):
        return f"{path} holds no network that can be judged: {reasons[0]}"
    nearest = min(
        readings,
        key=lambda r: (
            r.faults - 0.5 * (r.branch == branch) - 0.25 * r.exact - 0.1 * bool(r.format.needs),
            -len(r.used),
        ),
    )
    lines = [
        f"{path}: the backbone is not complete. Nearest known format: {nearest.format.name}, "
        f"{nearest.branch} branch, {nearest.arch or 'no known architecture'}",
        *faults_of(nearest),
    ]
    return "\n  ".join(lines)


def faults_of(reading: Reading, limit: int = 8) -> list[str]:
    """What keeps the reading from being complete, a line a kind, at most `limit` keys each."""
    lines = [reading.reason] if reading.reason else []
    match = reading.network.match
    kinds = (("missing", match.missing), ("left over", reading.left_over), ("wrong shape", match.wrong))
    for kind, keys in kinds:
        if keys:
            more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
            lines.append(f"{kind}: {', '.join(keys[:limit])}{more}")
    return [printable(line) for line in lines]
