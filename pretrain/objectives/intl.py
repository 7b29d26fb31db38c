"""The INTL loss of several views, with its alignment and its trace penalty.

Section 4 of Weng et al., "Modulate Your Spectrum in Self-Supervised Learning", ICLR 2024,
https://arxiv.org/abs/2305.16789. Each view's embeddings go through IterNorm
(`pretrain.objectives.spectral`); the other views and the target, view 0, meet in the cosine; the penalty
Σ_i (Ŝ_ii − 1)² evens the spectrum out.

Letters of shapes: V views, N images of the global batch, n of this rank, D features, d this rank's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.common.collectives import all_reduce
from pretrain.common.process_group import world_size
from pretrain.objectives.spectral import (
    Whitening,
    iternorm,
    newton_inverse_root,
    no_autocast,
    product,
    wide,
)
from pretrain.objectives.views import all_images, check_views


class INTLLoss(NamedTuple):
    """total = alignment + trade_off · trace. Scalars of float32 (float64 for float64 embeddings)."""

    total: Tensor
    alignment: Tensor
    """Mean over views i >= 1 of 2 − 2·mean_n cos(view i, view 0)."""
    trace: Tensor
    """Mean over views i >= 1 of the penalties of view i and view 0 (view i alone with a momentum target)."""


def intl_loss(
    embeddings: Sequence[Tensor],
    *,
    iterations: int = 4,
    trade_off: float | None = None,
    whitening: Whitening = "channel",
    momentum_target: bool = False,
) -> INTLLoss:
    """The INTL loss of V >= 2 views (Eq. 7 and 8), computed in Gram space, outside autocast.

    embeddings: V tensors n x D, view 0 the target, a constant without penalty with `momentum_target`.
    `trade_off=None` gives `default_trade_off` of the global batch (channel) or of D (batch).

    Channel whitening needs only N x N matrices after the row-centred embeddings Zc: with
    G_ab = Zc_a Zc_bᵀ and W_a = Φ(G_aa / (D − 1)),  Ẑ_a Ẑ_bᵀ = W_a G_ab W_b.

    With several ranks, each holding the same number of images, the loss is that of the joined batch on every
    rank, and backward gives each rank world_size times its gradient, which DDP's mean over ranks makes the
    joined batch's (see `pretrain.common.collectives`). Ranks exchange a share of the features each (one
    all-to-all) and N x N matrices, not whole embeddings; those are gathered where D does not divide.
    All ranks must call, forward and backward.

    Raises ValueError for fewer than two views, shapes that differ, or a default trade-off at n <= 8.
    """
    _check(embeddings, whitening, iterations)
    n, d = embeddings[0].shape[0] * world_size(), embeddings[0].shape[1]
    if trade_off is None:
        trade_off = default_trade_off(n if whitening == "channel" else d)
    elif not (math.isfinite(trade_off) and trade_off >= 0):
        raise ValueError(f"trade_off must be a finite number of at least 0, got {trade_off}")
    if momentum_target:
        embeddings = [embeddings[0].detach(), *embeddings[1:]]
    with no_autocast(embeddings[0]):
        terms = _channel_terms if whitening == "channel" else _batch_terms
        cosine_V, penalty_V = terms(embeddings, iterations)
        alignment = (2 - 2 * cosine_V).mean()
        trace = penalty_V[1:].mean()
        if not momentum_target:
            trace = trace + penalty_V[0]
        return INTLLoss(alignment + trade_off * trace, alignment, trace)


def default_trade_off(n: int) -> float:
    """0.01·(log2(n) − 3), n the global batch (channel whitening) or the embedding size (batch whitening)."""
    if n <= 8:
        raise ValueError(
            f"the default trade-off 0.01·(log2(n) − 3) is {'zero' if n == 8 else 'negative'} at n = {n}: "
            "take a larger batch (batch whitening: a larger embedding) or set the trade-off yourself"
        )
    return 0.01 * (math.log2(n) - 3)


def loss_floor(
    n: int,
    d: int,
    *,
    iterations: int = 4,
    trade_off: float | None = None,
    whitening: Whitening = "channel",
    momentum_target: bool = False,
) -> float:
    """What the loss of N x D embeddings cannot fall under: all aligned, the spectrum as even as can be."""
    if trade_off is None:
        trade_off = default_trade_off(n if whitening == "channel" else d)
    floor = trace_floor(n, d, iterations=iterations, whitening=whitening)
    return trade_off * floor * (1 if momentum_target else 2)


def trace_floor(n: int, d: int, *, iterations: int = 4, whitening: Whitening = "channel") -> float:
    """The least penalty Σ_i (Ŝ_ii − 1)² of one view: 209.6 at N = 256, T = 4, channel whitening, D > N.

    IterNorm maps an eigenvalue x of the trace-normalised spectrum to h(x) = x g_T(x)², rising, concave and
    below 1. Of the M eigenvalues r = min(M, K − 1) can be positive, K the averaged side; their sum tr Ŝ is at
    most r h(1 / r), and the penalty at least (M − tr Ŝ)² / M, reached when all Ŝ_ii are equal.
    """
    m, k = (n, d) if whitening == "channel" else (d, n)
    rank = min(m, k - 1)
    x = torch.full((rank,), 1 / rank, dtype=torch.float64)
    largest = float((x * iternorm(iterations)(x) ** 2).sum())  # tr Ŝ at equal eigenvalues
    return (m - largest) ** 2 / m


def _check(embeddings: Sequence[Tensor], whitening: str, iterations: int) -> None:
    if whitening not in ("channel", "batch"):
        raise ValueError(f"whitening must be 'channel' or 'batch', got {whitening!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    check_views(embeddings)


def _channel_terms(embeddings: Sequence[Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """Mean cosines of views 1 … V − 1 with view 0 and the penalties of all views, through Gram matrices."""
    v, d = len(embeddings), embeddings[0].shape[1]
    zc_VNd, total = all_images(_Centred.apply(*embeddings))
    grams = total(_Grams.apply(zc_VNd, embeddings[0].requires_grad)) / (d - 1)
    own_VNN, cross_VNN = grams[:v], grams[v:]
    w_VNN = newton_inverse_root(own_VNN, iterations)
    norms_VN = (product(w_VNN, own_VNN) * w_VNN).sum(-1)  # Ŝ_ii: a diagonal needs no third product
    dots_VN = (product(w_VNN[1:], cross_VNN) * w_VNN[0]).sum(-1)
    return _mean_cosine(dots_VN, norms_VN), _penalty(norms_VN)


def _mean_cosine(dots_VN: Tensor, norms_VN: Tensor) -> Tensor:
    """Mean over images of <ẑ_i, ẑ_0> / (‖ẑ_i‖ ‖ẑ_0‖), from squared norms."""
    tiny = torch.finfo(norms_VN.dtype).tiny
    return (dots_VN / (norms_VN[1:] * norms_VN[0]).clamp_min(tiny).sqrt()).mean(-1)


def _penalty(variances_VM: Tensor) -> Tensor:
    return (variances_VM - 1).square().sum(-1)


class _Centred(torch.autograd.Function):
    """Views minus their rows' means as one V x n x D tensor, float32 or float64.

    Its backward need not centre: the Gram products give dZc rows of mean 0, as Zc has.
    """

    @staticmethod
    def forward(ctx: Any, *views_nD: Tensor) -> Tensor:
        first = views_nD[0]
        ctx.dtype = first.dtype
        out_VnD = wide(first.new_empty(0)).new_empty(len(views_nD), *first.shape)
        for z_nD, slot_nD in zip(views_nD, out_VnD):
            z_nD = wide(z_nD)
            torch.sub(z_nD, z_nD.mean(1, keepdim=True), out=slot_nD)
        return out_VnD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_VnD: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(d.to(ctx.dtype) if need else None for d, need in zip(d_VnD, ctx.needs_input_grad))


class _Grams(torch.autograd.Function):
    """Zc (V x N x D) to G_00 … G_(V−1)(V−1), G_10 … G_(V−1)0, stacked, with a backward of its own.

    2V − 1 products of N² D forward, 4V − 4 backward: dZc_a = (dG_aa + dG_aaᵀ) Zc_a + dG_a0 Zc_0 and
    dZc_0 = (dG_00 + dG_00ᵀ) Zc_0 + Σ_a dG_a0ᵀ Zc_a, one product, left out for a constant target.
    Kept between the two: Zc alone.
    """

    @staticmethod
    def forward(ctx: Any, zc_VND: Tensor, target_needs_grad: bool) -> Tensor:
        ctx.save_for_backward(zc_VND)
        ctx.target_needs_grad = target_needs_grad
        v, n, _ = zc_VND.shape
        grams = zc_VND.new_empty(2 * v - 1, n, n)
        torch.bmm(zc_VND, zc_VND.mT, out=grams[:v])
        torch.matmul(zc_VND[1:], zc_VND[0].mT, out=grams[v:])
        return grams

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_grams: Tensor) -> tuple[Tensor, None]:
        (zc_VND,) = ctx.saved_tensors
        v, n, d = zc_VND.shape
        d_cross_VNN = d_grams[v:]
        with no_autocast(zc_VND):
            a_VNN = d_grams[:v] + d_grams[:v].mT
            out_VND = torch.empty_like(zc_VND)
            if ctx.target_needs_grad:
                row = torch.cat([a_VNN[0], *d_cross_VNN.mT], 1)  # N x VN
                torch.mm(row, zc_VND.view(-1, d), out=out_VND[0])
            else:
                out_VND[0].zero_()
            torch.bmm(a_VNN[1:], zc_VND[1:], out=out_VND[1:])
            out_VND[1:].view(-1, d).addmm_(d_cross_VNN.reshape(-1, n), zc_VND[0])
        return out_VND, None


def _batch_terms(embeddings: Sequence[Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """The same of batch whitening, Φ on the smaller side, for Zc g(Zcᵀ Zc) = g(Zc Zcᵀ) Zc.

    N < D: the features are split over the ranks, as above. Else each rank keeps its own images.
    """
    z_VnD = torch.stack([wide(z_nD) for z_nD in embeddings])
    n_global, d = z_VnD.shape[1] * world_size(), z_VnD.shape[2]
    if n_global < d:
        z_VNd, total = all_images(z_VnD)
        zc_VNd = z_VNd - z_VNd.mean(1, keepdim=True)
        gram_VNN = total(product(zc_VNd, zc_VNd.mT)) / (n_global - 1)
        y_VNd = product(newton_inverse_root(gram_VNN, iterations), zc_VNd)
        norms_VN = total(y_VNd.square().sum(2))
        dots_VN = total((y_VNd[1:] * y_VNd[0]).sum(2))
        variances_Vd = y_VNd.square().sum(1) / (n_global - 1)
        return _mean_cosine(dots_VN, norms_VN), total(_penalty(variances_Vd))
    zc_VnD = z_VnD - all_reduce(z_VnD.sum(1, keepdim=True)) / n_global
    s_VDD = all_reduce(product(zc_VnD.mT, zc_VnD)) / (n_global - 1)
    y_VnD = product(zc_VnD, newton_inverse_root(s_VDD, iterations))
    own_cosine_V = _mean_cosine((y_VnD[1:] * y_VnD[0]).sum(2), y_VnD.square().sum(2))
    variances_VD = all_reduce(y_VnD.square().sum(1)) / (n_global - 1)
    return all_reduce(own_cosine_V) / world_size(), _penalty(variances_VD)
