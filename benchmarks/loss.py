"""The INTL loss in Gram space beside a plainly written one that forms the whitened embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.harness import Comparison, Step, interleave, peak_extra_bytes
from pretrain.objectives.intl import default_trade_off, intl_loss
from pretrain.training_step import captured

TITLE = "INTL loss, float32, forward and backward: Gram space beside forming the whitened embeddings"

# images of the global batch, features, views; the first is the case with targets
CASES = ((256, 8192, 2), (256, 2048, 2), (256, 8192, 6), (512, 8192, 2))
QUICK = ((64, 512, 2),)


def plain_loss(views_ND: Sequence[Tensor]) -> Tensor:
    """The paper's formula by autograd: each view whitened once, Ẑ formed, Ŝ's diagonal from its squares."""
    n, d = views_ND[0].shape
    whitened, penalties = [], []
    for z_ND in views_ND:
        zc_ND = z_ND - z_ND.mean(1, keepdim=True)
        s_NN = zc_ND @ zc_ND.T / (d - 1)
        trace = s_NN.trace()
        s_NN = s_NN / trace
        p_NN = torch.eye(n, dtype=z_ND.dtype, device=z_ND.device)
        for _ in range(4):
            p_NN = 1.5 * p_NN - 0.5 * torch.linalg.matrix_power(p_NN, 3) @ s_NN
        y_ND = (p_NN / trace.sqrt()) @ zc_ND
        whitened.append(y_ND)
        penalties.append((y_ND.square().sum(1) / (d - 1) - 1).square().sum())
    losses = [
        2 - 2 * cosine_similarity(y, whitened[0], dim=1).mean() + default_trade_off(n) * (p + penalties[0])
        for y, p in zip(whitened[1:], penalties[1:])
    ]
    return torch.stack(losses).mean()


def ours(views_ND: Sequence[Tensor]) -> Tensor:
    return intl_loss(views_ND).total


def in_a_step(n: int, d: int, v: int) -> Step:
    """Ours as a training step has it: on a GPU its kernels compiled and replayed as a graph."""
    if not torch.cuda.is_available():
        return step(ours, n, d, v)
    called = step(torch.compile(ours, dynamic=False), n, d, v)
    graph, _ = captured(called)
    return partial(_replay, graph, called)


def _replay(graph: torch.cuda.CUDAGraph, called: Step) -> None:
    """`called` is held for its views, which the graph reads where they lay when it was captured."""
    graph.replay()


def step(loss: Callable[[Sequence[Tensor]], Tensor], n: int, d: int, v: int) -> Step:
    """One forward and backward to the embeddings, which a training step would hand on to the projector."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    views = [torch.randn(n, d, generator=generator, device=device).requires_grad_() for _ in range(v)]
    return lambda: torch.autograd.grad(loss(views), views)


def warm_up() -> Step:
    return step(plain_loss, 32, 64, 2)


def measure(quick: bool) -> list[Comparison]:
    comparisons = []
    for n, d, v in QUICK if quick else CASES:
        steps = {"reference": step(plain_loss, n, d, v), "ours": in_a_step(n, d, v)}
        large = n * n * d * v > 256 * 256 * 8192 * 2
        times = interleave(steps, repeats=3 if quick else 7 if large else 21)
        main_case = (n, d, v) == CASES[0]
        comparisons.append(
            Comparison(
                case=f"N = {n}, D = {d}, {v} views",
                reference=times["reference"],
                ours=times["ours"],
                reference_peak_bytes=peak_extra_bytes(step, plain_loss, n, d, v, warm_up=warm_up),
                ours_peak_bytes=peak_extra_bytes(step, ours, n, d, v, warm_up=warm_up),
                target_speedup=1.8 if main_case else None,
                target_memory_share=0.5 if main_case else None,
            )
        )
    return comparisons
