"""k-NN for four k in one pass, beside one pass per k with a one-hot vote and beside bare products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from benchmarks.harness import Comparison, Step, interleave, peak_extra_bytes
from transfer.knn import knn_evaluate

TITLE = "k-NN, k = 10, 20, 100, 200, cosine, weighted vote, float32"
KS = (10, 20, 100, 200)
CLASSES = 1000
BLOCK = 256  # queries at a time in the references, as published evaluations have it

# bank images, queries, features; the first is the case with targets
CASES = ((50_000, 2_000, 512), (50_000, 2_000, 2048))
QUICK = ((2_000, 100, 64),)


def data(n: int, m: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clusters around class centres, so that votes are neither unanimous nor chance."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, d, generator=g)
    labels = torch.randint(0, CLASSES, (n + m,), generator=g)
    x = centres[labels] + 2 * torch.randn(n + m, d, generator=g)
    return x[:n], labels[:n], x[n:], labels[n:]


def one_pass_per_k(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor
) -> dict[str, float]:
    """DINO's eval_knn.py: for each k all similarities anew, neighbours' labels as one-hot vectors."""
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    found: dict[str, float] = {}
    for k in KS:
        top1 = top5 = 0.0
        for start in range(0, len(queries), BLOCK):
            near, index = (queries[start : start + BLOCK] @ bank.T).topk(k)
            votes = one_hot(bank_labels[index], CLASSES).float() * (near / 0.07).exp()[:, :, None]
            order = votes.sum(1).sort(1, descending=True).indices
            right = order == query_labels[start : start + BLOCK, None]
            top1, top5 = top1 + float(right[:, :1].sum()), top5 + float(right[:, :5].sum())
        found |= {f"top1_k{k}": 100 * top1 / len(queries), f"top5_k{k}": 100 * top5 / len(queries)}
    return found


def bare(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> None:
    """Normalisation, the products and top-k alone."""
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    for start in range(0, len(queries), BLOCK):
        (queries[start : start + BLOCK] @ bank.T).topk(max(KS))


def ours(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> dict[str, float]:
    """Ours."""
    return knn_evaluate(bank, bank_labels, queries, query_labels, ks=KS)


def make(n: int, m: int, d: int) -> Step:
    """Ours with its data, for the memory measurement."""
    return partial(ours, *data(n, m, d))


def measure(quick: bool) -> list[Comparison]:
    """Times in turns; the two ways must agree on the accuracies."""
    comparisons = []
    for number, (n, m, d) in enumerate(QUICK if quick else CASES):
        parts = data(n, m, d)
        got, wanted = ours(*parts), one_pass_per_k(*parts)
        assert all(abs(got[key] - wanted[key]) <= 100 / m for key in wanted), (got, wanted)
        steps: dict[str, Step] = {
            "ours": partial(ours, *parts),
            "one pass per k": partial(one_pass_per_k, *parts),
            "bare": partial(bare, *parts),
        }
        times = interleave(steps, repeats=3, warm_up=0 if not quick else 1)
        target = number == 0 and not quick
        memory = peak_extra_bytes(make, n, m, d)
        comparisons += [
            Comparison(
                case=f"{n} x {d}, {m} queries: one pass per k, one-hot vote",
                reference=times["one pass per k"],
                ours=times["ours"], target_speedup=5.0 if target else None, ours_peak_bytes=memory,
            ),
            Comparison(
                case=f"{n} x {d}, {m} queries: bare product and top-k", reference=times["bare"],
                ours=times["ours"], target_speedup=1 / 1.5 if target else None,
            ),
        ]  # fmt: skip
    return comparisons
