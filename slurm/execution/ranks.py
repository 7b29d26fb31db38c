"""RANK, WORLD_SIZE, MASTER_ADDR and the process group, from submitit's environment.

Rank 0 binds the port before it tells the others, through a file in the job's folder: a port that somebody
else took in between is met at the bind and the next one is tried.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.common.files import write_json

if TYPE_CHECKING:
    from torch.distributed import TCPStore

logger = logging.getLogger(__name__)

PORTS = range(20000, 60000)
ATTEMPTS = 20
JOIN_TIMEOUT = timedelta(minutes=10)


def rank_variables(env: Any) -> dict[str, str]:
    """RANK and its like from a submitit JobEnvironment."""
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(max(1, env.num_tasks // env.num_nodes)),
    }


def candidate_ports(seed: str) -> Iterator[int]:
    """Ports to try, in an order that differs from job to job."""
    order = random.Random(seed)
    for _ in range(ATTEMPTS):
        yield order.choice(PORTS)


def address(env: Any) -> str:
    """A name under which the other ranks reach this process: the first node's, where it resolves."""
    if env.num_nodes == 1:
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        socket.getaddrinfo(env.hostnames[0], None)
        return env.hostnames[0]
    return socket.gethostname()


@contextlib.contextmanager
def joined(env: Any, rendezvous: Path, *, timeout_min: float = 30) -> Iterator[None]:
    """One process group of all the job's tasks for as long as the block lasts; nothing to do for one task.

    `rendezvous` is the file, unique to this attempt of the job, in which rank 0 says where it listens. A rank
    waits `timeout_min` for the others in any one place.
    All ranks must call.
    """
    if env.num_tasks == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    from pretrain.common.process_group import local_device

    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _listen(env, rendezvous) if env.global_rank == 0 else _connect(env, rendezvous)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=env.global_rank,
            world_size=env.num_tasks,
            timeout=timedelta(minutes=timeout_min),
        )
        yield
        dist.barrier()
        dist.destroy_process_group()
    finally:
        if env.global_rank == 0:
            rendezvous.unlink(missing_ok=True)


def _listen(env: Any, rendezvous: Path) -> TCPStore:
    """Rank 0: bind a free port, then tell the others. A port in use: the next one."""
    from torch.distributed import TCPStore

    host = address(env)
    for port in candidate_ports(rendezvous.name):
        try:
            store = TCPStore(
                host, port, env.num_tasks, is_master=True, wait_for_workers=False, timeout=JOIN_TIMEOUT
            )
        except RuntimeError as error:  # DistNetworkError: the address is in use
            logger.warning("port %d on %s: %s; trying another", port, host, str(error).splitlines()[0])
            continue
        _export(host, port)
        write_json(rendezvous, {"address": host, "port": port})
        return store
    raise RuntimeError(f"none of {ATTEMPTS} ports on {host} could be bound")


def _connect(env: Any, rendezvous: Path) -> TCPStore:
    """The other ranks: wait for rank 0's word, then connect."""
    from torch.distributed import TCPStore

    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        try:
            where: Mapping[str, Any] = json.loads(rendezvous.read_text())
        except (OSError, ValueError):
            time.sleep(0.2)
            continue
        _export(where["address"], where["port"])
        return TCPStore(
            where["address"], where["port"], env.num_tasks, is_master=False, timeout=JOIN_TIMEOUT
        )  # fmt: skip
    raise RuntimeError(f"rank 0 did not say in {rendezvous} where it listens within {JOIN_TIMEOUT}")


def _export(host: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
