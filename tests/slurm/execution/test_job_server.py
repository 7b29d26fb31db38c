"""The process that forks local jobs: what a job finds, and what becomes of it when that process ends."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.common.errors import RunFailed
from slurm.execution.job_server import ForkingExecutor, JobServer, modules_of
from slurm.execution.launch import python_command
from slurm.execution.local import kill_job
from slurm.execution.snapshot import SOURCE
from slurm.state.local_process import LocalProcess


@pytest.fixture
def server() -> Iterator[JobServer]:
    made = JobServer(shlex.split(python_command(SOURCE, 1)), ["colorsys"])
    yield made
    made.close()


def executor(server: JobServer, folder: Path, *, threads: int = 1, tasks: int = 1) -> ForkingExecutor:
    made = ForkingExecutor(folder, server, threads=threads)
    made.update_parameters(
        tasks_per_node=tasks, gpus_per_node=0, visible_gpus=(), timeout_min=5, signal_delay_s=30
    )
    return made


def ended(job_id: str) -> None:
    process = LocalProcess.of(int(job_id))
    while process.is_alive:
        time.sleep(0.02)


def told(out: Path) -> None:
    """What a job finds, into `out` with its rank."""
    rank = os.environ["SUBMITIT_LOCAL_GLOBALID"]
    found = [os.environ["OMP_NUM_THREADS"], "colorsys" in sys.modules, Path.cwd(), sys.stdin.read()]
    print("said by", rank)
    Path(f"{out}.{rank}").write_text(repr(found))


def test_jobs_find_what_was_imported_their_environment_and_their_logs(
    server: JobServer, tmp_path: Path
) -> None:
    job = executor(server, tmp_path / "logs", threads=3, tasks=2).submit(told, tmp_path / "found")
    server.release()
    ended(job.job_id)
    for rank in (0, 1):
        assert Path(f"{tmp_path / 'found'}.{rank}").read_text() == repr(["3", True, SOURCE, ""])
        assert f"said by {rank}" in (tmp_path / "logs" / f"{job.job_id}_{rank}_log.out").read_text()
    assert not Path(f"/proc/{job.job_id}").exists()  # no zombie either


def test_jobs_outlive_it_and_the_next_one_gets_another(server: JobServer, tmp_path: Path) -> None:
    submits = executor(server, tmp_path / "logs")
    first = submits.submit(time.sleep, 60)
    server.release()
    process = LocalProcess.of(int(first.job_id))
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGKILL)
    second = submits.submit(os.mkdir, tmp_path / "made")
    server.release()
    ended(second.job_id)
    assert (tmp_path / "made").is_dir() and process.is_alive
    server.close()
    assert process.is_alive
    kill_job(process)
    ended(first.job_id)


def test_a_job_whose_id_was_not_noted_never_runs(server: JobServer, tmp_path: Path) -> None:
    job = executor(server, tmp_path / "logs").submit(os.mkdir, tmp_path / "made")
    assert LocalProcess.of(int(job.job_id)).is_alive
    server.close()  # as when the driver is killed
    ended(job.job_id)
    assert not (tmp_path / "made").exists()


def test_an_interruption_while_it_imports_leaves_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = JobServer(shlex.split(python_command(SOURCE, 1)), ["slow"])
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        executor(server, tmp_path / "logs").submit(os.mkdir, tmp_path / "made")
    server.close()
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    server = JobServer(shlex.split(python_command(SOURCE, 1)), ["no_such_module"])
    with pytest.raises(RunFailed, match="no job can be started"):
        executor(server, tmp_path / "logs").submit(os.getpid)


def test_modules_that_a_command_imports_late_come_beforehand() -> None:
    assert modules_of(["pretrain.__main__", "transfer.evaluators.knn"]) == {
        "pretrain.__main__", "pretrain.train", "transfer.evaluators.knn",
    }  # fmt: skip
