"""Steps as submitit jobs: what each job calls, by which Python, and how one starts on this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pretrain.common.locks import process_start
from slurm.execution.job import Job
from slurm.execution.job_server import ForkingExecutor, JobServer, modules_of
from slurm.state.step_files import Record
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import Resources


def job_of(step: Step, graph: Graph, root: Path, resources: Resources) -> Job:
    """The callable of one step."""
    needed = {name: graph.keys[name] for name in step.depends_on}
    return Job(step, key=graph.keys[step.name], root=root, needed=needed, max_requeues=resources.max_requeues)


def python_command(code: Path, threads: int) -> str:
    """Python in the pinned code's folder, with as many threads as the job has cores."""
    path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Short OpenMP spin, so that idle threads yield their core: many times faster where jobs share a machine.
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")
    words = ["env", "-C", str(code), f"PYTHONPATH={path}", f"OMP_NUM_THREADS={threads}"]
    words += [f"GOMP_SPINCOUNT={spin}", sys.executable]
    return shlex.join(words)


def log_folder(root: Path) -> Path:
    """A fresh folder for each submission: an id that comes round again never meets old files."""
    return root / "jobs" / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def handling(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """`handler` (a function, or signal.SIG_IGN) for these signals as long as the block lasts."""
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def job_server(steps: Iterable[Step], code: Path) -> JobServer:
    """What starts these steps on this machine, by the pinned code."""
    return JobServer(shlex.split(python_command(code, 1)), modules_of(step.module for step in steps))


def submit_local(
    server: JobServer, step: Step, graph: Graph, root: Path, resources: Resources, code: Path,
    gpus: list[int], cpus: int,
) -> None:  # fmt: skip
    """Start one step on this machine."""
    logs = log_folder(root)
    executor = ForkingExecutor(logs, server, threads=max(1, cpus // resources.tasks))
    executor.update_parameters(
        tasks_per_node=resources.tasks, gpus_per_node=len(gpus), visible_gpus=tuple(gpus),
        timeout_min=resources.timeout_min, signal_delay_s=resources.signal_delay_s,
    )  # fmt: skip
    record = Record(root, step.name)
    order = list(graph.steps).index(step.name)
    record.submit(step, graph.keys[step.name], order, cluster="local", code=str(code), driver=os.getpid())
    # Processes that ignore Ctrl-C and a closed terminal keep ignoring them: who started them stops them.
    with handling(signal.SIG_IGN, signal.SIGINT, signal.SIGHUP):
        job = executor.submit(job_of(step, graph, root, resources))
    record.submitted_as(job.job_id, logs, process_start(int(job.job_id)))
    server.release()
