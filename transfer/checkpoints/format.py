"""What a checkpoint format says: where branches lie, what lies beside them, what its keys cannot tell."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a branch lies: `container`, dotted keys into the object ("": itself), and key `prefix`."""

    container: str
    prefix: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What a writer puts where. Each tensor beside the backbone must be named, or the file is not taken."""

    name: str
    online: tuple[Place, ...]
    """Where the online branch may lie; a file has one of these."""
    ema: tuple[Place, ...] = ()
    """Where the momentum branch may lie."""
    drop: tuple[tuple[str, str], ...] = ()
    """(prefix in the container, what it is): no part of the backbone."""
    needs: tuple[str, ...] = ()
    """Prefixes of which the container holds at least one, where the rest would fit other writers too."""
    also_needs: tuple[str, ...] = ()
    """The same once more, where one kind of key is not enough to know the writer."""
    top: str = ""
    """A key at the file's top that only this writer has: where it is there, no other format is meant."""
    rename: tuple[tuple[str, str], ...] = ()
    """(prefix in the branch, torchvision's prefix)."""
    cifar_padding: int | None = None
    """Effective padding of the writer's 3x3 stem; None where none is known, and 1 is assumed."""
    families: tuple[str, ...] = ()
    """Kinds of networks that it may be of (resnet, vit, convnext, timm); empty: of any."""
    many_heads: Literal["", "always", "fixed positions"] = ""
    """Whether ViTs up to ViT-S have 12 heads in place of timm's 3 and 6; or those that learn no positions."""
    positions: Literal["bicubic", "bicubic offset", "bicubic antialias"] = "bicubic antialias"
    """How the writer resamples a ViT's positions for another number of patches; the last is timm's way."""
    note: str = ""
    """What a user of such a file should know."""
