"""The families beside ResNets: where one lies, which names are its own, how they are read, which it is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from transfer.checkpoints.families import by_index, convnext, vit
from transfer.checkpoints.families.match import Match, Shape, is_model, timm_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How networks of one kind are found and read."""

    place: re.Pattern[str]
    """A key that each has once; its group `prefix` is what stands before the network's names."""
    beside: str
    """What some other key behind the prefix begins with."""
    own: re.Pattern[str]
    """Beginnings of timm's names of the network's tensors; anything else lies beside it."""
    names: Callable[[list[str]], tuple[dict[str, str], str]]
    state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    match: Callable[..., Match]


def _same(rests: list[str]) -> tuple[dict[str, str], str]:
    return {rest: rest for rest in rests}, ""


FAMILIES: dict[str, Family] = {
    "vit": Family(
        place=vit.PLACE, beside=r"blocks\.|encoder\.layers\.", own=vit.OWN, names=vit.names, state=vit.state,
        match=vit.match,
    ),
    "convnext": Family(
        place=convnext.PLACE, beside=r"stages\.", own=convnext.OWN, names=convnext.names,
        state=convnext.state, match=convnext.match,
    ),
    "timm": Family(
        place=by_index.PLACE, beside=r"", own=by_index.OWN, names=_same, state=dict, match=by_index.match,
    ),
}  # fmt: skip
"""In the order in which they are tried."""


def places(family: Family, names: Iterable[str]) -> list[str]:
    """Every prefix of `names` with such a network behind it."""
    names = list(names)
    found = []
    for name in names:
        here = family.place.fullmatch(name)
        if here:
            beside = re.compile(re.escape(here["prefix"]) + f"(?:{family.beside})")
            if any(beside.match(other) for other in names) and here["prefix"] not in found:
                found.append(here["prefix"])
    return found


def of_arch(arch: str) -> Family | None:
    """timm's `arch` as a family of its own, read by its own keys; None for one that timm lacks."""
    if not is_model(arch):
        return None
    wanted = timm_shapes(arch)
    first = next(key for key in wanted if key.endswith(".weight"))
    tops = "|".join(re.escape(top) for top in dict.fromkeys(key.partition(".")[0] for key in wanted))

    def match(shapes: Mapping[str, Shape], *, arch: str, heads: int | None = None) -> Match:
        return vit.match(shapes, arch=arch, heads=heads) if "patch_embed.proj.weight" in shapes else (
            by_index.match(shapes, arch=arch)
        )  # fmt: skip

    return Family(
        place=re.compile(r"(?P<prefix>(?:.*[./:])?)" + re.escape(first)), beside="",
        own=re.compile(rf"(?:{tops})(?:\.|$)"), names=_same, state=dict, match=match,
    )  # fmt: skip
