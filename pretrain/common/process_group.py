"""Process groups; every helper works with a single process too.

Ranks come from the environment that torchrun, a job of this project or a test sets (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT); NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def is_on() -> bool:
    """Whether a process group is there."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the group, from 0; 0 without a group."""
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if is_on() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and talks to the user."""
    return rank() == 0


def local_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(timeout_min: float = 30) -> Iterator[torch.device]:
    """Join the group that the environment names, if any, and leave it at the end; yields the device.

    A group that is already there (a job made it) is used and left in place.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # some containers allow it: neighbours would be others
    own = not is_on() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if own:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_min))
    try:
        yield device
    finally:
        if own:
            dist.destroy_process_group()


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A batch's array as a tensor on `device`, or on its way there: the host does not wait for the GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def barrier() -> None:
    """Wait for every rank. All ranks must call."""
    if is_on():
        dist.barrier()
