"""Faults injected into real jobs on a real SLURM: each ends with an undisturbed run's weights, to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.common.files import read_jsonl
from slurm.execution.local import LocalRun, Machine
from slurm.execution.slurm_queue import live_steps
from slurm.execution.snapshot import pin
from slurm.state.step_files import Record
from slurm.state.step_state import DONE, FAILED, View, look
from slurm.steps import tasks
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import KINDS, Resources
from slurm.steps.tasks import Images, Target
from tests.slurm.cluster.conftest import Cluster, send, wait_for, write_recipe

pytestmark = pytest.mark.faults

END_S = 420
EACH_EPOCH = ("--hook-every-epochs", "1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    return write_recipe(path, max_steps=60, log_every=10, save_every=10)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, fashion_mnist_dir: Path) -> Path:
    from transfer.detection.scenes import compose

    folder = tmp_path_factory.mktemp("scenes")
    compose(fashion_mnist_dir, folder, train=16, test=4, size=64, seed=0)
    return folder


DETECTION = (
    "SOLVER.MAX_ITER 60 SOLVER.STEPS (40,50) SOLVER.IMS_PER_BATCH 2 SOLVER.CHECKPOINT_PERIOD 20 "
    "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 TEST.PRECISE_BN.NUM_ITER 2"
)


def pretraining(root: Path, recipe: Path, images: Path, *extra: str) -> Step:
    data = Images(dataset="imagefolder", data_dir=images)
    return tasks.pretraining(root, str(recipe), data, seed=0, extra=extra)


def detection(root: Path, scenes: Path) -> Step:
    sets = [f"scenes_{s}={scenes / f'{s}.json'}:{scenes / s}" for s in ("train", "test")]
    return tasks.detection(
        root, Target(name="random", label="random init", weights=""), task="scenes", config="scenes_R18_FPN",
        seed=0, weights=None, depends_on=(), datasets=sets, extra=DETECTION.split(),
    )  # fmt: skip


def seen(root: Path, name: str) -> View:
    return look(Record(root, name), live_steps(root).get(name))


def at_step(root: Path, name: str, count: int) -> Callable[[], bool]:
    return lambda: Record(root, name).progress.get("done", 0) >= count


def done(root: Path, name: str) -> Callable[[], bool]:
    def ready() -> bool:
        view = seen(root, name)
        assert view.state != FAILED, view
        return view.state == DONE

    return ready


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "pretrain" / "checkpoint.pt", weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, recipe: Path, cifar_folder: Path, scenes: Path
) -> Path:
    """Both trainings without any fault, on this machine, beside the cluster's."""
    root = tmp_path_factory.mktemp("undisturbed")
    steps = [pretraining(root, recipe, cifar_folder), detection(root, scenes)]
    local = dict.fromkeys(KINDS, Resources(timeout_min=60))
    views = LocalRun(Graph(steps), root, local, pin(root), Machine(cpus=2)).run()
    assert {v.state for v in views} == {DONE}, views
    return root


def test_preempted_requeued_timed_out_killed_or_the_node_down(
    cluster: Cluster, undisturbed: Path, recipe: Path, cifar_folder: Path, scenes: Path, tmp_path: Path
) -> None:
    expected = weights(undisturbed)

    # A higher-priority partition takes the node from pretraining and from detectron2.
    preempted = tmp_path / "preempted"
    ids = send(preempted, pretraining(preempted, recipe, cifar_folder), detection(preempted, scenes))
    fine_tuned = next(n for n in ids if n.startswith("detection"))
    wait_for(at_step(preempted, "pretrain", 1))
    wait_for(at_step(preempted, fine_tuned, 1))
    assert not Record(preempted, "pretrain").done and not Record(preempted, fine_tuned).done
    cluster.preempt()
    wait_for(lambda: cluster.job(ids["pretrain"])["Restarts"] == "1")
    assert "interrupted 1 time" in seen(preempted, "pretrain").detail
    wait_for(lambda: cluster.job(ids["pretrain"])["JobState"] == "RUNNING")

    # A time limit of two minutes ends one: this pretraining sleeps now and then, which changes no weight.
    limited = tmp_path / "limited"
    slowly = pretraining(limited, recipe, cifar_folder, "--hook", "tiny_steps:slow_hook", *EACH_EPOCH)
    limited_id = send(limited, slowly, timeout_min=2, signal_delay_s=50)["pretrain"]

    # An administrator queues one again; a SIGKILL ends one for good, and it is submitted again.
    requeued, killed = tmp_path / "requeued", tmp_path / "killed"
    requeued_id = send(requeued, pretraining(requeued, recipe, cifar_folder))["pretrain"]
    send(killed, pretraining(killed, recipe, cifar_folder))
    wait_for(at_step(requeued, "pretrain", 12))
    cluster.call("scontrol", "requeue", requeued_id)
    wait_for(at_step(killed, "pretrain", 12))
    os.kill(Record(killed, "pretrain").state["pid"], signal.SIGKILL)
    wait_for(lambda: seen(killed, "pretrain").state == FAILED)
    assert "killed" in seen(killed, "pretrain").detail
    again = send(killed, pretraining(killed, recipe, cifar_folder))
    assert list(again) == ["pretrain"]

    wait_for(done(preempted, "pretrain"), END_S)
    wait_for(done(preempted, fine_tuned), END_S)
    assert same(weights(preempted), expected)
    tuned = [torch.load(r / fine_tuned / "model_final.pth")["model"] for r in (undisturbed, preempted)]
    assert same(*tuned)
    first, second = (read_jsonl(r / fine_tuned / "results.jsonl") for r in (undisturbed, preempted))
    assert [r["metrics"] for r in first] == [r["metrics"] for r in second]
    assert Record(preempted, fine_tuned).state["starts"] == 2

    # The node goes down under what still runs, and comes back.
    down = tmp_path / "down"
    down_id = send(down, pretraining(down, recipe, cifar_folder))["pretrain"]
    wait_for(at_step(down, "pretrain", 12))
    node = cluster.call("sinfo", "-h", "-o", "%n").split()[0]
    cluster.down(node)
    wait_for(lambda: cluster.job(down_id)["JobState"] == "PENDING")
    for root in (requeued, killed, down, limited):  # SLURM holds a job whose last processes it still meets
        wait_for(lambda r=root: not Path("/proc", str(Record(r, "pretrain").state["pid"])).exists())
    cluster.up(node)

    wait_for(lambda: cluster.job(limited_id)["Restarts"] != "0", END_S)
    for root in (requeued, killed, down, limited):
        wait_for(done(root, "pretrain"), END_S)
        assert same(weights(root), expected), root.name
    assert Record(requeued, "pretrain").state["starts"] >= 2
    assert Record(down, "pretrain").state["starts"] == 2
