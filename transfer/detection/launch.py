"""Run a function on several ranks; one that fails reports its own error.

Three ways: inside a process group that is already there (a job's ranks), inside the one that torchrun's
environment announces, or in processes spawned here. A signal to the spawning process reaches them all.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from pretrain.common.errors import UserError
from pretrain.common.process_group import is_on, process_group
from pretrain.common.signals import Stopped, StopSignals

TIMEOUT = timedelta(minutes=60)  # evaluation on one rank while the others wait takes long


def world_size(num_gpus: int, num_machines: int, *, on_cpu: bool) -> int:
    """How many processes will take part; UserError where this machine has not the GPUs."""
    if is_on():
        return dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return int(os.environ["WORLD_SIZE"])
    if num_gpus < 0 or num_machines < 1:
        raise UserError(f"--num-gpus {num_gpus} --num-machines {num_machines}: wanted 0 or more, 1 or more")
    there = torch.cuda.device_count()
    if num_gpus > there and not on_cpu:
        raise UserError(
            f"--num-gpus {num_gpus}: this machine has {there}; --num-gpus 0 runs on the CPU, MODEL.DEVICE "
            "cpu with --num-gpus N on N CPU processes"
        )
    return max(num_gpus, 1) * num_machines


def launch(
    function: Callable[..., None], arguments: Sequence[Any], *, num_gpus: int, on_cpu: bool = False,
    num_machines: int = 1, machine_rank: int = 0, dist_url: str = "auto",
) -> None:  # fmt: skip
    """Call `function(*arguments)` on every rank and wait. Raises Stopped when the ranks saved and stopped.

    `on_cpu`: `num_gpus` is the number of CPU processes on each machine.
    """
    if is_on() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with process_group(TIMEOUT.total_seconds() / 60):
            _know_the_machine(int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or _ranks_per_machine())
            function(*arguments)
        return
    per_machine = max(num_gpus, 1)
    if per_machine * num_machines == 1:
        function(*arguments)
        return
    if dist_url == "auto":
        if num_machines > 1:
            raise UserError("--dist-url tcp://HOST:PORT of machine 0 is needed for several machines")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    first = machine_rank * per_machine
    with StopSignals() as stop:
        ranks = mp.start_processes(
            _worker,
            (function, tuple(arguments), first, per_machine, per_machine * num_machines, dist_url, on_cpu),
            nprocs=per_machine,
            join=False,
            start_method="spawn",
        )
        told = False
        while not ranks.join(timeout=0.2):
            if stop.requested and not told:
                told = True
                for process in ranks.processes:
                    if process.is_alive() and process.pid:
                        os.kill(process.pid, signal.SIGTERM)
        if stop.requested:
            stop.hand_over()


def _worker(
    local_rank: int, function: Callable[..., None], arguments: tuple[Any, ...], first: int, per_machine: int,
    world: int, dist_url: str, on_cpu: bool,
) -> None:  # fmt: skip
    os.environ.update(RANK=str(first + local_rank), LOCAL_RANK=str(local_rank))
    if on_cpu:
        torch.set_num_threads(max(1, torch.get_num_threads() // per_machine))
    else:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "gloo" if on_cpu else "nccl", init_method=dist_url, rank=first + local_rank, world_size=world,
        timeout=TIMEOUT,
    )  # fmt: skip
    _know_the_machine(per_machine)
    try:
        function(*arguments)
    except Stopped:  # the spawning process was told too, and says so
        pass
    finally:
        dist.destroy_process_group()


def _ranks_per_machine() -> int:
    """In a group made by others: as many ranks as share this host's name."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def _know_the_machine(per_machine: int) -> None:
    """detectron2 keeps a group of the ranks on one machine; make it once."""
    if comm._LOCAL_PROCESS_GROUP is None and dist.get_world_size() > 1:
        comm.create_local_process_group(per_machine)
