"""What a busy cluster does to a suite: limits, throttles, a full queue, daemons that go away, fewer nodes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import read_jsonl
from slurm.__main__ import main
from slurm.execution.slurm_queue import live_steps
from slurm.state.step_files import Record
from slurm.state.step_state import DONE, all_views
from slurm.steps import tasks
from slurm.steps.graph import Step
from slurm.steps.tasks import Images
from tests.slurm.cluster.conftest import Cluster, send, step, wait_for, write_recipe

pytestmark = pytest.mark.faults


def running(root: Path, *names: str) -> int:
    live = live_steps(root)
    return sum(live.get(name) == "RUNNING" for name in names)


def all_done_once(root: Path, timeout_s: float = 120) -> None:
    wait_for(lambda: not live_steps(root), timeout_s)
    views = all_views(root, {})
    assert {v.state for v in views} == {DONE}, views
    counts = {v.name: len((root / v.name / "runs.txt").read_text().splitlines()) for v in views}
    assert set(counts.values()) == {1}, counts


def test_limits_a_throttle_and_daemons_that_go_away(
    two_nodes: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step is lost, and none runs twice."""
    seeds = [f"linear/x/seed{i}" for i in range(4)]
    steps = [
        step(tmp_path, "first"),
        *(step(tmp_path, name, "train", "30", kind="linear", depends_on=("first",)) for name in seeds),
        step(tmp_path, "report", kind="report", after=("first", *seeds)),
    ]
    two_nodes.call("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=3")
    with pytest.raises(UserError, match=r"sbatch refused linear/x: .*submitted before: first"):
        send(tmp_path, *steps, array_parallelism=2)
    two_nodes.call("sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=-1")
    two_nodes.stop("slurmdbd")  # accounting is away from here on
    sent = send(tmp_path, *steps, array_parallelism=2)
    assert set(sent) == {*seeds, "report"}
    most = 0

    def two_run() -> bool:
        nonlocal most
        most = max(most, running(tmp_path, *seeds))
        return most >= 2

    wait_for(two_run)
    # srun asks slurmctld for its step: a job that has not come so far is lost with it
    wait_for(lambda: sum(bool(Record(tmp_path, name).state) for name in seeds) >= 2)
    two_nodes.stop("slurmctld")
    assert main(["status", str(tmp_path)]) == 2
    assert "squeue failed, nothing was done" in capsys.readouterr().err
    two_nodes.start("slurmctld")
    while live_steps(tmp_path):
        two_run()
    assert most == 2  # of four, on eight cores
    two_nodes.start("slurmdbd")
    all_done_once(tmp_path)


def test_a_full_queue_is_waited_for(two_nodes: Cluster, tmp_path: Path) -> None:
    """sbatch tries again for as long as SLURM has no room; a restart with more room lets all of it in."""
    known = len(two_nodes.call("scontrol", "-o", "show", "jobs").splitlines())
    two_nodes.stop("slurmctld")
    two_nodes.start("slurmctld", MaxJobCount=str(known))
    steps = [step(tmp_path, "a"), step(tmp_path, "b", kind="linear"), step(tmp_path, "c", depends_on=("b",))]
    sent: dict[str, str] = {}
    thread = threading.Thread(target=lambda: sent.update(send(tmp_path, *steps)))
    thread.start()
    try:
        wait_for(lambda: Record(tmp_path, "a").submitted)
        thread.join(timeout=4)
        assert thread.is_alive() and not sent
    finally:
        two_nodes.stop("slurmctld")
        two_nodes.start("slurmctld", MaxJobCount="10000")
    thread.join(timeout=120)
    assert set(sent) == {"a", "b", "c"}
    all_done_once(tmp_path)


def test_pretraining_by_two_nodes_goes_on_by_one(
    two_nodes: Cluster, tmp_path: Path, cifar_folder: Path
) -> None:
    """2 x 2 ranks, then 1 x 2 after a node is lost: from the same checkpoint the same global batches as one
    process has, and its loss but for rounding, which grows tenfold a step: the first two are compared.
    """
    recipe = write_recipe(
        tmp_path / "tiny.yaml", max_steps=14, batch_global=64, lr=0.02, view_sizes=[16, 16], log_every=1,
        save_every=4,
    )  # fmt: skip
    images = Images(dataset="imagefolder", data_dir=cifar_folder)

    def pretraining(root: Path, hook: str = "null") -> Step:
        words = ("--hook", hook, "--hook-every-epochs", "1")
        return tasks.pretraining(root, str(recipe), images, 0, words)

    lost, alone = tmp_path / "lost", tmp_path / "alone"
    slow = pretraining(lost, hook="tiny_steps:slow_hook")  # after step 10
    job_id = send(lost, slow, nodes=2, tasks_per_node=2)["pretrain"]
    wait_for(lambda: Record(lost, "pretrain").progress.get("done", 0) >= 10, 500)
    two_nodes.down("n2")
    wait_for(lambda: two_nodes.job(job_id)["JobState"] == "PENDING")
    assert Record(lost, "pretrain").state["ranks"] == 4 and not Record(lost, "pretrain").done
    assert main(["cancel", str(lost)]) == 0
    wait_for(lambda: not Path("/proc", str(Record(lost, "pretrain").state["pid"])).exists())
    shutil.copytree(lost / "pretrain", alone / "pretrain")
    reached = torch.load(lost / "pretrain" / "checkpoint.pt", weights_only=True)["step"]
    send(lost, pretraining(lost), tasks_per_node=2)
    send(alone, pretraining(alone))
    for root in (lost, alone):
        wait_for(lambda r=root: not live_steps(r), 500)
        assert [v.state for v in all_views(root, {})] == [DONE]
    two_nodes.up("n2")
    assert Record(lost, "pretrain").state["ranks"] == 2

    def losses(root: Path) -> dict[int, float]:
        lines = read_jsonl(root / "pretrain" / "metrics.jsonl")
        return {x["step"]: x["loss"] for x in lines if "loss" in x}  # of a step taken twice, the later one

    by_two, by_one = losses(lost), losses(alone)
    assert sorted(by_two) == sorted(by_one) == list(range(1, 15)) and 4 <= reached <= 12
    for number in (reached + 1, reached + 2):  # another batch of images is 2e-3 and more apart
        assert by_two[number] == pytest.approx(by_one[number], rel=1e-4)
