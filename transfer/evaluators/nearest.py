"""The nearest bank rows of every query, found block by block.

N bank images, M queries, D features, K the largest k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

BLOCK_BYTES = 1 << 27  # of one block of similarities, and of one block of the bank, on a CPU
ON_GPU = 8  # times as large, for what a block costs beside its products
CPU = torch.device("cpu")
SPARE = 8  # candidates beyond k whose Euclidean distances are computed exactly
SMALL, LARGE = 1e-15, 1e15  # of a row's largest feature: between them float32 has room for products


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    metric: str,
    device: torch.device,
    told: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Similarity and bank index of the `k` nearest bank rows, nearest first: two M x k tensors.

    The similarity is the cosine, the dot product, or minus the squared Euclidean distance. The bank is read
    block by block; extra memory is a few blocks and two M x k tensors. `told` is called with the number of
    bank rows of each block that is done.

    Computed in float32, in float64 where either is given in it or dot products and distances would leave the
    range of float32; cosines know no such range. Euclidean candidates are found by 2qb - b^2 - q^2, which
    loses the digits that an offset common to all features takes up: from both a centre is subtracted first,
    and the distances of the k nearest and SPARE more are then computed anew as differences.
    """
    dtype = torch.promote_types(torch.promote_types(bank.dtype, queries.dtype), torch.float32)
    if metric != "cosine" and (_out_of_range(bank) or _out_of_range(queries)):
        dtype = torch.float64
    centre = _centre(bank, device).to(dtype) if metric == "euclidean" else None
    wide = k if centre is None else min(k + SPARE, len(bank))
    bank_block = min(len(bank), max(wide, block_bytes(device) // (bank.shape[1] * dtype.itemsize)))
    queries = queries.to(device, dtype)
    best = queries.new_empty(len(queries), wide)
    index_of = torch.empty(len(queries), wide, dtype=torch.long, device=device)
    for start in range(0, len(bank), bank_block):
        block = _prepared(bank[start : start + bank_block].to(device, dtype), metric)
        if centre is not None:
            block = block - centre
            norms = block.square().sum(1)
        merged = 6 * wide * (block.element_size() + index_of.element_size())  # what _in_order holds of a row
        for rows in row_blocks(len(queries), max(len(block) * block.element_size(), merged), device):
            part = _prepared(queries[rows], metric)
            if centre is None:
                near = part @ block.T
            else:
                part = part - centre
                near = torch.addmm(norms, part, block.T, beta=-1, alpha=2)
                near -= part.square().sum(1, keepdim=True)
            value, index = _top(near, min(wide, len(block)))
            index += start
            if start > 0:
                value, index = _in_order(
                    torch.cat([best[rows], value], 1), torch.cat([index_of[rows], index], 1), wide
                )
            best[rows], index_of[rows] = value, index
        if told is not None:
            told(len(block))
        del block, near  # before the next are made
    if centre is not None:
        for rows in row_blocks(len(queries), wide * bank.shape[1] * dtype.itemsize, device):
            difference = bank[index_of[rows].to(bank.device)].to(device, dtype) - queries[rows, None]
            best[rows], index_of[rows] = _in_order(-difference.square().sum(2), index_of[rows], wide)
    return best[:, :k], index_of[:, :k]


def _centre(bank: Tensor, device: torch.device) -> Tensor:
    """The bank's mean (D), rounded to a power of two of the order of its spread.

    So rounded, values of few digits (whole numbers) keep few digits when it is subtracted, and their ties.
    """
    total, square = (torch.zeros(bank.shape[1], dtype=torch.float64, device=device) for _ in range(2))
    for rows in row_blocks(len(bank), bank.shape[1] * 8, device):
        block = bank[rows].to(device, torch.float64)
        total += block.sum(0)
        square += block.square().sum(0)
    mean = total / len(bank)
    spread = float((square / len(bank) - mean.square()).clamp_min(0).mean().sqrt())
    grid = 2.0 ** math.floor(math.log2(spread)) if spread > 0 else 0.0
    return (mean / grid).round() * grid if grid else mean


def _out_of_range(x: Tensor) -> bool:
    """Whether the square of a row's length may be infinite or 0 in float32 though its own is neither."""
    for rows in row_blocks(len(x), x.shape[1] * x.element_size()):
        largest = x[rows].abs().amax(1).double()
        if bool(((largest > LARGE) | ((largest > 0) & (largest < SMALL))).any()):
            return True
    return False


def _prepared(x: Tensor, metric: str) -> Tensor:
    """For cosines: of unit length; first scaled by a power of two, so that no square leaves float32."""
    if metric != "cosine":
        return x
    largest = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return normalize(x * (torch.frexp(largest).mantissa / largest), dim=1)


def _top(near: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, equal ones by the lower column: topk leaves their order open."""
    wide = min(k + 1, near.shape[1])
    value, index = near.topk(wide, dim=1)
    if wide > k:
        tied = (value[:, k - 1] == value[:, k]).nonzero().flatten()
        if len(tied):  # which of the equal ones are in is open as well: the first columns are
            near, last = near[tied], value[tied, k - 1 : k]
            column = torch.arange(near.shape[1], dtype=torch.int32, device=near.device)
            place = torch.where(near == last, -column, -near.shape[1]).masked_fill_(near > last, 1)
            index[tied, :k] = place.topk(k, dim=1).indices
            value[tied, :k] = near.gather(1, index[tied, :k])
    return _in_order(value[:, :k], index[:, :k], k)


def _in_order(value: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by falling value, equal values by rising index, cut to k."""
    index, by_index = index.sort(dim=1)
    value, by_value = value.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return value[:, :k], index.gather(1, by_value)[:, :k]


def block_bytes(device: torch.device) -> int:
    """The size of a block on `device`."""
    return BLOCK_BYTES * (ON_GPU if device.type == "cuda" else 1)


def row_blocks(n: int, bytes_each: int, device: torch.device = CPU) -> Iterator[slice]:
    """Slices of range(n), each of as many rows of `bytes_each` as fit a block, at least one."""
    step = max(1, block_bytes(device) // max(1, bytes_each))
    return (slice(s, s + step) for s in range(0, n, step))
