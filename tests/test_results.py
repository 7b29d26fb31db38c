"""Results: a line written is the line read, the same evaluation is found again, figures are percentages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from transfer.results import FILE, Clock, Result, append, find, read

RESULT = Result(
    task="knn", dataset="cifar10", split="test", n=160, metrics={"top1_k20": 40.0},
    protocol={"name": "solo_knn", "version": 1, "hash": "0"}, image_size=32, label="mine",
    weights={"path": "a.pt", "sha256": "ab", "format": "timm", "branch": "online"},
    **Clock().stamp(torch.device("cpu")),
)  # fmt: skip


def test_a_line_comes_back(tmp_path: Path) -> None:
    append(tmp_path, RESULT)
    append(tmp_path, dataclasses.replace(RESULT, seed=3))
    with open(tmp_path / FILE, "a") as file:
        file.write('{"task": "knn", "torn')
    assert read(tmp_path) == [RESULT, dataclasses.replace(RESULT, seed=3)]
    assert RESULT.versions["torch"] and RESULT.started_at.endswith("+00:00") and "CPU" in RESULT.device


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"label_percent": 10}, {"image_size": 48}, {"n": 10},
        {"protocol": RESULT.protocol | {"hash": "1"}}, {"weights": RESULT.weights | {"branch": "ema"}},
    ],
    ids=str,
)  # fmt: skip
def test_another_evaluation_is_not_taken_for_this_one(tmp_path: Path, change) -> None:
    append(tmp_path, RESULT)
    assert find(tmp_path, dataclasses.replace(RESULT, metrics={}, device="other"))
    assert not find(tmp_path, dataclasses.replace(RESULT, **change))


@pytest.mark.parametrize("value", [float("nan"), 100.1, float("inf")])
def test_no_percentage_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no percentage"):
        dataclasses.replace(RESULT, metrics={"top1": value})
