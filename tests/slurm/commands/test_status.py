"""How a step stands, told from its files: waiting, running, preempted, failed, cancelled, done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.locks import Holder
from pretrain.common.output_folder import LOCK
from slurm.__main__ import main
from slurm.commands import cancel, status
from slurm.execution.local import kill_job
from slurm.state.local_process import LocalProcess
from slurm.state.step_files import Record
from slurm.state.step_state import CANCELLED, DONE, FAILED, QUEUED, RUNNING, WAITING, look, spell_seconds
from slurm.state.suite_lock import holder, locked
from slurm.steps.graph import Step


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path, "knn/intl")
    step = Step(
        name="knn/intl",
        kind="knn",
        command="m",
        argv=("a",),
        output=tmp_path / "knn" / "intl",
        depends_on=("pretrain",),
    )
    (tmp_path / "knn" / "intl").mkdir(parents=True)
    record.submit(step, "key", 0, cluster="slurm")
    return record


def test_every_state(record: Record, tmp_path: Path) -> None:
    assert look(record, None).state == WAITING
    record.submitted_as("12", tmp_path / "logs")
    assert look(record, "PENDING").state == QUEUED
    lost = look(record, None)
    assert lost.state == CANCELLED and lost.detail == "never started: it needs pretrain"

    record.set_state("running", job_id="12", started_at=time.time() - 90, starts=1)
    (tmp_path / "knn" / "intl" / "progress.json").write_text(
        json.dumps({"done": 3, "total": 10, "unit": "batch", "eta_s": 75, "values": {"loss": 0.5}})
    )
    running = look(record, "RUNNING")
    assert running.state == RUNNING and running.detail == "3/10 batches, loss 0.5, 1:15 left"
    assert 89 < running.seconds < 95

    killed = look(record, None)
    assert killed.state == FAILED and "killed" in killed.detail
    assert killed.log == tmp_path / "logs" / "12_0_log.err"

    record.set_state("requeued")
    assert look(record, "PENDING").detail == "interrupted 1 time"
    assert look(record, "PENDING PartitionConfig").detail == "interrupted 1 time, PartitionConfig"
    record.set_state("running", starts=3)
    assert look(record, "RUNNING").detail.endswith("interrupted 2 times")

    record.fail("12-2", "ValueError: no", "trace", 1)
    failed = look(record, None)
    assert (failed.state, failed.detail) == (FAILED, "ValueError: no")
    assert failed.log.name == "12_1_log.err"  # the log of the rank that failed

    record.set_state("stopped")
    assert look(record, None).state == CANCELLED

    (tmp_path / "knn" / "intl" / "results.jsonl").write_text(
        json.dumps({"task": "knn", "metrics": {"top1_k20": 79.44, "top5_k20": 99.0}}) + "\n"
    )
    record.finish("key", seconds=12.3)
    finished = look(record, None)
    assert (finished.state, finished.detail, finished.seconds) == (DONE, "knn top1_k20 79.44", 12.3)


def test_old_progress_is_not_todays(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "knn" / "intl" / "progress.json"
    path.write_text(json.dumps({"done": 9, "total": 10}))
    os.utime(path, (1, 1))
    record.set_state("running", started_at=time.time(), starts=1)
    assert look(record, "RUNNING").detail == "starting"


def test_a_recomputation_keeps_the_old_output(record: Record, tmp_path: Path) -> None:
    (tmp_path / "knn" / "intl" / "results.jsonl").write_text("{}\n")
    record.finish("key")
    record.set_aside()
    assert not record.done and not (tmp_path / "knn" / "intl").exists()
    assert [p.read_text() for p in record.folder.glob("replaced-*/results.jsonl")] == ["{}\n"]


def test_the_commands(record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "12_0_log.out").write_text("one\ntwo\nthree\n")
    record.submit(
        Step(name="knn/intl", kind="knn", command="m", argv=("a",), output=tmp_path),
        "key",
        0,
        cluster="local",
    )
    record.submitted_as("12", logs)
    record.fail("12-0", "ValueError: no", "Traceback: here", 0)
    record.set_state("running", starts=1, started_at=time.time())
    assert main(["status", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert (
        "knn/intl  failed" in told
        and "ValueError: no" in told
        and "12_0_log.err" in told
        and "1 failed" in told
    )
    assert main(["status", str(tmp_path), "--json"]) == 1
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert (step["name"], step["state"], step["job_id"]) == ("knn/intl", "failed", "12")
    assert main(["status", str(tmp_path), "--json", "--watch"]) == 2
    assert "leave out --watch" in capsys.readouterr().err
    assert main(["logs", str(tmp_path), "knn", "--lines", "2"]) == 0
    told = capsys.readouterr().out
    assert "two\nthree" in told and "one" not in told and "Traceback: here" in told
    assert main(["logs", str(tmp_path), "knm/intl"]) == 2
    assert "did you mean knn/intl?" in capsys.readouterr().err
    assert main(["cancel", str(tmp_path)]) == 0
    assert "nothing was queued or running" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "no suite was submitted into this folder" in capsys.readouterr().err


def test_cancel_tells_what_was_done_from_what_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps: one has just said that it is done, its process is still there; one ends now."""
    for order, name in enumerate(("pretrain", "proof", "knn/intl")):
        step = Step(name=name, kind="knn", command="m", argv=("a",), output=tmp_path / name)
        Record(tmp_path, name).submit(step, "key", order, cluster="local")
        Record(tmp_path, name).submitted_as(str(order), tmp_path)
    Record(tmp_path, "pretrain").finish("key")
    monkeypatch.setattr(
        cancel, "live_steps", lambda root: dict.fromkeys(["pretrain", "proof", "knn/intl"], "RUNNING")
    )
    asked = []

    def end_jobs(jobs: list[LocalProcess]) -> None:
        asked.extend(job.pid for job in jobs)
        Record(tmp_path, "proof").finish("key")

    monkeypatch.setattr(cancel, "end_jobs", end_jobs)
    assert main(["cancel", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told == "cancelled: knn/intl\ndone before it could be cancelled: proof\n"
    assert asked == [1, 2]
    assert [look(Record(tmp_path, n), None).state for n in ("pretrain", "proof", "knn/intl")] == [
        DONE, DONE, CANCELLED,
    ]  # fmt: skip


def started(root: Path, name: str, process: LocalProcess) -> Record:
    """A step as if `process` ran it."""
    record = Record(root, name)
    record.submit(
        Step(name=name, kind="knn", command="m", argv=(), output=root / name), "key", 0, cluster="local"
    )
    record.submitted_as(str(process.pid), root)
    sent = {**record.submitted, "host": process.host, "started": process.started}
    (record.folder / "submitted.json").write_text(json.dumps(sent))
    record.set_state("running", started_at=time.time(), starts=1)
    return record


def test_no_other_process_is_cancelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number that came round again, one of before the machine started anew, one of another machine."""
    command = [sys.executable, "-c", "import submitit; input()"]  # submitit's too, and yet not the suite's
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        now = LocalProcess.of(other.pid)
        assert now.is_alive
        ticks, boot = now.started.split()
        earlier = LocalProcess(host=now.host, pid=now.pid, started=f"{int(ticks) - 1} {boot}")
        rebooted = LocalProcess(host=now.host, pid=now.pid, started=f"{ticks} {boot[::-1]}")
        elsewhere = LocalProcess(host="elsewhere", pid=now.pid, started=now.started)
        unknown = LocalProcess(host="", pid=now.pid, started="")
        for name, process in (("a", earlier), ("b", rebooted), ("c", elsewhere), ("d", unknown)):
            started(tmp_path, name, process)
            process.send(signal.SIGKILL)
            kill_job(process)
        assert main(["cancel", str(tmp_path)]) == 0
        assert "left running on elsewhere: cancel there as well" in capsys.readouterr().out
        assert main(["status", str(tmp_path)]) == 1
        told = capsys.readouterr().out
        assert "c  running" in told and "on elsewhere" in told and told.count("failed") == 4
        assert other.poll() is None
        started(tmp_path, "e", now)
        assert main(["cancel", str(tmp_path)]) == 0
        assert "cancelled: e" in capsys.readouterr().out
        assert other.wait(timeout=30) == -signal.SIGTERM
        assert not now.is_alive


def test_a_look_at_hundreds_of_jobs_is_one_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 of 100 are done: one squeue call for the others, two where it has forgotten one."""
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(
        f"""#!/bin/bash
echo "$@" >> {tmp_path}/asked
if [ -e {tmp_path}/forgotten ] && [[ "$*" == *--jobs* ]]; then echo "Invalid job id specified" >&2; exit 1; fi
for i in $(seq 60 79); do echo "$i|RUNNING|None"; done; echo "80|PENDING|Priority"; echo "9999|RUNNING|None"
"""
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for i in range(100):
        record = Record(tmp_path, f"knn/{i}")
        step = Step(name=record.name, kind="knn", command="m", argv=(), output=tmp_path / str(i))
        record.submit(step, "key", i, cluster="slurm")
        record.submitted_as(str(i), tmp_path)
        record.set_state("running", starts=1)
        if i < 60:
            record.finish("key")
    views = status.look_now(tmp_path)
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "60," in asked and ",99" in asked and "59" not in asked
    assert [sum(v.state == s for v in views) for s in (DONE, RUNNING, QUEUED, FAILED)] == [60, 20, 1, 19]
    assert next(v for v in views if v.name == "knn/80").detail == "interrupted 1 time, Priority"
    (tmp_path / "forgotten").touch()
    assert status.look_now(tmp_path) == views
    assert len((tmp_path / "asked").read_text().splitlines()) == 3


def test_a_lock_whose_process_was_killed_names_nobody(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert holder(tmp_path) == os.getpid()
    (tmp_path / LOCK).touch()
    write_json(tmp_path / f"{LOCK}.by", asdict(Holder.here()))
    assert holder(tmp_path) is None


def test_steps_to_come_are_seen_and_watching_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for order, name in enumerate(("pretrain", "knn/intl")):
        step = Step(name=name, kind="knn", command="m", argv=("a",), output=tmp_path / name)
        Record(tmp_path, name).describe(step, "key", order)
    assert main(["status", str(tmp_path), "--watch", "--every-s", "0.05"]) == 0
    told = capsys.readouterr().out
    assert "pretrain  waiting" in told and "knn/intl  waiting" in told and "2 waiting" in told


def test_after_a_cancel_nothing_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a step that is still to come nor one that was written down and never got a job."""
    for order, name in enumerate(("pretrain", "knn/intl")):
        step = Step(name=name, kind="knn", command="m", argv=("a",), output=tmp_path / name)
        Record(tmp_path, name).describe(step, "key", order)
    Record(tmp_path, name).submit(step, "key", order, cluster="slurm")
    assert main(["status", str(tmp_path)]) == 0 and "2 waiting" in capsys.readouterr().out
    assert main(["cancel", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "waiting" not in told and "2 cancelled" in told


def test_a_folder_in_use_is_refused_by_name(tmp_path: Path) -> None:
    holder = f"is in use by process {os.getpid()} on"
    with locked(tmp_path), pytest.raises(UserError, match=holder), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_durations() -> None:
    assert [spell_seconds(s) for s in (5.9, 65, 600, 3725)] == ["5 s", "1:05", "10:00", "1:02:05"]
