"""The containers of a file and the ResNets in them, wherever they lie and however their layers are named."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pretrain.common.files import whole_number
from transfer.checkpoints.families.match import COUNTER, Match
from transfer.checkpoints.families.resnet import match_arch
from transfer.checkpoints.inert_values import Placeholder

MAX_NODES = 200_000
MAX_DEPTH = 16
EMA_WORDS = frozenset(("ema", "momentum", "teacher", "target", "key", "k", "swa", "averaged", "slow"))
ONLINE_WORDS = frozenset(("student", "online", "query", "q"))

_NETWORK = re.compile(r"(conv1|bn1|layer[1-4])\.")
_BLOCK = re.compile(r"(?P<prefix>(?:.*[./:])?)(?P<stage>layer[1-4]|\d{1,3})\.\d{1,3}\.(?:.*\.)?conv1\.weight")
_STEMS = (
    ("layer0.0.", "layer0.1."), ("layer0.conv1.", "layer0.bn1."), ("stem.0.", "stem.1."),
    ("stem.conv1.", "stem.bn1."), ("stem.conv.", "stem.bn."), ("stem.conv.", "stem.norm."),
    ("conv1.conv.", "conv1.bn."), ("conv.", "bn."), ("conv1.0.", "conv1.1."),
)  # fmt: skip
"""Other names for conv1 and bn1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Container:
    """A state dict somewhere in the file."""

    path: str
    """Keys and indices that lead to it, joined by dots; "" for the top."""
    tensors: dict[str, Tensor]
    """Key as written -> tensor."""
    others: tuple[str, ...] = ()
    """Keys of what is no tensor."""
    dropped: tuple[str, ...] = ()
    """Keys of tensors that the user left out."""
    module: bool = False
    """Taken from a whole pickled module, whose code was not run."""

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Key as written -> key without wrappers, as formats and options name it."""
        return {key: unwrap(key) for key in self.tensors}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Layers of a network under one prefix of one container; `match` says whether it is complete."""

    container: Container
    prefix: str
    used: dict[str, str]
    """Key as written -> timm's name."""
    doubled: tuple[str, ...]
    """Keys that stand for a tensor which another key has given already."""
    match: Match
    dialect: str
    """How its layers are named, where not as torchvision's: indexed, shortcut, ..."""
    family: str = "resnet"
    """resnet, vit, convnext or timm (others)."""
    own_tensors: dict[str, Tensor] | None = None
    """timm's name -> tensor where a family has them otherwise than the file; None: as `used` says."""

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """timm's name -> tensor, counters as scalars."""
        if self.own_tensors is not None:
            return self.own_tensors
        return {name: scalar(name, self.container.tensors[key]) for key, name in self.used.items()}

    @property
    def complete(self) -> bool:
        """Whether its keys and shapes are exactly those of an architecture."""
        return self.match.faults == 0

    @property
    def place(self) -> str:
        """Where it lies and what it is, in words."""
        where = self.container.path or "the file's top"
        return (
            f"{where} holds a {'complete ' if self.complete else ''}{self.match.arch or 'network'} under "
            + (f"`{self.prefix}`" if self.prefix else "no prefix")
        )


def unwrap(key: str) -> str:
    """The key without DDP's `module` and torch.compile's `_orig_mod`, wherever they stand."""
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def containers(value: Any) -> list[Container]:
    """Every dict with tensors in `value`, however deep in dicts, lists, tuples and inert objects."""
    found: list[Container] = []
    seen: set[int] = set()
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    while pending and len(seen) < MAX_NODES:
        path, item, depth = pending.pop(0)
        if id(item) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(item))
        if isinstance(item, Placeholder) and isinstance(item.state, dict) and "_modules" in item.state:
            tensors = dict(_module_tensors(item))
            if tensors:
                found.append(Container(path=path, tensors=tensors, module=True))
            continue
        entries = list(_entries(item))
        tensors = {key: held for key, held in entries if isinstance(held, Tensor)}
        if tensors:
            others = tuple(key for key, held in entries if not isinstance(held, Tensor))
            found.append(Container(path=path, tensors=tensors, others=others))
        pending += [
            (f"{path}.{key}".lstrip("."), held, depth + 1)
            for key, held in entries
            if isinstance(held, (dict, list, tuple, Placeholder))
        ]
    return found


def _entries(item: Any) -> Iterator[tuple[str, Any]]:
    """Name and value of what `item` holds."""
    if isinstance(item, dict):
        yield from ((str(key), held) for key, held in item.items())
    elif isinstance(item, (list, tuple)):
        yield from ((str(index), held) for index, held in enumerate(item))
    elif isinstance(item, Placeholder):
        if isinstance(item.state, dict):
            yield from ((str(key), held) for key, held in item.state.items())
        for pair in item.items:
            if isinstance(pair, tuple) and len(pair) == 2:
                yield str(pair[0]), pair[1]


def _module_tensors(module: Placeholder) -> Iterator[tuple[str, Tensor]]:
    """What state_dict() of a pickled module would hold."""
    pending: list[tuple[str, Any, int]] = [("", module, 0)]
    seen: set[int] = set()
    while pending and len(seen) < MAX_NODES:
        prefix, item, depth = pending.pop(0)
        state = item.state if isinstance(item, Placeholder) else None
        if not isinstance(state, dict) or id(item) in seen or depth > 64:
            continue
        seen.add(id(item))
        for part in ("_parameters", "_buffers"):
            held = state.get(part)
            if isinstance(held, dict):
                yield from ((f"{prefix}{k}", v) for k, v in held.items() if isinstance(v, Tensor))
        modules = state.get("_modules")
        if isinstance(modules, dict):
            pending += [(f"{prefix}{name}.", child, depth + 1) for name, child in modules.items()]


def networks(container: Container, rename: tuple[tuple[str, str], ...] = (), *, arch: str | None = None,
             hint: str | None = None) -> list[Network]:  # fmt: skip
    """Every prefix of the container with a residual block under it, the whole ones first."""
    names = {key: _renamed(_from_hugging_face(name), rename) for key, name in container.names.items()}
    prefixes: dict[str, set[str]] = {}
    for name in names.values():
        block = _BLOCK.fullmatch(name)
        if block:
            prefixes.setdefault(block["prefix"], set()).add(block["stage"])
    found = []
    for prefix, stages in prefixes.items():
        named = any(stage.startswith("layer") for stage in stages)
        first = 0 if named else _first_stage(stages)
        if first is not None:
            found.append(_network(container, names, prefix, first, arch, hint))
    return sorted(found, key=lambda network: network.match.faults)


def _from_hugging_face(name: str) -> str:
    """A name of the transformers library's ResNet as torchvision's, any other as it is.

    https://github.com/huggingface/transformers/blob/main/src/transformers/models/resnet/modeling_resnet.py
    """
    found = _HUGGING_FACE.fullmatch(name)
    if not found:
        return name
    norm = found["part"] == "normalization"
    if found["stage"] is None:
        layer = "bn1" if norm else "conv1"
    else:
        block = f"layer{int(found['stage']) + 1}.{found['block']}"
        if found["index"] is None:
            layer = f"{block}.downsample.{int(norm)}"
        else:
            layer = f"{block}.{'bn' if norm else 'conv'}{int(found['index']) + 1}"
    return f"{found['prefix']}{layer}.{found['leaf']}"


_HUGGING_FACE = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?:embedder\.embedder|encoder\.stages\.(?P<stage>\d)\.layers\.(?P<block>\d{1,3})"
    r"\.(?:layer\.(?P<index>\d)|shortcut))\.(?P<part>convolution|normalization)\.(?P<leaf>\w+)"
)


def _first_stage(stages: set[str]) -> int | None:
    """The first of four consecutive indices, as nn.Sequential(*resnet.children()) numbers its stages."""
    numbers = {number for stage in stages if (number := whole_number(stage)) is not None}
    whole = [n for n in sorted(numbers) if {n + 1, n + 2, n + 3} <= numbers]
    return whole[0] if whole else None


def _network(
    container: Container, names: dict[str, str], prefix: str, first: int, arch: str | None, hint: str | None
) -> Network:
    inside = {key: name[len(prefix) :] for key, name in names.items() if name.startswith(prefix)}
    targets, dialect = _in_timms_names(inside, container.tensors, first)
    used, doubled = taken_once(targets, _NETWORK)
    shapes = {target: tuple(scalar(target, container.tensors[key]).shape) for key, target in used.items()}
    match = match_arch(shapes, arch=arch, hint=hint)
    return Network(
        container=container, prefix=prefix, used=used, doubled=doubled, match=match, dialect=dialect
    )


def taken_once(targets: dict[str, str], own: re.Pattern[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Key -> timm's name, for names that are the network's `own`, each once; and the keys that came again."""
    used: dict[str, str] = {}
    doubled = []
    taken: set[str] = set()
    for key, target in targets.items():
        if not own.match(target):
            continue
        if target in taken:
            doubled.append(f"{key} (a second {target})")
        else:
            taken.add(target)
            used[key] = target
    return used, tuple(doubled)


def _in_timms_names(
    inside: dict[str, str], tensors: dict[str, Tensor], first: int
) -> tuple[dict[str, str], str]:
    """Key as written -> timm's name, and the dialect that was translated."""
    rests = set(inside.values())
    dialect = []
    moves: list[tuple[str, str]] = []
    if first:
        dialect.append("layers numbered as in nn.Sequential")
        moves += [(f"{first + i}.", f"layer{i + 1}.") for i in range(4)]
        early = {
            key: rest for key, rest in inside.items()
            if (number := whole_number(rest.partition(".")[0])) is not None and number < first
        }  # fmt: skip
        convolutions = [rest for key, rest in early.items() if tensors[key].dim() == 4]
        norms = [rest for rest in early.values() if rest.endswith(".running_mean")]
        if len(convolutions) == len(norms) == 1:  # whatever their names
            moves += [(convolutions[0].removesuffix("weight"), "conv1.")]
            moves += [(norms[0].removesuffix("running_mean"), "bn1.")]
            early = {}
        for key, rest in early.items():
            index, _, part = rest.partition(".")
            if part == "weight" and tensors[key].dim() == 4:
                moves.append((f"{index}.", "conv1."))
            elif part == "running_mean":
                moves.append((f"{index}.", "bn1."))
            elif part == "0.weight":
                moves.append((f"{index}.", "conv1."))
    elif "stem.6.weight" in rests:  # OpenMMLab's deep stem
        dialect.append("OpenMMLab's deep stem")
        moves += [("stem.7.", "bn1."), ("stem.", "conv1.")]
    elif not rests & {"conv1.weight", "conv1.0.weight"} or (
        "conv1.1.weight" in rests and "bn1.weight" not in rests
    ):
        for conv, norm in _STEMS:
            if {f"{conv}weight", f"{norm}weight"} <= rests and "bn1.weight" not in rests:
                dialect.append(f"{conv}, {norm} for conv1., bn1.")
                moves += [(conv, "conv1."), (norm, "bn1.")]
                break
    targets = {}
    for key, rest in inside.items():
        new = _renamed(rest, tuple(moves))
        for old, name in _SHORTCUTS:
            if re.search(old, new):
                new = re.sub(old, name, new)
                if "shortcut for downsample" not in dialect:
                    dialect.append("shortcut for downsample")
        for old, name in _PADDLE:
            if new.endswith(old):
                new = new.removesuffix(old) + name
                if "Paddle's statistics" not in dialect:
                    dialect.append("Paddle's statistics")
        targets[key] = new
    return targets, "; ".join(dialect)


_PADDLE = (("._mean", ".running_mean"), ("._variance", ".running_var"))
_SHORTCUTS = (
    (r"^(layer[1-4]\.\d+)\.(?:shortcut|downsample|residual)\.conv\.", r"\1.downsample.0."),
    (r"^(layer[1-4]\.\d+)\.(?:shortcut|downsample|residual)\.(?:bn|norm)\.", r"\1.downsample.1."),
    (r"^(layer[1-4]\.\d+)\.(?:shortcut|residual)\.", r"\1.downsample."),
)  # fmt: skip


def _renamed(name: str, moves: tuple[tuple[str, str], ...]) -> str:
    for old, new in moves:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def scalar(name: str, tensor: Tensor) -> Tensor:
    """A counter of shape (1,), as older files have, as the scalar that it is."""
    return tensor.reshape(()) if name.endswith(COUNTER) and tuple(tensor.shape) == (1,) else tensor


def role_of(*parts: str) -> str | None:
    """ema or online by the words in a place's names; None where they say nothing."""
    words = {word for part in parts for word in re.split(r"[^a-z]+", part.lower())}
    if words & EMA_WORDS:
        return "ema"
    return "online" if words & ONLINE_WORDS else None
