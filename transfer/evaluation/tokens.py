"""Features of a ViT by its tokens, and its positions for images of another size.

A set of features is made of parts joined by +: `cls`, the class token of the last block behind the final
norm; `patches`, the mean of its patches behind that norm; `last4.cls`, the class tokens of the last four
blocks, each behind the final norm, first block first; `.unnormed` behind a part leaves the norm out.
Registers are of none.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pretrain.common.errors import UserError

Positions = Literal["bicubic", "bicubic offset", "bicubic antialias"]
OFFSET = 0.1
"""Patches added to the new grid's side before the scale is taken (DINO's and DINOv2's interpolate_offset)."""
_PART = re.compile(r"(?:last(?P<blocks>[1-9]\d?)\.)?(?P<token>cls|patches)(?P<raw>\.unnormed)?")
_ATOM = re.compile(r"block-(?P<back>\d+)\.(?P<token>cls|patches)(?P<raw>\.unnormed)?")


def is_tokens(features: str) -> bool:
    """Whether a set of features is made of a ViT's tokens."""
    return all(_PART.fullmatch(part) for part in features.split("+"))


def atoms(features: str) -> tuple[str, ...]:
    """The blocks' tokens that a set is made of, in order: `last2.cls` is block-2.cls and block-1.cls."""
    found = []
    for part in features.split("+"):
        said = _PART.fullmatch(part)
        assert said is not None
        for back in range(int(said["blocks"] or 1), 0, -1):
            found.append(f"block-{back}.{said['token']}{said['raw'] or ''}")
    return tuple(dict.fromkeys(found))


class Tokens(nn.Module):
    """N x 3 x H x W -> N x D: the tokens that `wanted` names (see `atoms`), one after the other, in one pass.

    Raises UserError for a network without such tokens.
    """

    def __init__(self, backbone: nn.Module, wanted: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.wanted = [cast("re.Match[str]", _ATOM.fullmatch(atom)) for atom in wanted]
        self.num_features = len(self.wanted) * token_width(backbone)
        vit = cast(Any, backbone)
        if any(w["token"] == "cls" for w in self.wanted) and getattr(vit, "cls_token", None) is None:
            raise UserError(
                "this protocol reads class tokens, and the ViT given has none; take one of patches"
            )
        if any(w["raw"] is None for w in self.wanted) and isinstance(vit.norm, nn.Identity):
            raise UserError(
                "this protocol reads tokens behind the final norm, and the ViT given normalises none (its "
                "norm stands behind the mean of its patches, or is not there)"
            )

    def unused(self) -> list[nn.Parameter]:
        """Parameters of the backbone that no token wanted hangs on."""
        behind = ["fc_norm", "attn_pool", *(["norm"] if all(w["raw"] for w in self.wanted) else [])]
        modules = (getattr(self.backbone, name, None) for name in behind)
        return [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]

    def forward(self, images: Tensor) -> Tensor:
        """N x 3 x H x W normalised -> N x D."""
        vit = cast(Any, self.backbone)
        depth, backs = len(vit.blocks), sorted({int(w["back"]) for w in self.wanted}, reverse=True)
        if backs[0] > depth:
            raise UserError(f"this protocol reads the last {backs[0]} blocks, and the ViT given has {depth}")
        found = vit.forward_intermediates(
            images, indices=[depth - back for back in backs], return_prefix_tokens=True, norm=False,
            output_fmt="NLC", intermediates_only=True,
        )  # fmt: skip
        # timm gives pairs only where there are tokens before the patches
        blocks = {back: f if isinstance(f, tuple) else (f, f[:, :0]) for back, f in zip(backs, found)}
        normed: dict[int, tuple[Tensor, Tensor]] = {}
        parts = []
        for said in self.wanted:
            back = int(said["back"])
            patches, before = blocks[back]
            if said["raw"] is None:
                if back not in normed:
                    normed[back] = vit.norm(patches), vit.norm(before)
                patches, before = normed[back]
            parts.append(before[:, 0] if said["token"] == "cls" else patches.mean(1))
        return torch.cat(parts, 1)


def token_width(backbone: nn.Module) -> int:
    """Length of a token. Raises UserError for what is no ViT of timm's."""
    if not all(hasattr(backbone, name) for name in ("blocks", "forward_intermediates", "num_prefix_tokens")):
        raise UserError(
            f"this protocol reads the tokens of a ViT; the network given, {type(backbone).__name__}, has "
            "none: take a protocol without tokens in its features"
        )
    return int(cast(Any, backbone).embed_dim)


def needs_other_positions(model: nn.Module | None, size: int) -> bool:
    """Whether images of `size` px have another number of patches than the model has positions for."""
    embedding = getattr(model, "patch_embed", None)
    made_for = getattr(embedding, "img_size", None)
    return getattr(model, "pos_embed", None) is not None and made_for not in (None, (size, size))


@torch.no_grad()
def at_size(model: nn.Module, size: int, positions: Positions) -> nn.Module:
    """The model for images of `size` x `size` px: itself, or a copy with its positions resampled.

    Raises UserError for a size that is no whole number of patches.
    """
    vit = cast(Any, model)
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if patch is None or not hasattr(model, "set_input_size"):
        return model
    if size % patch[0]:
        near = max(1, round(size / patch[0])) * patch[0]
        raise UserError(
            f"images of {size} px are no whole number of the network's patches of {patch[0]} px: say "
            f"--image-size {near}"
        )
    made_for = getattr(embedding, "img_size", None)
    if made_for in (None, (size, size)):
        return model
    vit = copy.deepcopy(vit)
    old = getattr(vit, "pos_embed", None)
    if isinstance(old, nn.Parameter) and old.dim() == 3 and hasattr(vit, "num_prefix_tokens"):
        before = 0 if vit.no_embed_class else vit.num_prefix_tokens
        new = resampled(old.detach(), size // patch[0], before=before, how=positions)
        vit.set_input_size(img_size=(size, size))
        vit.pos_embed = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        vit.set_input_size(img_size=(size, size))
    return vit


def resampled(positions_1TD: Tensor, side: int, *, before: int, how: Positions) -> Tensor:
    """Positions 1 x T x D of `before` other tokens and a square of patches -> those of side x side patches.

    bicubic offset: DINO (vision_transformer.py, interpolate_pos_encoding), DINOv2 without registers; bicubic:
    MAE (util/pos_embed.py) and MSN; bicubic antialias: DINOv2 with registers and timm.
    """
    others, patches = positions_1TD[:, :before], positions_1TD[:, before:]
    old = math.isqrt(patches.shape[1])
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if how == "bicubic offset":
        scale = (side + OFFSET) / old
        grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    else:
        grid = interpolate(grid, size=(side, side), mode="bicubic", antialias=how == "bicubic antialias")
    assert grid.shape[-2:] == (side, side)
    return torch.cat([others, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
