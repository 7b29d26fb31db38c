"""The graph on a real SLURM: order, arrays, failures, submission again, two at once, limits, two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import read_jsonl
from slurm.__main__ import main
from slurm.execution.slurm_queue import live_steps
from slurm.execution.snapshot import SOURCE
from slurm.state.step_files import Record
from slurm.state.step_state import CANCELLED, DONE, FAILED, View, all_views
from slurm.state.suite_lock import refuse_other_configuration
from slurm.steps.graph import Graph
from tests.slurm.cluster.conftest import Cluster, send, step, wait_for, write_recipe

pytestmark = pytest.mark.faults


def views(root: Path) -> dict[str, View]:
    return {v.name: v for v in all_views(root, live_steps(root))}


def ended(root: Path, timeout_s: float = 120) -> dict[str, View]:
    wait_for(lambda: not live_steps(root), timeout_s)
    return views(root)


def runs(root: Path, name: str) -> int:
    path = root / name / "runs.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_failures_cancel_what_needs_them_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    """... and submitted again, only the rest runs."""
    mended = tmp_path / "mended"
    steps = [
        step(tmp_path, "first"),
        *(step(tmp_path, f"linear/x/seed{i}", kind="linear", depends_on=("first",)) for i in range(3)),
        step(tmp_path, "bad", "fail-unless", str(mended), depends_on=("first",)),
        step(tmp_path, "child", depends_on=("bad",)),
        step(tmp_path, "grandchild", depends_on=("child",)),
        step(tmp_path, "ranks", "fail-rank-1", kind="pretrain"),
    ]
    steps.append(step(tmp_path, "report", kind="report", after=tuple(s.name for s in steps)))
    ids = send(tmp_path, *steps[:-2], steps[-1].__class__(**{**vars(steps[-1]), "after": ("bad", "child")}))
    array = {ids[f"linear/x/seed{i}"].partition("_")[0] for i in range(3)}
    assert len(array) == 1 and ids["linear/x/seed2"].endswith("_2")
    now = ended(tmp_path)
    assert now["bad"].state == FAILED and now["bad"].detail == f"{mended}: no such file"
    assert now["child"].state == now["grandchild"].state == CANCELLED
    assert "needs bad" in now["child"].detail
    assert {now[n].state for n in ("first", "report", *(f"linear/x/seed{i}" for i in range(3)))} == {DONE}

    mended.touch()
    again = send(tmp_path, *steps[:-2], steps[-1].__class__(**{**vars(steps[-1]), "after": ("bad", "child")}))
    assert sorted(again) == ["bad", "child", "grandchild", "report"]
    now = ended(tmp_path)
    assert {v.state for v in now.values()} == {DONE}
    assert (runs(tmp_path, "first"), runs(tmp_path, "bad"), runs(tmp_path, "report")) == (1, 2, 2)
    assert send(tmp_path, *steps[:-2]) == {}

    other = [step(tmp_path, "first", "work", "--other")]
    with pytest.raises(UserError, match="now --other"):
        refuse_other_configuration(tmp_path, Graph(other), set())


def test_two_tasks_form_a_group_and_a_failing_rank_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    send(tmp_path, step(tmp_path, "pair", "ranks"), step(tmp_path, "torn", "fail-rank-1", kind="linear"),
         tasks_per_node=2, gpus_per_node=2)  # fmt: skip
    now = ended(tmp_path)
    told = [json.loads((tmp_path / "pair" / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert [t["sum"] for t in told] == [3.0, 3.0]  # ranks add 1 and 2
    assert [t["local"] for t in told] == ["0", "1"]
    assert {t["CUDA_VISIBLE_DEVICES"] for t in told} == {"0,1"}
    assert now["torn"].state == FAILED and "rank 1 has the reason" in now["torn"].detail
    assert "in main" in Record(tmp_path, "torn").failure["traceback"]


def test_queued_again_too_often_is_a_clear_failure(cluster: Cluster, tmp_path: Path) -> None:
    job_id = send(tmp_path, step(tmp_path, "long", "train", "300"), max_requeues=1)["long"]
    for starts in (1, 2):
        wait_for(lambda n=starts: Record(tmp_path, "long").state.get("starts") == n)
        wait_for(lambda: Record(tmp_path, "long").progress.get("done", 0) > 2)
        cluster.call("scontrol", "requeue", job_id)
    now = ended(tmp_path)
    assert now["long"].state == FAILED and "max_requeues=1" in now["long"].detail


def test_cancelled_goes_on_when_submitted_again(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = step(tmp_path, "long", "train", "60"), step(tmp_path, "next", depends_on=("long",))
    first = send(tmp_path, *steps)
    wait_for(lambda: Record(tmp_path, "long").progress.get("done", 0) > 12)
    assert send(tmp_path, *steps) == {}  # what runs is left alone
    assert main(["status", str(tmp_path)]) == 0
    assert "running" in capsys.readouterr().out
    assert main(["cancel", str(tmp_path)]) == 0
    now = ended(tmp_path)
    assert now["long"].state == now["next"].state == CANCELLED
    assert main(["logs", str(tmp_path), "long"]) == 0
    assert "waiting to be ended" in capsys.readouterr().out
    assert set(send(tmp_path, *steps).values()).isdisjoint(first.values())
    assert {v.state for v in ended(tmp_path).values()} == {DONE}
    assert [int(x) for x in (tmp_path / "long" / "steps0.txt").read_text().split()] == list(range(60))


SUITE = [
    "--tasks", "knn,linear", "--seeds", "2", "--control", "--dataset", "imagefolder", "--linear-protocol",
    "cached_linear@1", "--pretrain-options", "--max-steps 10", "--cluster", "slurm",
    "--override", "all.partition=low", "all.timeout_min=60",
]  # fmt: skip


def test_the_whole_suite_to_a_report(
    cluster: Cluster, tmp_path: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user types it: checks, two submissions at once, the report, force."""
    profile, out = tmp_path / "here.yaml", tmp_path / "out"
    recipe = write_recipe(tmp_path / "tiny.yaml")
    profile.write_text(
        "defaults: {partition: low, timeout_min: 60}\ntasks: {pretrain: {tasks_per_node: 2}}\n"
    )
    words = ["suite", "--recipe", str(recipe), "--data-dir", str(cifar_folder), "--profile", str(profile)]
    words += [*SUITE, "--output", str(out)]

    assert main([*words, "--override", "all.partition=lwo", "--dry-run"]) == 2
    told = capsys.readouterr()
    assert "partition lwo is not known to the cluster; known: high, low" in told.out
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "#SBATCH --partition=low" in told.out and "array=0-1" in told.out and "GPU-hours" in told.out
    assert not list(out.glob("jobs/*/step.json")) and not cluster.call("squeue", "-h").strip()

    command = [sys.executable, "-m", "slurm", *words]
    both = [
        subprocess.Popen(command, cwd=SOURCE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    counts = sorted(int(line.split()[0]) for o in outputs for line in o.splitlines() if "done before" in line)
    assert counts == [0, len(live_steps(out)) or len(views(out))]

    now = ended(out, 400)
    assert {v.state for v in now.values()} == {DONE}, now
    assert (out / "report" / "index.html").exists()
    lines = [line for p in out.glob("linear/*/seed*/results.jsonl") for line in read_jsonl(p)]
    assert sorted(line["seed"] for line in lines if line["selection"] == "last") == [0, 0, 1, 1]
    assert len(list(out.glob("knn/*/results.jsonl"))) == 2  # no randomness: once, whatever --seeds says
    assert Record(out, "pretrain").state["ranks"] == 2
    environment = json.loads((Record(out, "pretrain").folder / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]

    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("0 submitted")
    assert main([*words, "--force", "knn"]) == 0
    assert sorted(live_steps(out)) == ["knn/control", "knn/intl", "report"]
    ended(out, 200)
    assert all((out / "knn" / n / "results.jsonl").exists() for n in ("intl", "control"))
    assert main([*[w.replace("10", "11") if w == "--max-steps 10" else w for w in words]]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_two_nodes_form_one_group_and_survive_the_loss_of_one(two_nodes: Cluster, tmp_path: Path) -> None:
    steps = step(tmp_path, "far", "ranks"), step(tmp_path, "long", "train", "150", kind="linear")
    job_id = send(tmp_path, *steps, nodes=2)["long"]
    wait_for(lambda: Record(tmp_path, "long").progress.get("done", 0) > 12)
    two_nodes.down("n2")
    wait_for(lambda: two_nodes.job(job_id)["JobState"] == "PENDING")
    wait_for(lambda: not Path("/proc", str(Record(tmp_path, "long").state["pid"])).exists())
    two_nodes.up("n2")
    now = ended(tmp_path, 180)
    assert {v.state for v in now.values()} == {DONE}, now
    told = [json.loads((tmp_path / "far" / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert [t["SLURMD_NODENAME"] for t in told] == ["n1", "n2"] and told[0]["sum"] == 3.0
    trained = [int(x) for x in (tmp_path / "long" / "steps0.txt").read_text().split()]
    assert sorted(set(trained)) == list(range(150)) and Record(tmp_path, "long").state["starts"] == 2
