"""The vote of the nearest neighbours, and its accuracy for every k.

N bank images, M queries, D features, K the largest k, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.common.collectives import sum_over_ranks
from pretrain.common.errors import UserError
from pretrain.common.process_group import rank, world_size
from transfer.evaluation.accuracy import places
from transfer.evaluators.nearest import nearest, row_blocks

EPSILON = 1e-5  # added to a distance before its inverse is a vote (solo-learn)


def knn_evaluate(
    bank_ND: np.ndarray | Tensor,
    bank_labels_N: np.ndarray | Tensor,
    query_MD: np.ndarray | Tensor,
    query_labels_M: np.ndarray | Tensor,
    *,
    ks: int | Sequence[int],
    temperature: float = 0.07,
    vote: Literal["weighted", "majority"] = "weighted",
    metric: Literal["cosine", "dot", "euclidean"] = "cosine",
    device: torch.device | None = None,
    over_ranks: bool = True,
    told: Callable[[int], object] | None = None,
    per_class: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 percent for every k, one or several: top1_k20 …; `per_class` adds mean_per_class_k20.

    A weighted neighbour votes exp(s / temperature) with cosine or dot product s, or 1 / (d + 1e-5) at the
    Euclidean distance d (Wu et al. 2018, section 3.4, https://arxiv.org/abs/1805.01978; solo-learn). Ties:
    among equally near bank images the lower index is the nearer, among equal votes the smaller label wins.
    Float32 or more, see `nearest`; nothing that is given is changed. A class without a vote has no place:
    with k below 5, top-5 is among fewer classes. Queries are shared out over ranks, each holding the bank
    (a memory-mapped file will do), and all ranks must call; with `over_ranks` False the caller takes every
    query alone. Raises ValueError for k beyond the bank, sizes that do not match, and features that are not
    finite. mean_per_class is the mean of top-1 over the classes that have queries.
    """
    ks = [ks] if isinstance(ks, int) else ks
    bank, queries = _tensor(bank_ND), _tensor(query_MD)
    bank_labels, query_labels = _tensor(bank_labels_N).long(), _tensor(query_labels_M).long()
    _check(bank, bank_labels, queries, query_labels, ks)
    device = device or torch.device("cpu")
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    mine = slice(rank(), None, world_size()) if over_ranks else slice(None)
    queries, query_labels = queries[mine], query_labels[mine].to(device)
    hits = torch.zeros(2, len(ks), dtype=torch.float64, device=device)
    own_KC = torch.zeros(len(ks), classes if per_class else 0, dtype=torch.float64, device=device)
    if len(queries):
        near, index = nearest(bank, queries, max(ks), metric=metric, device=device, told=told)
        votes = _votes(near, temperature=temperature, vote=vote, metric=metric)
        labels = bank_labels.to(device)[index]
        for rows in row_blocks(len(labels), classes * 8, device):
            for column, place in enumerate(
                _places(labels[rows], votes[rows], query_labels[rows], ks, classes)
            ):
                hits[0, column] += (place < 1).sum()
                hits[1, column] += (place < 5).sum()
                if per_class:
                    own_KC[column] += query_labels[rows][place < 1].bincount(minlength=classes)
    if over_ranks:
        hits, own_KC = sum_over_ranks(hits), sum_over_ranks(own_KC)
    all_labels = _tensor(query_labels_M).long().cpu()
    percent = 100 * hits.cpu() / len(all_labels)
    found = {f"top{n}_k{k}": float(percent[r, c]) for c, k in enumerate(ks) for r, n in enumerate((1, 5))}
    if per_class:
        count_C = all_labels.bincount(minlength=classes)
        recall_KC = own_KC.cpu()[:, count_C > 0] / count_C[count_C > 0]
        found |= {f"mean_per_class_k{k}": float(r) for k, r in zip(ks, 100 * recall_KC.mean(1))}
    return found


def _votes(near: Tensor, *, temperature: float, vote: str, metric: str) -> Tensor:
    """What each neighbour's label gets, M x K float64."""
    near = near.double()
    if vote == "majority":
        return torch.ones_like(near)
    if metric == "euclidean":
        return 1 / ((-near).clamp_min(0).sqrt() + EPSILON)
    return ((near - near[:, :1]) / temperature).exp()  # a factor for each query, which changes no order


def _places(labels: Tensor, votes: Tensor, truth: Tensor, ks: Sequence[int], classes: int) -> list[Tensor]:
    """For each k, the place of the true class among those with a vote, rows x int."""
    score = votes.new_zeros(len(labels), classes)
    voted = torch.zeros_like(score, dtype=torch.bool)
    place: dict[int, Tensor] = {}
    taken = 0
    for k in sorted(set(ks)):
        score.scatter_add_(1, labels[:, taken:k], votes[:, taken:k])
        voted.scatter_(1, labels[:, taken:k], True)
        taken = k
        place[k] = places(score, truth, voted)
    return [place[k] for k in ks]


def _tensor(x: np.ndarray | Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return torch.from_numpy(x if x.flags.writeable else _writeable_view(x))


def _writeable_view(x: np.ndarray) -> np.ndarray:
    """The same memory under an array that claims to be writeable: torch warns of others. Nothing writes."""
    if isinstance(x, np.memmap) and x.filename is not None:
        return np.memmap(x.filename, dtype=x.dtype, mode="c", offset=x.offset, shape=x.shape)
    return x.copy()


def _check(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int]
) -> None:
    if len(bank) != len(bank_labels) or len(queries) != len(query_labels) or not len(queries):
        raise UserError(
            f"{len(bank)} bank features with {len(bank_labels)} labels, {len(queries)} queries with "
            f"{len(query_labels)}: wanted as many labels as features, and at least one query"
        )
    if bank.shape[1] != queries.shape[1]:
        raise UserError(f"bank features have {bank.shape[1]} columns, queries {queries.shape[1]}")
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise UserError(f"k in {list(ks)}: wanted 1 to {len(bank)}, the number of bank images")
    for name, x in (("bank", bank), ("query", queries)):
        for rows in row_blocks(len(x), x.shape[1] * 8):
            if not bool(torch.isfinite(x[rows]).all()):
                raise UserError(f"a {name} feature is not finite")
