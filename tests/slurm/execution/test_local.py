"""The graph on one machine, with real submitit jobs: order, failure, going on, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from slurm.execution.local import LocalRun, Machine
from slurm.execution.slurm_queue import live_steps
from slurm.execution.snapshot import SOURCE, pin
from slurm.state.step_files import Record
from slurm.state.step_state import all_views
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import KINDS, Resources

HELPERS = Path(__file__).parents[2] / "helpers"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a suite whose jobs can import tiny_steps."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    return tmp_path / "out"


def step(
    root: Path,
    name: str,
    what: str = "work",
    *more: str,
    depends_on: tuple[str, ...] = (),
    kind: str = "knn",
    **rest,
) -> Step:
    return Step(
        name=name, kind=kind, command="tiny_steps", argv=(what, str(root / name), *more), output=root / name,
        depends_on=depends_on, makes=(root / name / "made",), **rest,
    )  # fmt: skip


def resources(**pretrain) -> dict[str, Resources]:
    return {kind: Resources(**(pretrain if kind == "pretrain" else {})) for kind in KINDS}


def run(root: Path, *steps: Step, code: Path = SOURCE, **kwargs) -> dict:
    graph = Graph(list(steps))
    machine = kwargs.pop("machine", Machine(cpus=2))
    views = LocalRun(graph, root, kwargs.pop("resources", resources()), code, machine).run()
    return {v.name: v for v in views}


def runs(root: Path, name: str) -> int:
    path = root / name / "runs.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_the_graph_runs_in_order_and_only_once(world: Path) -> None:
    steps = (step(world, "a"), step(world, "b", depends_on=("a",)), step(world, "c", depends_on=("a", "b")))
    views = run(world, *steps)
    assert {v.state for v in views.values()} == {"done"}
    began = [float((world / n / "runs.txt").read_text().split()[1]) for n in "abc"]
    assert began == sorted(began)
    run(world, *steps)
    assert [runs(world, n) for n in "abc"] == [1, 1, 1]
    cut_off = world / "jobs" / "a" / ".submitted.json.123.abcdef.tmp"
    cut_off.touch()  # as a kill in the middle of writing leaves it
    (world / "b" / "made").unlink()  # a done step whose output is gone is not done
    run(world, *steps)
    assert [runs(world, n) for n in "abc"] == [1, 2, 1] and not cut_off.exists()


def test_jobs_of_the_pinned_code_and_a_failure_is_told_while_what_can_go_on_does(world: Path) -> None:
    """One run of several jobs, all of the copy: failures of each kind, a pair of ranks, all of the cores."""
    code = pin(world)
    assert pin(world) == code and (code / "COMMIT").read_text().strip()
    views = run(
        world,
        step(world, "bad", "fail"),
        step(world, "child", depends_on=("bad",)),
        step(world, "mistake", "mistake"),
        step(world, "code", "code"),
        step(world, "empty", "nothing"),
        step(world, "fine"),
        step(world, "pair", "ranks", kind="pretrain"),
        step(world, "where", "where", kind="linear"),
        step(world, "last", after=("bad", "child", "fine")),
        code=code,
        resources=resources(tasks_per_node=2) | {"linear": Resources(cpus_per_task="all")},
    )
    assert views["bad"].state == "failed" and views["bad"].detail == "RuntimeError: the reason why"
    assert 'raise RuntimeError("the reason why")' in Record(world, "bad").failure["traceback"]
    assert views["child"].state == "cancelled" and "needs bad" in views["child"].detail
    assert views["mistake"].detail == "this is not a folder: nowhere"
    assert Record(world, "mistake").failure["traceback"] is None
    assert views["code"].detail == "error: said on the way out"
    assert "did not write" in views["empty"].detail
    assert views["fine"].state == views["last"].state == "done"
    assert runs(world, "child") == 0
    assert "the reason why" in views["bad"].log.read_text()

    assert views["pair"].state == "done", views["pair"]
    ranks = [json.loads((world / "pair" / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert [r["sum"] for r in ranks] == [3.0, 3.0]  # ranks add 1 and 2
    assert [r["local"] for r in ranks] == ["0", "1"] and ranks[0]["world"] == 2

    assert views["where"].state == "done", views["where"]
    told = json.loads((world / "where" / "where.json").read_text())
    assert Path(told["slurm"]).is_relative_to(code) and Path(told["cwd"]) == code and told["threads"] == "2"


def test_after_a_stop_nothing_waits(world: Path) -> None:
    """Neither what needs the stopped step nor what waits for the machine; run again, all of it is done."""
    steps = (
        step(world, "long", "train", "600", kind="pretrain"), step(world, "next", depends_on=("long",)),
        step(world, "other", kind="pretrain"),
    )  # fmt: skip

    def press() -> None:
        while not (world / "long" / "steps0.txt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(world, *steps, resources=resources(cpus_per_task="all"))
    thread.join()
    views = {v.name: v for v in all_views(world, live_steps(world))}
    assert {v.state for v in views.values()} == {"cancelled"}
    assert [views[n].detail for n in ("long", "next", "other")] == [
        "goes on when submitted again", "never started: it needs long", "before it started",
    ]  # fmt: skip
    quick = (step(world, "next", depends_on=()), steps[2])
    assert {v.state for v in run(world, *quick).values()} == {"done"}


@pytest.mark.faults
def test_stopped_by_a_signal_it_goes_on_where_it_was(world: Path) -> None:
    steps = (step(world, "long", "train", "25", kind="pretrain"), step(world, "next", depends_on=("long",)))

    told = world / "long" / "steps0.txt"

    def press(number: int, trained: int) -> None:
        while not told.exists() or len(told.read_text().split()) <= trained:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        trained = len(told.read_text().split()) if told.exists() else 0
        thread = threading.Thread(target=press, args=(number, trained))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run(world, *steps)
        thread.join()
        assert Record(world, "long").state["state"] == "stopped"
        assert runs(world, "next") == 0
    views = run(world, *steps)
    assert views["long"].state == views["next"].state == "done"
    assert [int(x) for x in (world / "long" / "steps0.txt").read_text().split()] == list(range(25))


@pytest.mark.faults
def test_a_user_signal_queues_the_job_again(world: Path) -> None:
    """What a time limit and a preemption send: submitit starts the job again, which goes on."""

    def warn() -> None:
        while not (world / "long" / "steps0.txt").exists():
            time.sleep(0.05)
        os.kill(Record(world, "long").state["pid"], signal.SIGUSR2)

    thread = threading.Thread(target=warn)
    thread.start()
    views = run(world, step(world, "long", "train", "20", kind="pretrain"))
    thread.join()
    assert views["long"].state == "done" and Record(world, "long").state["starts"] == 2
    assert [int(x) for x in (world / "long" / "steps0.txt").read_text().split()] == list(range(20))


@pytest.mark.faults
def test_jobs_outlive_the_process_that_started_them(world: Path) -> None:
    """... killed without a chance to clean up; run again, it waits for what is still running."""
    driver = f"""
from pathlib import Path
import tests.slurm.execution.test_local as t
t.run(Path({str(world)!r}), t.step(Path({str(world)!r}), "long", "train", "40", kind="pretrain"))
"""
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=SOURCE, stderr=subprocess.DEVNULL)
    while not (world / "long" / "steps0.txt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    views = run(world, step(world, "long", "train", "40", kind="pretrain"))
    assert views["long"].state == "done" and runs(world, "long") == 1


@pytest.mark.faults
def test_an_error_after_a_signal_is_a_stop(world: Path) -> None:
    """A data worker that got the same signal takes the training down: the job is queued again, not failed."""

    def warn() -> None:
        while not (world / "frail" / "told").exists():
            time.sleep(0.05)
        os.kill(Record(world, "frail").state["pid"], signal.SIGUSR2)

    thread = threading.Thread(target=warn)
    thread.start()
    views = run(world, step(world, "frail", "frail"))
    thread.join()
    assert views["frail"].state == "done" and Record(world, "frail").state["starts"] == 2
