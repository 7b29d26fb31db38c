"""Evaluators and the report killed at random moments, and on disks that take nothing more."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.__main__ import main as pretrain
from pretrain.checkpoint import save_backbone
from pretrain.common.output_folder import LOCK
from pretrain.network.model import build_backbone
from tests.helpers.killed_commands import after_kills
from tests.helpers.report_data import write_suite
from transfer.__main__ import main as transfer
from transfer.evaluation import results

pytestmark = pytest.mark.faults
# A limit on a file's size looks like a used-up quota: the disk itself has room.
NOT_SAVED = r"checkpoint not saved, .*is a quota used up\?\); there is none before it"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    torch.manual_seed(0)
    metadata = {
        "arch": "resnet18",
        "stem": "imagenet",
        "branch": "online",
        "image_size": 16,
        "source": "none",
    }
    network = build_backbone("resnet18").train()
    network(torch.randn(8, 3, 16, 16))  # else it counts as never trained
    save_backbone(path, network.state_dict(), metadata)
    return path


@pytest.fixture
def words(weights: Path, cifar_folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    """The words of each command, but for --output."""
    values = {
        "linear": {"learning_rates": [0.1, 0.02], "batch": 64, "epochs": 6, "held_out_percent": 10},
        "semisup": {"lr_backbone": {"10": 0.01}, "lr_head": {"10": 0.1}, "batch": 16, "epochs": 4},
    }
    found = {}
    for task, chosen in values.items():
        protocol = tmp_path / f"{task}@1.yaml"
        protocol.write_text(yaml.safe_dump({"task": task, "title": "t", "source": "s", "values": chosen}))
        found[task] = [
            "--weights", str(weights), "--protocol", str(protocol), "--dataset", "cifar10", "--workers", "0",
            "--data-dir", str(cifar_folder), "--image-size", "16", "--precision", "float32",
        ]  # fmt: skip
    found["semisup"] += ["--label-percent", "10", "--save-every", "2"]
    found["report"] = [str(write_suite(tmp_path / "suite"))]
    found["knn"] = [*found["linear"], "--protocol", "solo_knn@1"]
    found["export"] = ["--weights", str(weights), "--format", "timm"]
    return found


@pytest.mark.parametrize("command", ["linear", "semisup"])
def test_twenty_kills_change_no_figure(command: str, words: dict[str, list[str]], tmp_path: Path) -> None:
    whole, cuts = after_kills(command, [*words[command], "--output", "{output}"], tmp_path)
    wanted = [(r.metrics, r.epoch, r.selection) for r in results.read(whole)]
    assert len(wanted) == 2
    for cut in cuts:
        assert [(r.metrics, r.epoch, r.selection) for r in results.read(cut)] == wanted


def test_twenty_kills_leave_the_same_report(words: dict[str, list[str]], tmp_path: Path) -> None:
    whole, cuts = after_kills("report", [*words["report"], "--output", "{output}"], tmp_path)

    def written(folder: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file() and p.name not in ("config.yaml", "progress.json", LOCK)
        }

    assert len(written(whole)) > 10
    assert all(written(cut) == written(whole) for cut in cuts)


def limited(main: Callable[[list[str]], int], argv: list[str], size: int) -> tuple[int, str]:
    """Exit code and standard error of a command in a process whose files may have at most `size` bytes."""
    reading, writing = os.pipe()  # which has no size
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            os.dup2(writing, 2)
            os.close(writing)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            logging.getLogger().handlers.clear()  # pytest's own, beside which the command sets up none
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            code = main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.mark.parametrize("command", ["knn", "linear", "semisup", "report", "export"])
def test_a_disk_that_takes_nothing_more_is_one_line(
    command: str, words: dict[str, list[str]], tmp_path: Path
) -> None:
    size = 3000 if command in ("knn", "linear", "semisup") else 100
    argv = [command, *words[command], "--output", str(tmp_path / "out")]
    code, said = limited(transfer, argv, size)
    assert code in (1, 2) and "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ("disk is full" in errors[0] or "File too large" in errors[0]), said
    assert transfer(argv) == 0  # with room again


@pytest.mark.parametrize("command", ["linear", "semisup"])
def test_a_checkpoint_that_does_not_fit_stops_no_evaluation(
    command: str, words: dict[str, list[str]], tmp_path: Path
) -> None:
    """Small files fit, checkpoints do not: the run goes on, says so, and ends with its results."""
    argv = [command, *words[command], "--output", str(tmp_path / "out")]
    size = 30_000 if command == "linear" else 10**6
    if command == "linear":  # its features, 328 kB of 160 test images, must be there before
        assert transfer(["knn", *words["knn"], "--output", str(tmp_path / "knn")]) == 0
        assert transfer([*argv[:-1], str(tmp_path / "first"), "--cache-dir", str(tmp_path / "cache")]) == 0
        argv += ["--cache-dir", str(tmp_path / "cache")]
    code, said = limited(transfer, argv, size)
    assert code == 0 and re.search(NOT_SAVED + "; training goes on", said), said
    assert "Traceback" not in said and len(results.read(tmp_path / "out")) == 2


def test_pretraining_without_room_for_its_first_checkpoint(cifar_folder: Path, tmp_path: Path) -> None:
    argv = (
        f"--data-dir {cifar_folder} --output {tmp_path / 'out'} --dataset cifar10 --arch resnet18 "
        "--max-steps 2 --view-sizes [16,16] --projector-hidden 32 --projector-output 64 "
        "--batch-global 32 --workers 0"
    ).split()
    code, said = limited(pretrain, argv, 10**6)
    assert code == 1 and "Traceback" not in said, said
    assert re.search(NOT_SAVED, said), said
