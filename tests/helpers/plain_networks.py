"""ViTs and ConvNeXts computed straight from a file's tensors under their authors' names, in float64.

Written from the papers and the authors' forward passes, without timm: an independent reference. Sources:
facebookresearch/dino vision_transformer.py, dinov2/models/vision_transformer.py (registers, layer scale,
SwiGLU), dinov3/layers (rotary positions), moco-v3/vits.py, VICRegL/convnext.py, ConvNeXt-V2/models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, silu

State = dict[str, Tensor]


def vit(
    state: State, images: Tensor, *, heads: int, last: int = 1, norm: bool = True, eps: float = 1e-6
) -> list[Tensor]:
    """Tokens N x T x D of the `last` blocks, normalised each where `norm`; the class token is first."""
    s = {k: v.double() for k, v in state.items()}
    kernel = s["patch_embed.proj.weight"]
    map_ = conv2d(images.double(), kernel, s["patch_embed.proj.bias"], stride=kernel.shape[-1])
    height, width = map_.shape[-2:]
    x = map_.flatten(2).transpose(1, 2)
    n = len(x)
    if "cls_token" in s:
        x = torch.cat([s["cls_token"].expand(n, -1, -1), x], 1)
    if "pos_embed" in s:
        x = x + s["pos_embed"]
    registers = s.get("register_tokens", s.get("storage_tokens"))
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(n, -1, -1), x[:, 1:]], 1)
    rotary = s.get("rope_embed.periods")
    depth = 1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks."))
    out = []
    for i in range(depth):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in s.items() if k.startswith(f"blocks.{i}.")}
        d = x.shape[-1]
        h = layer_norm(x, (d,), b["norm1.weight"], b["norm1.bias"], eps)
        bias = b.get("attn.qkv.bias", 0)
        qkv = h @ b["attn.qkv.weight"].T + bias * b.get("attn.qkv.bias_mask", 1)
        q, k, v = qkv.view(n, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = (_rotated(t, rotary, height, width) for t in (q, k))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(d // heads)).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(n, -1, d) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + y * b.get("ls1.gamma", b.get("gamma_1", 1))
        h = layer_norm(x, (d,), b["norm2.weight"], b["norm2.bias"], eps)
        if "mlp.fc1.weight" in b:
            h = gelu(h @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
            y = h @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        else:
            gate, value = (h @ b["mlp.w12.weight"].T + b["mlp.w12.bias"]).chunk(2, -1)
            y = (silu(gate) * value) @ b["mlp.w3.weight"].T + b["mlp.w3.bias"]
        x = x + y * b.get("ls2.gamma", b.get("gamma_2", 1))
        if i >= depth - last:
            normed = layer_norm(x, (d,), s["norm.weight"], s["norm.bias"], eps) if norm else x
            out.append(normed)
    return out


def _rotated(x: Tensor, periods: Tensor, height: int, width: int) -> Tensor:
    """Patches' queries or keys turned by their place; tokens before the patches as they are."""
    ys = (torch.arange(height, dtype=torch.float64) + 0.5) / height * 2 - 1
    xs = (torch.arange(width, dtype=torch.float64) + 0.5) / width * 2 - 1
    place = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), -1).view(-1, 2)
    angle = (2 * math.pi * place[:, :, None] / periods).flatten(1).repeat(1, 2)
    before = x.shape[-2] - len(angle)
    head, tail = x[..., :before, :], x[..., before:, :]
    first, second = tail.chunk(2, -1)
    turned = tail * angle.cos() + torch.cat([-second, first], -1) * angle.sin()
    return torch.cat([head, turned], -2)


def convnext(state: State, images: Tensor, *, norm_first: bool = False) -> Tensor:
    """N x D: the mean of the last map, normalised behind it or, as VICRegL does, before; without norm where
    the file has none."""
    s = {k: v.double() for k, v in state.items()}
    x = images.double()
    for stage in range(4):
        down = {k[len(f"downsample_layers.{stage}.") :]: v for k, v in s.items()
                if k.startswith(f"downsample_layers.{stage}.")}  # fmt: skip
        if stage == 0:
            x = _over_channels(conv2d(x, down["0.weight"], down["0.bias"], stride=4), down, "1")
        else:
            x = conv2d(_over_channels(x, down, "0"), down["1.weight"], down["1.bias"], stride=2)
        depth = 1 + max(int(k.split(".")[2]) for k in s if k.startswith(f"stages.{stage}."))
        for i in range(depth):
            start = f"stages.{stage}.{i}."
            b = {k[len(start) :]: v for k, v in s.items() if k.startswith(start)}
            h = conv2d(x, b["dwconv.weight"], b["dwconv.bias"], padding=3, groups=x.shape[1])
            h = h.permute(0, 2, 3, 1)
            h = layer_norm(h, h.shape[-1:], b["norm.weight"], b["norm.bias"], 1e-6)
            h = gelu(h @ b["pwconv1.weight"].T + b["pwconv1.bias"])
            if "grn.gamma" in b:
                size = h.norm(dim=(1, 2), keepdim=True)
                share = size / (size.mean(-1, keepdim=True) + 1e-6)
                h = b["grn.gamma"].flatten() * (h * share) + b["grn.beta"].flatten() + h
            h = h @ b["pwconv2.weight"].T + b["pwconv2.bias"]
            x = x + (h * b.get("gamma", 1)).permute(0, 3, 1, 2)
    rows = x.flatten(2).transpose(1, 2)
    if "norm.weight" not in s:
        return rows.mean(1)
    if norm_first:
        return layer_norm(rows, rows.shape[-1:], s["norm.weight"], s["norm.bias"], 1e-6).mean(1)
    return layer_norm(rows.mean(1), rows.shape[-1:], s["norm.weight"], s["norm.bias"], 1e-6)


def _over_channels(x: Tensor, state: State, name: str) -> Tensor:
    rows = x.permute(0, 2, 3, 1)
    rows = layer_norm(rows, rows.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
    return rows.permute(0, 3, 1, 2)
