"""The header lines of a SLURM job (#SBATCH ...) from the resources that a step asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import submitit

from slurm.steps.resources import Resources


class SubmissionFiles(submitit.SlurmExecutor):
    """Writes what would be submitted; submitit's own class refuses to be built where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        """More than 0: to write a submission file nothing of SLURM is needed."""
        return 1


def slurm_executor(
    name: str, asked: Resources, *, python: str, logs: Path, dependency: str | None, dry: bool = False
) -> submitit.SlurmExecutor:
    """submitit's executor whose jobs have these resources; a `dry` one only writes submission files, also
    where no SLURM is installed."""
    kind = SubmissionFiles if dry else submitit.SlurmExecutor
    queue = kind(logs, max_num_timeout=asked.max_timeouts, python=python)
    extra: dict[str, Any] = {"kill-on-invalid-dep": "yes", "requeue": True, **asked.sbatch}
    wanted = {
        "job_name": name,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks,
        "gpus_per_node": asked.gpus_per_node or None,
        "cpus_per_task": asked.cpus_per_task,
        "mem": _memory(asked.mem_gb),
        "time": asked.timeout_min,
        "signal_delay_s": asked.signal_delay_s,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "exclude": asked.exclude,
        "array_parallelism": asked.array_parallelism,
        "setup": list(asked.setup) or None,
        "dependency": dependency,
        "additional_parameters": extra,
        # A rank that dies takes the others along, which would wait for it for half an hour.
        # Since 22.05 srun does not take the number of cores over from sbatch, and binds each rank to one.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked.cpus_per_task}"],
    }
    queue.update_parameters(**{k: v for k, v in wanted.items() if v is not None})
    return queue


def _memory(gb: float | None) -> str | None:
    """sbatch takes whole numbers alone."""
    if gb is None:
        return None
    return f"{gb:.0f}GB" if gb == int(gb) else f"{gb * 1024:.0f}MB"
