"""Training killed at random moments, stopped with all its workers, or on a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import load_checkpoint
from pretrain.common.cli import save_settings
from pretrain.common.files import read_jsonl
from tests.helpers.ranks import start_ranks, wait_ranks
from tests.helpers.training import differing, slower, tiny, weights

pytestmark = pytest.mark.faults
HELPERS = Path(__file__).parents[1] / "helpers"


def killed_runs(data: Path, output: Path, kills: int) -> list[str]:
    """Where the kills fell: "writing" a checkpoint or "between"."""
    environment = {**os.environ, "PYTHONPATH": str(HELPERS.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HELPERS / "killed_runs.py"), str(data), str(output), str(kills), "0"],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_twenty_kills_change_nothing(cifar_folder: Path, tmp_path: Path) -> None:
    killed_runs(cifar_folder, tmp_path / "whole", 0)
    moments = killed_runs(cifar_folder, tmp_path / "cut", 20)
    assert len(moments) == 20 and moments.count("writing") >= 3 and moments.count("between") >= 3
    assert differing(tmp_path / "whole", tmp_path / "cut") == []
    steps = [r["step"] for r in read_jsonl(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    assert not list((tmp_path / "cut").glob(".*.tmp"))


def test_a_signal_to_the_whole_group_saves_and_exits_with_75(cifar_folder: Path, tmp_path: Path) -> None:
    """As SLURM and Ctrl-C send it: to the loader's workers too."""
    settings = slower(
        cifar_folder, tmp_path / "run", workers=2, epochs=50, batch_global=64, save_every=10_000
    )
    save_settings(settings, tmp_path / "run.yaml")
    run = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "--recipe", str(tmp_path / "run.yaml")],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        family = [run.pid, *children(run.pid)]
        os.killpg(run.pid, signal.SIGUSR2)
        err = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == 75, err
    assert "run the same command again" in err and "Traceback" not in err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] >= 4
    assert len(family) > 2  # the loader's workers
    deadline = time.monotonic() + 30
    while (left := [pid for pid in family if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def children(pid: int) -> list[int]:
    """Process ids."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_killed_ranks_go_on_to_the_same_bits(cifar_folder: Path, tmp_path: Path) -> None:
    settings = {"save_every": 2, "log_every": 2, "ema": True}
    wait_ranks(start_ranks(tiny(cifar_folder, tmp_path / "whole", **settings)), 0)
    cut = tiny(cifar_folder, tmp_path / "cut", **settings)
    for least in (2, 4):
        ranks = start_ranks(cut)
        deadline = time.monotonic() + 120
        while not saved_step(tmp_path / "cut") >= least and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in reversed(ranks):
            rank.kill()
        for rank in ranks:
            rank.communicate()
    assert saved_step(tmp_path / "cut") >= 4
    wait_ranks(start_ranks(cut, "--workers", "1"), 0)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def saved_step(output: Path) -> int:
    """The step of the checkpoint in a folder, 0 without one."""
    path = output / "checkpoint.pt"
    return int(load_checkpoint(path)["step"]) if path.exists() else 0


def test_a_full_disk_keeps_the_last_good_checkpoint(cifar_folder: Path, tmp_path: Path) -> None:
    """Somebody else fills the file system, of 300 MB, once the first checkpoint (93 MB) is there."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare to make a small file system")
    small, saved = tmp_path / "small", tmp_path / "saved"
    small.mkdir()
    saved.mkdir()
    settings = slower(cifar_folder, small / "run", save_every=2, log_every=1, epochs=500)
    save_settings(settings, tmp_path / "run.yaml")
    script = (
        f"mount -t tmpfs -o size=300m none {small} || exit 99; "
        f"{sys.executable} -m pretrain --recipe {tmp_path}/run.yaml & run=$!; "
        f"while kill -0 $run 2>/dev/null; do [ ! -e {small}/run/checkpoint.pt ] || "
        f"dd if=/dev/zero of={small}/fill bs=1M oflag=append conv=notrunc 2>/dev/null; sleep 0.02; done; "
        "wait $run; code=$?; "
        f"cp {small}/run/checkpoint.pt {saved}/; ls -A {small}/run > {saved}/files; exit $code"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the disk is full; the last good" in done.stderr
    assert load_checkpoint(saved / "checkpoint.pt")["step"] >= 2 and len(weights(saved)) > 100
    assert "tmp" not in (saved / "files").read_text()
