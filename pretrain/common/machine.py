"""What this machine has for a process, and the launch it belongs to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cores() -> int:
    """Cores that this process may run on, or all there are where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_rank() -> int:
    """The cores for this process: its share of `cores()` where the ranks on this machine have them in common.

    Ranks that SLURM has bound (their cores taken together are no more than the job has on this machine, as
    SLURM_CPUS_ON_NODE says) have a share already.
    https://slurm.schedmd.com/srun.html, output environment variables
    """
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    bound = cores() * ranks <= int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    return cores() if bound else max(1, cores() // ranks)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products; elsewhere they are emulated, slowly."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch before 2.6 does not say
        return False
    names = torch.cpu.get_capabilities()
    return bool(names.get("avx512_bf16") or names.get("amx_bf16") or names.get("bf16"))


def launch_id() -> str:
    """What the ranks of one run have in common and no other run has; "" with one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ.get(name, "-") for name in names)
