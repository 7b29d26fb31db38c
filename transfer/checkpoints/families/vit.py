"""Vision Transformers: timm's VisionTransformer by its keys and shapes, and DINOv3's by its Eva.

How many heads a block has cannot be seen: width and depth say it, as far as writers agree (`heads_of`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transfer.checkpoints.families.match import Match, Options, Shape, compare, is_model, timm_shapes

PLACE = re.compile(r"(?P<prefix>(?:.*[./:])?)(?:patch_embed\.proj|conv_proj)(?:\.0)?\.weight")
OWN = re.compile(
    r"(cls_token|pos_embed|reg_token|dist_token)$|(patch_embed|blocks|norm|fc_norm|norm_pre|attn_pool|rope)\."
)
ROPE_BASE = 100.0
"""Of DINOv3's rotary positions (https://github.com/facebookresearch/dinov3, models/vision_transformer.py)."""
SIZES: dict[tuple[int, int], tuple[str, int]] = {
    (192, 12): ("tiny", 3), (384, 12): ("small", 6), (768, 12): ("base", 12), (1024, 24): ("large", 16),
    (1280, 32): ("huge", 16), (1408, 40): ("giant", 16), (1664, 48): ("gigantic", 16),
}  # fmt: skip
"""Width and number of blocks -> timm's word for it and the number of heads, as in DeiT, DINO and MAE."""
MANY_HEADS = 12
"""Of MoCo v3's ViT-S, and of solo-learn's MoCo v3 and MAE from tiny to base (vits.py, vit_mocov3.py)."""
_DINOV3 = {
    (192, 12): ("tiny", 3), (384, 12): ("small", 6), (768, 12): ("base", 12), (1024, 24): ("large", 16),
    (1280, 32): ("huge_plus", 20), (4096, 40): ("7b", 32),
}  # fmt: skip
_TORCHVISION = (
    (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."), (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)  # fmt: skip
"""torchvision/models/vision_transformer.py's names."""


def names(rests: list[str]) -> tuple[dict[str, str], str]:
    """Name behind the prefix -> timm's, and how they were spelt where not as timm's."""
    rotary, torchvisions = is_rotary(rests), "conv_proj.weight" in rests
    found, dialects = {}, []
    for rest in rests:
        new = rest
        if torchvisions:
            for old, name in _TORCHVISION:
                new = re.sub(old, name, new)
            dialects.append("torchvision's names of a ViT")
        new = re.sub(r"^blocks\.\d{1,3}\.(\d{1,3})\.", r"blocks.\1.", new)
        if new != rest and not torchvisions:
            dialects.append("blocks in chunks")
        if new in ("register_tokens", "storage_tokens"):
            new = "reg_token"
            dialects.append(f"{rest} for registers")
        if rotary:
            new = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", new)
            for old, name in (("w1", "fc1_g"), ("w2", "fc1_x"), ("w3", "fc2")):
                new = new.replace(f".mlp.{old}.", f".mlp.{name}.")
            new = new.replace("rope_embed.", "rope.")
        else:
            new = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", new)
            new = new.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        found[rest] = new
    return found, "; ".join(dict.fromkeys(dialects))


def is_rotary(rests: list[str]) -> bool:
    """Whether positions are rotary alone, as in DINOv3."""
    tokens = {"reg_token", "storage_tokens", "rope_embed.periods"}
    return "pos_embed" not in rests and bool(tokens & set(rests))


def state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under timm's names -> timm's own.

    DINOv2 adds a position to the class token but none to registers: timm has the sum as its class token.
    DINOv3 masks the key's bias, which timm has not; its rotary periods stay as `rope.periods`, for a buffer.
    Raises ValueError for values that timm's network would not compute with.
    """
    found = dict(tensors)
    position = found.get("pos_embed")
    tokens = {"reg_token", "cls_token"} <= set(found)
    if position is not None and tokens and position.dim() == 3 and _square(position.shape[1] - 1):
        found["cls_token"] = found["cls_token"] + position[:, :1]
        found["pos_embed"] = position[:, 1:]
    if position is None and is_rotary(list(found)):
        periods = found.get("rope.periods")
        if periods is not None:
            _check_periods(periods)
        for key in [k for k in found if k.endswith(".attn.qkv.bias")]:
            bias, mask = found.pop(key), found.pop(f"{key}_mask", None)
            query, own, value = bias.chunk(3)
            if mask is not None:
                wanted = torch.cat([torch.ones_like(query), torch.zeros_like(own), torch.ones_like(value)])
                if not torch.equal(mask.to(wanted), wanted):
                    raise ValueError(f"{key}_mask masks more than the key's bias, which timm cannot compute")
            elif bool(own.any()):
                raise ValueError(f"{key} has a bias of keys, which timm's DINOv3 has not")
            stem = key.removesuffix("qkv.bias")
            found[f"{stem}q_bias"], found[f"{stem}v_bias"] = query, value
    return found


def _check_periods(periods: Tensor) -> None:
    n = len(periods)
    wanted = ROPE_BASE ** (torch.arange(n, dtype=torch.float64) / n)
    if not torch.allclose(periods.double(), wanted, rtol=1e-2):  # they are kept in bfloat16
        raise ValueError(
            f"its rotary positions have other periods than base {ROPE_BASE:g}'s, which timm's DINOv3 has"
        )


def _square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def match(shapes: Mapping[str, Shape], *, arch: str | None = None, heads: int | None = None) -> Match:
    """The ViT with exactly these keys and shapes, else the nearest; `arch`, `heads`: as the user says."""
    reason = _why_none(shapes)
    if reason:
        return Match(arch=arch, reason=reason)
    if arch is not None:
        options: Options = ()
        if shapes.get("pos_embed") not in (None, timm_shapes(arch).get("pos_embed")):
            options = _grid(shapes)[:1]
        if is_rotary(list(shapes)) and "cls_token" in shapes:
            options += (("global_pool", "token"),)  # as its authors; timm's own default is the mean
        if heads is not None:
            options += (("num_heads", heads),)
        return compare(shapes, timm_shapes(arch, options), arch, options=options)
    rotary = is_rotary(list(shapes))
    width, depth = shapes["patch_embed.proj.weight"][0], blocks(shapes)
    swiglu = _hidden(shapes) == 2 * shapes.get("blocks.0.mlp.fc2.weight", (0, 0))[1] > 0
    sizes = dict(_DINOV3) if rotary else SIZES | ({(1536, 40): ("giant", 24)} if swiglu else {})
    known = sizes.get((width, depth))
    if known is None:
        return _unknown(width, depth, sizes)
    if rotary:
        return _dinov3(shapes, *known)
    if swiglu and (width, depth) != (1536, 40):
        return Match(arch=None, reason=f"a ViT {width} wide with SwiGLU: --arch says which of timm's it is")
    if "pos_embed" not in shapes:
        return Match(
            arch=None,
            reason="a ViT without positions: the file has no pos_embed, as where a writer computes it, and "
            "no rotary or relative ones that are known; save pos_embed with the weights",
        )
    name = _name(known[0], shapes, swiglu)
    options = _plain(shapes, heads or known[1], swiglu)
    question = ""
    if "norm_pre.weight" in shapes:
        question = (
            "it normalises before its blocks, as CLIP's ViTs: OpenAI's have quick GELU, others GELU, and "
            f"both the same keys: say --arch vit_{known[0]}_patch{_patch(shapes)}_clip_224 or "
            f"vit_{known[0]}_patch{_patch(shapes)}_clip_quickgelu_224"
        )
    return compare(shapes, timm_shapes(name, options), name, options=options, question=question)


def _why_none(shapes: Mapping[str, Shape]) -> str:
    first = shapes.get("patch_embed.proj.weight", ())
    if len(first) == 5:
        return "its patches are 3D, of videos or volumes"
    if len(first) != 4:
        return (
            "a ViT with a stem of several convolutions (MoCo v3's vit_conv, ViT-C), which timm does not have"
        )
    if first[1] != 3:
        return f"its patches have {first[1]} channels instead of RGB"
    return ""


def _unknown(width: int, depth: int, sizes: Mapping[tuple[int, int], Any]) -> Match:
    near = ", ".join(f"{name} {w} and {d}" for (w, d), (name, _) in sizes.items())
    return Match(
        arch=None,
        reason=f"a ViT {width} wide with {depth} blocks ({near}): its number of heads is not known; --arch "
        "with timm's name says it",
    )


def _name(size: str, shapes: Mapping[str, Shape], swiglu: bool) -> str:
    patch, scaled = _patch(shapes), "blocks.0.ls1.gamma" in shapes
    names = [f"vit_{size}_patch{patch}_224", f"vit_{size}_patch16_224", f"vit_{size}_patch14_224"]
    if scaled or swiglu:
        registers = "_reg4" if "reg_token" in shapes else ""
        names.insert(0, f"vit_{size}_patch{patch}{registers}_dinov2")
    if "dist_token" in shapes:
        names = [f"deit_{size}_distilled_patch16_224"]
    return next((name for name in names if is_model(name)), names[-1])


def _patch(shapes: Mapping[str, Shape]) -> int:
    return shapes["patch_embed.proj.weight"][2]


def _hidden(shapes: Mapping[str, Shape]) -> int:
    return shapes.get("blocks.0.mlp.fc1.weight", (0,))[0]


def blocks(shapes: Mapping[str, Shape]) -> int:
    """Number of blocks, by the highest index."""
    found = (re.match(r"blocks\.(\d{1,3})\.", key) for key in shapes)
    return max((int(block[1]) + 1 for block in found if block), default=0)


def _grid(shapes: Mapping[str, Shape]) -> Options:
    """img_size by the number of positions, and whether the tokens before the patches have any."""
    n = shapes["pos_embed"][1]
    tokens = ("cls_token" in shapes) + ("dist_token" in shapes) + shapes.get("reg_token", (0, 0))[1]
    bare = not _square(n - tokens) and _square(n)
    side = math.isqrt(n if bare else max(n - tokens, 1))
    found: Options = (("img_size", side * _patch(shapes)),)
    return (*found, ("no_embed_class", True)) if bare else found


def _plain(shapes: Mapping[str, Shape], heads: int, swiglu: bool) -> Options:
    """What timm's VisionTransformer is built with, none of it left to the name's own."""
    width, has = shapes["patch_embed.proj.weight"][0], shapes.__contains__
    registers = shapes.get("reg_token", (0, 0))[1]
    classes = has("cls_token")
    after = has("fc_norm.weight")  # behind the mean, as MAE's fine-tuned ones
    options: dict[str, Any] = {
        "patch_size": _patch(shapes), "num_heads": heads, "qkv_bias": has("blocks.0.attn.qkv.bias"),
        "init_values": 1e-5 if has("blocks.0.ls1.gamma") else None, "reg_tokens": registers,
        "pre_norm": has("norm_pre.weight"), "qk_norm": has("blocks.0.attn.q_norm.weight"),
        "final_norm": after or has("norm.weight"), "fc_norm": after, "depth": blocks(shapes),
        "embed_dim": width, "global_pool": "token" if classes and not after else "avg",
        "dynamic_img_size": False,
    }  # fmt: skip
    if not has("dist_token"):
        options |= {"class_token": classes}
    if not swiglu:
        options["mlp_ratio"] = _hidden(shapes) / width
    options |= {"no_embed_class": False}
    return tuple((options | dict(_grid(shapes))).items())


def _dinov3(shapes: Mapping[str, Shape], size: str, heads: int) -> Match:
    biased = "_qkvb" if "blocks.0.attn.q_bias" in shapes else ""
    plus = "_plus" if "blocks.0.mlp.fc1_g.weight" in shapes and size == "small" else ""
    name = f"vit_{size}{plus}_patch16_dinov3{biased}"
    if not is_model(name):
        name = name.removesuffix("_qkvb")
    if not is_model(name):
        name = f"{name}_qkvb"
    options: dict[str, Any] = {
        "patch_size": _patch(shapes), "num_heads": heads, "qkv_bias": bool(biased), "global_pool": "token",
        "num_reg_tokens": shapes.get("reg_token", (0, 0))[1], "depth": blocks(shapes),
    }  # fmt: skip
    return compare(shapes, timm_shapes(name, tuple(options.items())), name, options=tuple(options.items()))


def heads_of(match: Match) -> int:
    """The number of heads that a match was built with; 0 where its name has it."""
    return int(dict(match.options).get("num_heads", 0))


def many_heads_possible(match: Match, position: Tensor | None) -> bool:
    """Whether a file of no known writer may be MoCo v3's: as narrow, with fixed positions.

    Theirs and MAE's position of the class token is 0, which none is that was trained.
    """
    if heads_of(match) not in (3, 6) or position is None or position.dim() != 3:
        return False
    tokens = position.shape[1] - math.isqrt(position.shape[1]) ** 2
    return tokens == 1 and not bool(position[:, 0].any())
