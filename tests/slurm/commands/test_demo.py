"""The main job end to end, as `make demo` runs it, on a few hundred images."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.datasets import open_dataset
from tests.helpers.forked import run_command

TINY = [
    "--pretrain-options", "--max-steps 3 --batch-global 32 --view-sizes [32,32] --projector-hidden 64",
    "--scenes-options", "--train 16 --test 6",
    "--detection-seeds", "1",
    "--detection-options", "SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 2 TEST.PRECISE_BN.NUM_ITER 2",
]  # fmt: skip


@pytest.fixture(scope="module")
def few_garments(fashion_mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's files with the first 320 training and 160 test images."""
    folder = tmp_path_factory.mktemp("garments")
    for split, name, count in (("train", "train", 320), ("test", "t10k", 160)):
        data = open_dataset("fashion_mnist", fashion_mnist_dir, split)
        assert data.pixels is not None
        pixels, labels = data.pixels[:count], data.labels_N[:count].astype(np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        header = struct.pack(">II", 2049, count)
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return folder


def run_demo(garments: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["python", "-m", "slurm", "demo", "--data-dir", str(garments), "--output", str(output)]
    return run_command([*command, *TINY, *more], env={**os.environ, "COLUMNS": "110"})


@pytest.mark.commands
def test_images_to_report_and_nothing_twice(few_garments: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    first = run_demo(few_garments, output)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = [json.loads(x) for p in sorted(output.rglob("results.jsonl")) for x in p.read_text().splitlines()]
    rows = {(r["task"], r["label"]) for r in lines}
    assert {(t, row) for t in ("knn", "linear") for row in ("INTL", "random control", "raw pixels")} <= rows
    assert {(t, row) for t in ("detection", "segmentation") for row in ("INTL", "random control")} <= rows
    assert {r["n"] for r in lines if r["task"] in ("knn", "linear")} == {160}
    assert {r["n"] for r in lines if r["task"] in ("detection", "segmentation")} == {6}
    page = (output / "report" / "index.html").read_text()
    for row in ("INTL", "random control", "raw pixels"):
        assert row in page
    ended, _, verdict = first.stdout.rpartition(" done\n")
    assert "waiting" not in ended
    verdict = verdict.partition("\nreport: ")[0]  # the path is as long as it is
    assert "INTL" in verdict and "random control" in verdict
    assert max(map(len, verdict.splitlines())) <= 110
    assert "report/index.html" in first.stdout

    written = {p: p.stat().st_mtime_ns for p in output.rglob("results.jsonl")}
    second = run_demo(few_garments, output)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {p: p.stat().st_mtime_ns for p in output.rglob("results.jsonl")} == written

    other = run_demo(few_garments, output, "--seed", "1")
    assert other.returncode == 2, other.stdout + other.stderr
    assert "Traceback" not in other.stderr


def test_a_batch_of_more_images_than_there_are_is_one_line(few_garments: Path, tmp_path: Path) -> None:
    done = run_demo(few_garments, tmp_path / "demo", "--pretrain-options", "--batch-global 1000")
    assert done.returncode == 2 and "more than the 320" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data-dir", "/nowhere/at/all"], "no such folder"),
        (["--recipe", "no_such_recipe"], "no_such_recipe"),
        (["--dataset", "mnist"], "fashion_mnist"),
        (["--sed", "1"], "--seed"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_written(
    tmp_path: Path, words: list[str], told: str
) -> None:
    output = tmp_path / "demo"
    done = run_command(["python", "-m", "slurm", "demo", "--output", str(output), *words])
    assert done.returncode == 2, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not list(output.rglob("step.json"))
