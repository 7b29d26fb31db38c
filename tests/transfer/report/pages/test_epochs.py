"""Figures of a run's kept checkpoints over the epochs of pretraining."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from slurm.steps.resources import load_profile
from slurm.steps.suite import Suite, suite_graph
from tests.helpers.report_data import record, write_lines
from transfer.evaluation.provenance import kept_epoch
from transfer.report import command
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import group
from transfer.report.pages.epochs import _series


def line(label: str | None, path: str, task: str, value: float, **more: Any) -> dict[str, Any]:
    metric = {"knn": "top1_k20", "semantic": "mIoU"}[task]
    digest = hashlib.sha256(path.encode()).hexdigest()
    weights = {"path": path, "sha256": digest, "format": "intl-bench", "branch": "online"}
    return {**record("INTL", task, {metric: value}, weights=weights, **more), "label": label}


def test_the_epoch_is_that_of_the_files_name() -> None:
    assert kept_epoch("runs/a/checkpoint_epoch100.pt") == 100
    for other in ("checkpoint.pt", "checkpoint_epoch.pt", "resnet50_100epoch.pt", "raw-pixels", ""):
        assert kept_epoch(other) is None


def test_each_task_is_drawn_over_the_epochs_of_each_run(tmp_path: Path) -> None:
    """Two pretrainings of one method, seeds of an evaluation as their mean, a lone checkpoint in no line."""
    rows = [
        *(line(f"INTL, epoch {e}", f"/r/{run}/checkpoint_epoch{e}.pt", "knn", 10.0 * i + e, dataset="cifar10")
          for i, run in enumerate("ab") for e in (2, 10, 1)),
        *(line(f"INTL, epoch {e}", f"/r/a/checkpoint_epoch{e}.pt", "semantic", v, seed=s, dataset="voc")
          for e, s, v in ((1, 0, 30.0), (1, 1, 32.0), (10, 0, 20.0), (10, 1, 21.0))),
        line(None, "/r/c/checkpoint_epoch3.pt", "knn", 50.0, dataset="cifar10"),
        line("published", "/r/published.pth", "knn", 60.0, dataset="cifar10"),
    ]  # fmt: skip
    write_lines(tmp_path / "in" / "results.jsonl", rows)
    results = group(collect([tmp_path / "in"]))
    knn, semantic = results.tasks
    assert _series(results, knn) == [
        ("INTL", [1, 2, 10], [1.0, 2.0, 10.0]), ("INTL", [1, 2, 10], [11.0, 12.0, 20.0])
    ]  # fmt: skip
    assert _series(results, semantic) == [("INTL", [1, 10], [31.0, 20.5])]
    command.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    names = [p.name for p in (tmp_path / "out" / "plots").glob("epochs-*.svg")]
    assert len(names) == 2 and "Over the epochs of pretraining" in (tmp_path / "out/index.html").read_text()
    drawn = next(p for p in (tmp_path / "out" / "plots").glob("epochs-knn*.svg")).read_text()
    assert "epoch of pretraining" in drawn and len(re.findall(">INTL<", drawn)) == 1


@pytest.mark.parametrize(
    ("label", "name"),
    [(None, "checkpoint_epoch5"), ("a", "a-checkpoint_epoch5"), ("r", "r/checkpoint_epoch5.pt")],
)
def test_lines_are_named_by_their_run_where_no_label_was_given(
    tmp_path: Path, label: str | None, name: str
) -> None:
    rows = [line(name.replace("5", str(e)), f"/r/checkpoint_epoch{e}.pt", "knn", 5.0) for e in (5, 6)]
    write_lines(tmp_path / "results.jsonl", rows)
    results = group(collect([tmp_path]))
    assert [found for found, _, _ in _series(results, results.tasks[0])] == [label or "r"]


def test_a_suite_tells_the_epochs_of_one_label_apart(tmp_path: Path) -> None:
    files = []
    for run in "ab":
        for epoch in (1, 2):
            files.append(tmp_path / run / f"checkpoint_epoch{epoch}.pt")
            files[-1].parent.mkdir(exist_ok=True)
            files[-1].touch()

    def labels(*chosen: Path, label: str | None = "INTL") -> list[str]:
        asked = Suite(output="o", weights=list(map(str, chosen)), tasks=["knn"], data_dir=".", label=label)
        steps = suite_graph(tmp_path, asked, load_profile("local", [])).steps
        argvs = [s.argv for n, s in steps.items() if n.startswith("knn/")]
        return [argv[argv.index("--label") + 1] for argv in argvs]

    assert labels(*files) == ["INTL, epoch 1", "INTL, epoch 2"] * 2
    assert labels(files[0], files[2]) == ["INTL", "INTL"]  # seeds of one epoch, as of other files
    assert labels(*files[:2], label=None) == ["a/checkpoint_epoch1", "a/checkpoint_epoch2"]
