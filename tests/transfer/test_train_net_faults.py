"""Fine-tuning killed at random moments, stopped by signals, and on several processes: same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.common.cli import EXIT_OK, EXIT_STOPPED
from pretrain.common.files import read_jsonl
from tests.helpers.killed_commands import after_kills
from transfer.detection import scenes

pytestmark = pytest.mark.faults
ITERATIONS = 12
PAIRS = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.STEPS", "()", "SOLVER.MAX_ITER", str(ITERATIONS), "SOLVER.CHECKPOINT_PERIOD", "2",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "TEST.PRECISE_BN.NUM_ITER", "2", "SOLVER.BASE_LR", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(fashion_mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "out"
    return scenes.compose(fashion_mnist_dir, out, train=9, test=3, size=64)


def words(folder: Path, output: Path | str, *more: str) -> list[str]:
    datasets = [w for s in ("train", "test")
                for w in ("--dataset", f"scenes_{s}={folder / s}.json:{folder / s}")]  # fmt: skip
    gpus = ["--num-gpus", "0"] if "--num-gpus" not in more else []
    return [
        "--config-file", "scenes_R18_FPN", "--random-init", *gpus, *datasets, *more, *PAIRS,
        "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output),
    ]  # fmt: skip


def start(folder: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "transfer.train_net", *words(folder, output, *more)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> int:
    _, said = process.communicate(timeout=300)
    assert process.returncode in (EXIT_OK, EXIT_STOPPED, -signal.SIGKILL), said
    return process.returncode


def outcome(output: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    model = torch.load(output / "model_final.pth", weights_only=True)["model"]
    return [r["metrics"] for r in read_jsonl(output / "results.jsonl")], model


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert finish(start(folder, output)) == EXIT_OK
    return output


def wait_for_progress(output: Path, process: subprocess.Popen[str]) -> None:
    """Until the loop runs, so that a signal finds a run and not an import."""
    while not (output / "progress.json").exists() and process.poll() is None:
        time.sleep(0.02)


def same(output: Path, other: Path) -> None:
    (metrics, model), (wanted_metrics, wanted) = outcome(output), outcome(other)
    assert metrics == wanted_metrics
    assert all(torch.equal(model[k], wanted[k]) for k in wanted)


def test_twenty_kills_change_nothing(folder: Path, tmp_path: Path) -> None:
    whole, cuts = after_kills("train-net", words(folder, "{output}"), tmp_path)
    for cut in cuts:
        same(cut, whole)
        iterations = [m["iteration"] for m in read_jsonl(cut / "metrics.json")]
        assert iterations == list(range(ITERATIONS + 1))
        assert len(read_jsonl(cut / "results.jsonl")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_says_so(folder: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    process = start(folder, tmp_path)
    wait_for_progress(tmp_path, process)
    os.kill(process.pid, number)
    if finish(process) == EXIT_STOPPED:  # it may have ended before the signal came
        assert (tmp_path / "model_last.pth").exists()
        assert not (tmp_path / "results.jsonl").exists()
    assert finish(start(folder, tmp_path)) == EXIT_OK
    same(tmp_path, undisturbed)


def test_spawned_processes_stop_together_and_go_on(folder: Path, tmp_path: Path) -> None:
    two = ("--num-gpus", "2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finish(start(folder, whole, *two)) == EXIT_OK
    process = start(folder, cut, *two)
    wait_for_progress(cut, process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == EXIT_STOPPED
    assert (cut / "model_last.pth").exists()
    assert finish(start(folder, cut, *two)) == EXIT_OK
    same(cut, whole)
