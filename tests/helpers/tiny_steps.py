"""Steps of a second for the tests of the graph: they say when they ran, fail, train slowly and go on.

tiny_steps.main([what, OUTPUT, ...])
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from pretrain.common.collectives import any_rank
from pretrain.common.errors import UserError
from pretrain.common.process_group import rank, world_size
from pretrain.common.progress import Progress
from pretrain.common.signals import StopSignals


def main(argv: list[str]) -> int | None:
    """Do what the first word says, then write OUTPUT/made."""
    what, folder, *rest = argv
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        with open(out / "runs.txt", "a") as file:
            file.write(f"{os.getpid()} {time.time()}\n")
    if what == "fail":
        raise RuntimeError("the reason why")
    if what == "fail-rank-1" and rank() == 1:
        raise RuntimeError("rank 1 has the reason")
    if what == "mistake":
        raise UserError("this is not a folder: nowhere")
    if what == "fail-unless":
        if not Path(rest[0]).exists():
            raise UserError(f"{rest[0]}: no such file")
    elif what == "code":
        print("error: said on the way out", file=sys.stderr)
        return 2
    elif what == "nothing":
        return 0
    elif what == "ranks":
        _ranks(out)
    elif what == "where":
        _where(out)
    elif what == "frail":
        _frail(out)
    elif what == "train":
        _train(out, int(rest[0]))
    (out / "made").write_text("yes")
    return None


def _ranks(out: Path) -> None:
    """What this rank is, and a sum over all of them."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(rank() + 1)])
    dist.all_reduce(total)
    told = {"sum": total.item(), "world": world_size(), "local": os.environ["LOCAL_RANK"]}
    names = ("MASTER_ADDR", "MASTER_PORT", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")
    told.update({name: os.environ.get(name) for name in names})
    (out / f"rank{rank()}.json").write_text(json.dumps(told))


def _where(out: Path) -> None:
    import slurm.execution.job

    told = {
        "slurm": slurm.execution.job.__file__,
        "threads": os.environ["OMP_NUM_THREADS"],
        "cwd": os.getcwd(),
    }
    (out / "where.json").write_text(json.dumps(told))


def _train(out: Path, total: int) -> None:
    """A tenth of a second a step; saves when told to stop and every ten steps, and goes on from there."""
    state = out / "state.json"
    start = json.loads(state.read_text())["step"] if state.exists() else 0
    with (
        StopSignals() as stop,
        Progress(total, label="train", start=start, file=out / "progress.json") as bar,
        open(out / f"steps{rank()}.txt", "a", buffering=1) as steps,
    ):
        for step in range(start, total):
            time.sleep(0.1)
            bar.update(1, loss=1.0 / (step + 1))
            steps.write(f"{step}\n")
            told = any_rank(stop.requested)
            if rank() == 0 and (told or (step + 1) % 10 == 0):
                state.write_text(json.dumps({"step": step + 1}))
            if told:
                stop.hand_over()


def _frail(out: Path) -> None:
    """The first time, fall over a signal before it can be answered."""
    if (out / "told").exists():
        return
    with StopSignals() as stop:
        (out / "told").touch()
        while not stop.requested:
            time.sleep(0.02)
        raise RuntimeError("DataLoader worker exited unexpectedly")


def slow_hook(backbone: object, settings: object) -> dict[str, float]:
    """A hook for pretraining that only takes time, so that a time limit is met."""
    time.sleep(35)
    return {}
