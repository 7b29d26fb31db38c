"""The networks in a file of every family: ResNets, ViTs, ConvNeXts and others of timm's."""

from __future__ import annotations

from torch import Tensor

from transfer.checkpoints.families.kinds import FAMILIES, Family, of_arch, places
from transfer.checkpoints.families.match import Match, is_model
from transfer.checkpoints.families.resnet import ARCHS
from transfer.checkpoints.search import Container, Network, networks, scalar, taken_once


def all_networks(
    container: Container,
    renames: tuple[tuple[str, str], ...] = (),
    *,
    arch: str | None = None,
    heads: int | None = None,
    hint: str | None = None,
) -> list[Network]:
    """The container's networks, the whole ones first; a prefix with residual blocks is a ResNet's alone."""
    of_resnet = hint if hint is not None and "resne" in hint else None
    found = networks(container, renames, arch=arch, hint=of_resnet)
    taken = {n.prefix for n in found}
    others = other_networks(container, arch=arch, heads=heads, hint=hint)
    return sorted([*found, *(n for n in others if n.prefix not in taken)], key=lambda n: n.match.faults)


def other_networks(
    container: Container, *, arch: str | None = None, heads: int | None = None, hint: str | None = None
) -> list[Network]:
    """Every prefix of the container with such a network behind it, the whole ones first.

    `arch` and `heads` are what the user says, `hint` the architecture that the file names, which decides
    among those of the same keys. A prefix is read by the first family that is complete there, else by the
    first that it could be of.
    """
    families = dict(FAMILIES)
    if arch is not None:
        own = of_arch(arch) if arch not in ARCHS else None
        families = {"timm": own} if own is not None else {}
        families |= {name: family for name, family in FAMILIES.items() if name != "timm"}
    found: dict[str, Network] = {}
    for name, family in families.items():
        for prefix in places(family, container.names.values()):
            if prefix in found and found[prefix].complete:
                continue
            network = _network(container, prefix, name, family, arch, heads, hint)
            if prefix not in found or network.complete:
                found[prefix] = network
    return sorted(found.values(), key=lambda network: network.match.faults)


def _network(
    container: Container,
    prefix: str,
    name: str,
    family: Family,
    arch: str | None,
    heads: int | None,
    hint: str | None,
) -> Network:
    inside = {
        key: written[len(prefix) :] for key, written in container.names.items() if written.startswith(prefix)
    }
    targets, dialect = family.names(list(inside.values()))
    used, doubled = taken_once({key: targets[rest] for key, rest in inside.items()}, family.own)
    tensors = {target: scalar(target, container.tensors[key]) for key, target in used.items()}
    try:
        tensors = family.state(tensors)
        match = _match(tensors, name, family, arch, heads, hint)
    except ValueError as error:
        match = Match(arch=arch, reason=str(error))
    except (RuntimeError, IndexError, TypeError):  # a vector where a matrix belongs, and their kin
        match = Match(arch=arch, reason="its tensors have not the dimensions of such a network's")
    return Network(
        container=container, prefix=prefix, used=used, doubled=doubled, match=match, dialect=dialect,
        family=name, own_tensors=tensors,
    )  # fmt: skip


def _match(
    tensors: dict[str, Tensor],
    name: str,
    family: Family,
    arch: str | None,
    heads: int | None,
    hint: str | None,
) -> Match:
    shapes = {key: tuple(value.shape) for key, value in tensors.items() if key != "rope.periods"}
    asked = {"heads": heads} if name == "vit" or (arch is not None and "cls_token" in shapes) else {}
    match = family.match(shapes, arch=arch, **asked)
    if match.question and hint is not None and name == "timm" and is_model(hint):
        named = family.match(shapes, arch=hint)
        match = match if named.faults else named
    return match
