"""How a step stands, told from its files: waiting, running, preempted, failed, cancelled, done."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from slurm.__main__ import main
from slurm.commands import cancel
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
    assert running.state == RUNNING and running.detail == "3/10 batchs, loss 0.5, 1:15 left"
    assert 89 < running.seconds < 95

    killed = look(record, None)
    assert killed.state == FAILED and "killed" in killed.detail
    assert killed.log == tmp_path / "logs" / "12_0_log.err"

    record.set_state("requeued")
    assert look(record, "PENDING").detail == "interrupted 1 time"
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
    assert (finished.state, finished.detail, finished.seconds) == (DONE, "knn top1_k20 79.4", 12.3)


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

    def end_jobs(ids: list[str]) -> None:
        asked.extend(ids)
        Record(tmp_path, "proof").finish("key")

    monkeypatch.setattr(cancel, "end_jobs", end_jobs)
    assert main(["cancel", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told == "cancelled: knn/intl\ndone before it could be cancelled: proof\n"
    assert asked == ["1", "2"]
    assert [look(Record(tmp_path, n), None).state for n in ("pretrain", "proof", "knn/intl")] == [
        DONE, DONE, CANCELLED,
    ]  # fmt: skip


def test_a_lock_whose_process_was_killed_names_nobody(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert holder(tmp_path) == os.getpid()
    (tmp_path / "jobs" / "lock").write_text(f"process 1 on {os.uname().nodename}\n")
    assert holder(tmp_path) is None


def test_steps_to_come_are_seen_and_watching_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for order, name in enumerate(("pretrain", "knn/intl")):
        step = Step(name=name, kind="knn", command="m", argv=("a",), output=tmp_path / name)
        Record(tmp_path, name).describe(step, "key", order)
    assert main(["status", str(tmp_path), "--watch", "--every-s", "0.05"]) == 0
    told = capsys.readouterr().out
    assert "pretrain  waiting" in told and "knn/intl  waiting" in told and "2 waiting" in told


def test_a_folder_in_use_is_refused_by_name(tmp_path: Path) -> None:
    holder = f"in use by another suite \\(process {os.getpid()} on"
    with locked(tmp_path), pytest.raises(UserError, match=holder), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_durations() -> None:
    assert [spell_seconds(s) for s in (5.9, 65, 600, 3725)] == ["5 s", "1:05", "10:00", "1:02:05"]
