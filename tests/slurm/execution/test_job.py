"""What a job does around its command: ranks, ports, markers, limits."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.common.signals import StopSignals
from slurm.execution import ranks
from slurm.execution.job import Job, StepFailed
from slurm.state.step_files import Record
from slurm.steps.graph import Step


def environment(rank: int, tasks: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        global_rank=rank, local_rank=rank, num_tasks=tasks, num_nodes=1, hostnames=["localhost"],
        hostname="here", job_id="7", cluster="local",
    )  # fmt: skip


def job(root: Path, *argv: str, **rest) -> Job:
    step = Step(
        name="s", kind="knn", command="tiny_steps", argv=argv, output=root / "s", makes=(root / "s" / "made",)
    )
    return Job(step, **{"key": "k", "root": root, "needed": {}, "max_requeues": 3, **rest})


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit would start it, without submitit; what the job exports is taken back."""
    monkeypatch.setattr("submitit.JobEnvironment", lambda: environment(0))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("BENCH_JOB_ID", "")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def test_done_is_marked_and_not_done_again(tmp_path: Path) -> None:
    assert job(tmp_path, "work", str(tmp_path / "s"))() == "done"
    assert Record(tmp_path, "s").is_done("k") and not Record(tmp_path, "s").is_done("another key")
    assert job(tmp_path, "work", str(tmp_path / "s"))() == "done before"
    assert Record(tmp_path, "s").state["state"] == "done"


def test_what_is_needed_must_be_done(tmp_path: Path) -> None:
    """A dependency that SLURM has forgotten counts as met there: the job looks itself."""
    with pytest.raises(StepFailed, match="needs other, which has not finished"):
        job(tmp_path, "work", str(tmp_path / "s"), needed={"other": "x"})()
    Record(tmp_path, "other").folder.mkdir(parents=True)
    Record(tmp_path, "other").finish("x")
    assert job(tmp_path, "work", str(tmp_path / "s"), needed={"other": "x"})() == "done"


def test_queued_again_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    with pytest.raises(StepFailed, match="queued again 4 times, more than max_requeues=3"):
        job(tmp_path, "work", str(tmp_path / "s"))()
    assert "max_requeues" in Record(tmp_path, "s").failure["error"]


def test_a_signal_heard_before_the_job_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopSignals, "heard", int(signal.SIGTERM))
    with pytest.raises(StepFailed, match="needs other"):
        job(tmp_path, "work", str(tmp_path / "s"), needed={"other": "x"})()
    assert "needs other" in Record(tmp_path, "s").failure["error"]


def test_the_first_rank_to_fail_is_the_cause(tmp_path: Path) -> None:
    record = Record(tmp_path, "s")
    record.fail("7-0", "RuntimeError: the cause", "trace", 1)
    record.fail("7-0", "RuntimeError: connection closed by peer", "trace", 0)
    assert record.failure["error"] == "RuntimeError: the cause" and record.failure["rank"] == 1


def test_a_job_that_runs_twice_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("slurm.execution.job.LOCK_WAIT_S", 0)
    folder = Record(tmp_path, "s").folder
    folder.mkdir(parents=True)
    with open(folder / "running.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StepFailed, match="another job still runs s"):
            job(tmp_path, "work", str(tmp_path / "s"))()
    assert not (tmp_path / "s").exists()


def test_a_port_in_use_is_passed_over(tmp_path: Path) -> None:
    """The first candidate is taken: rank 0 binds the next one, and rank 1 finds it."""
    rendezvous = tmp_path / "rendezvous-7-0.json"
    first, second, *_ = ranks.candidate_ports(rendezvous.name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        stores = {}
        other = threading.Thread(
            target=lambda: stores.update(b=ranks._connect(environment(1, 2), rendezvous))
        )
        other.start()
        stores["a"] = ranks._listen(environment(0, 2), rendezvous)
        other.join(timeout=30)
    assert json.loads(rendezvous.read_text())["port"] == second == int(os.environ["MASTER_PORT"])
    stores["a"].set("word", "heard")
    assert stores["b"].get("word") == b"heard"
