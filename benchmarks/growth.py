"""How cost grows: the loss, a step, k-NN at sizes that double, and the loss over 1, 2, 4 processes.

From one size to the next the cost is multiplied by ratio = (size' / size)^exponent. A step that costs more
than its arithmetic grows by an exponent above the one stated beside it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import FRESH, Step, Table, interleave
from benchmarks.knn import data, ours
from benchmarks.loss import ours as our_loss
from benchmarks.loss import step as loss_step
from benchmarks.step import build, make_views, our_step
from pretrain.learner import choose_dtype
from pretrain.objectives.intl import intl_loss

TITLE = "How cost grows with batch, embedding, bank and world"
SPARE = 0.35  # of an exponent: what caches, start-up and other processes may add to one doubling
COLUMNS = ("what", "from", "to", "ms", "ms then", "ratio", "exponent", "at most", "verdict")


def tables(quick: bool) -> list[Table]:
    """Every step from one size to the next."""
    rows: list[list[str | float]] = []
    missed = 0
    for what, times, limit in [*in_one_process(quick), over_processes(quick)]:
        found = growth(what, times, limit)
        rows += found
        missed += sum(row[-1] != "ok" for row in found)
    note = (
        f"ratio = (to / from)^exponent; a step whose exponent is beyond its limit by more than {SPARE} is "
        "marked. On a CPU it is processor time, of one thread. The loss costs N²D for the Gram matrices and "
        "N³ for Newton's iterations. Over processes the global batch stays, and what counts is the processor "
        "time of all ranks together: 0 is perfect sharing, 1 is none. The ranks share the Gram matrices and "
        "each iterates on its own."
    )
    return [Table(title="Growth", columns=COLUMNS, rows=rows, note=note, missed=0 if quick else missed)]


def growth(what: str, times: Mapping[int, float], limit: float) -> list[list[str | float]]:
    """One row a step, `times` in seconds by rising size."""
    rows: list[list[str | float]] = []
    sizes = sorted(times)
    for a, b in itertools.pairwise(sizes):
        ratio = times[b] / times[a]
        exponent = math.log(ratio) / math.log(b / a)
        verdict = "ok" if exponent <= limit + SPARE else "ABOVE"
        rows.append([what, str(a), str(b), 1e3 * times[a], 1e3 * times[b], ratio, exponent, limit, verdict])
    return rows


def in_one_process(quick: bool) -> list[tuple[str, dict[int, float], float]]:
    """(what, seconds by size, the exponent of its arithmetic).

    On a CPU processor seconds of one thread, which no other process and no waiting of threads adds to.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype("auto", device)
    encoder = build("resnet18", hidden=128, output=128)
    n, d, m = (32, 64, 20) if quick else (128, 2048, 500)

    def step_of(batch: int) -> Step:
        return our_step(encoder, make_views(batch, 16 if quick else 32, device), dtype)

    cases: list[tuple[str, dict[int, Step], float]] = [
        (
            f"INTL loss, batch N, D = {d}",
            {k: loss_step(our_loss, k, d, 2) for k in doubled(n // 2, 4, quick)}, 3.0,
        ),
        (
            f"INTL loss, embedding D, N = {n}",
            {k: loss_step(our_loss, n, k, 2) for k in doubled(d // 2, 4, quick)}, 1.0,
        ),
        (
            "training step, ResNet-18, batch",
            {k: step_of(k) for k in doubled(10 if quick else 32, 3, quick)}, 1.0,
        ),
        (
            f"k-NN, bank, {m} queries, 256 features",
            {k: partial(ours, *data(k, m, 256)) for k in doubled(500 if quick else 10_000, 4, quick)}, 1.0,
        ),
    ]  # fmt: skip
    found = []
    for what, steps, limit in cases:
        named: dict[str, Step] = {str(size): step for size, step in steps.items()}
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        times = interleave(named, repeats=2 if quick else 7, clock=clock, warm_up=1 if quick else 2)
        found.append((what, {int(size): t.median_s for size, t in times.items()}, limit))
    torch.set_num_threads(threads)
    return found


def doubled(first: int, count: int, quick: bool) -> list[int]:
    return [first * 2**k for k in range(2 if quick else count)]


def over_processes(quick: bool) -> tuple[str, dict[int, float], float]:
    """Processor seconds of all gloo ranks together for one loss of the same global batch."""
    n, d = (32, 256) if quick else (256, 8192)
    worlds = (1, 2) if quick else (1, 2, 4)
    times = {world: processor_seconds(world, n, d, repeats=2 if quick else 9) for world in worlds}
    return f"INTL loss, gloo processes, N = {n}, D = {d}, processor time of all", times, 0.5


def processor_seconds(world: int, n: int, d: int, repeats: int) -> float:
    """The median over `repeats` of the sum over ranks, one thread each."""
    answers = FRESH.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            FRESH.Process(
                target=_rank,
                args=(answers, rank, world, f"{Path(folder) / 'meet'}", n, d, repeats),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        spent = [answers.get(timeout=300) for _ in ranks]
        for process in ranks:
            process.join()
    return statistics.median(sum(of_ranks) for of_ranks in zip(*spent))


def _rank(answers: Any, rank: int, world: int, meet: str, n: int, d: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    views = [torch.randn(n // world, d, generator=generator).requires_grad_() for _ in range(2)]
    spent = []
    for turn in range(2 + repeats):
        dist.barrier()
        start = time.process_time()
        torch.autograd.grad(intl_loss(views).total, views)
        if turn >= 2:
            spent.append(time.process_time() - start)
    dist.barrier()
    dist.destroy_process_group()
    answers.put(spent)
