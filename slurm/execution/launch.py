"""Steps and their resources as submitit jobs: the one place that builds an executor."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import submitit

from pretrain.common.locks import process_start
from slurm.execution.job import Job
from slurm.state.step_files import Record
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import Resources

Cluster = Literal["local", "slurm"]


class SubmissionFiles(submitit.SlurmExecutor):
    """Writes what would be submitted; submitit's own class refuses to be built where there is no srun."""

    @classmethod
    def affinity(cls) -> int:
        """More than 0: to write a submission file nothing of SLURM is needed."""
        return 1


def job_of(step: Step, graph: Graph, root: Path, resources: Resources) -> Job:
    """The callable of one step."""
    needed = {name: graph.keys[name] for name in step.depends_on}
    return Job(step, key=graph.keys[step.name], root=root, needed=needed, max_requeues=resources.max_requeues)


def python_command(code: Path, threads: int) -> str:
    """Python in the pinned code's folder, with as many threads as the job has cores."""
    path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Threads that wait let go of their core soon: where others run, a step takes a fraction of the time.
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")
    words = ["env", "-C", str(code), f"PYTHONPATH={path}", f"OMP_NUM_THREADS={threads}"]
    words += [f"GOMP_SPINCOUNT={spin}", sys.executable]
    return shlex.join(words)


def log_folder(root: Path) -> Path:
    """A fresh folder for each submission: an id that comes round again never meets old files."""
    return root / "jobs" / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def executor(
    cluster: Cluster,
    *,
    name: str,
    resources: Resources,
    code: Path,
    logs: Path,
    threads: int,
    gpus: list[int] | None = None,
    dependency: str | None = None,
    dry: bool = False,
) -> submitit.AutoExecutor | submitit.SlurmExecutor:
    """submitit's executor for steps with these resources; `gpus` are the local ones to use.

    A `dry` one for SLURM writes submission files, also where no SLURM is installed.
    """
    python = python_command(code, threads)
    if cluster == "local":
        auto = submitit.AutoExecutor(folder=logs, cluster="local", local_python=python)
        auto.update_parameters(
            name=name,
            tasks_per_node=resources.tasks,
            gpus_per_node=len(gpus or []),
            timeout_min=resources.timeout_min,
        )
        # The local executor knows these two, AutoExecutor refuses to pass them on; the dict is shared.
        auto.parameters.update(visible_gpus=tuple(gpus or []), signal_delay_s=resources.signal_delay_s)
        return auto
    kind = SubmissionFiles if dry else submitit.SlurmExecutor
    queue = kind(logs, max_num_timeout=resources.max_timeouts, python=python)
    extra: dict[str, Any] = {"kill-on-invalid-dep": "yes", "requeue": True, **resources.sbatch}
    wanted = {
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks,
        "gpus_per_node": resources.gpus_per_node or None,
        "cpus_per_task": resources.cpus_per_task,
        "mem": _memory(resources.mem_gb),
        "time": resources.timeout_min,
        "signal_delay_s": resources.signal_delay_s,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "array_parallelism": resources.array_parallelism,
        "setup": list(resources.setup) or None,
        "dependency": dependency,
        "additional_parameters": extra,
        # A rank that dies takes the others along, which would wait for it for half an hour.
        # Since 22.05 srun does not take the number of cores over from sbatch, and binds each rank to one.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}"],
    }
    queue.update_parameters(**{k: v for k, v in wanted.items() if v is not None})
    return queue


def _memory(gb: float | None) -> str | None:
    """sbatch takes whole numbers alone."""
    if gb is None:
        return None
    return f"{gb:.0f}GB" if gb == int(gb) else f"{gb * 1024:.0f}MB"


@contextlib.contextmanager
def handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """`handler` (a function, or signal.SIG_IGN) for these signals as long as the block lasts."""
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def submit_local(
    step: Step, graph: Graph, root: Path, resources: Resources, code: Path, gpus: list[int], cpus: int
) -> submitit.Job[str]:
    """Start one step on this machine."""
    logs = log_folder(root)
    threads = max(1, cpus // resources.tasks)
    auto = executor(
        "local", name=step.name, resources=resources, code=code, logs=logs, threads=threads, gpus=gpus
    )
    record = Record(root, step.name)
    order = list(graph.steps).index(step.name)
    record.submit(step, graph.keys[step.name], order, cluster="local", code=str(code), driver=os.getpid())
    # Processes that ignore Ctrl-C and a closed terminal keep ignoring them: who started them stops them.
    with handling(signal.SIG_IGN, signal.SIGINT, signal.SIGHUP):
        job = auto.submit(job_of(step, graph, root, resources))
    record.submitted_as(job.job_id, logs, process_start(int(job.job_id)))
    return job
