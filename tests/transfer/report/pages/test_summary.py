"""The report in one paragraph, and the best model in the first row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_data import record, write_lines
from transfer.report import command
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import Results, group
from transfer.report.pages.statements import verdict
from transfer.report.pages.summary import summary

ABOUT_CHECKPOINTS = "another pretraining may differ more."


def line(label: str, task: str, top1: float, sha256: str, **changes: Any) -> dict[str, Any]:
    """A line about a checkpoint of its own."""
    metric = "top1_k20" if task == "knn" else "top1"
    weights = {"path": label, "sha256": sha256 * 64, "branch": "online"}
    return record("INTL", task, {metric: top1}, weights=weights, **changes) | {"label": label}


def knn(folder: Path, dataset: str = "fashion_mnist", **figures: float) -> Results:
    """One k-NN figure a row, of 10,000 images; `pixels` are raw pixels, others checkpoints of their own."""
    lines = [
        record("raw pixels", "knn", {"top1_k20": top1}, dataset=dataset)
        if label == "pixels"
        else line(label, "knn", top1, str(i), dataset=dataset)
        for i, (label, top1) in enumerate(figures.items())
    ]
    write_lines(folder / "results.jsonl", lines)
    return group(collect([folder]))


def test_the_best_checkpoint_stands_first_and_raw_pixels_last(tmp_path: Path) -> None:
    """Of two tasks, each figure counts the rows that it is above: a 0 + 1, b 2 + 0, c 1 + 2, pixels 3."""
    results = knn(tmp_path / "knn", a=70.0, b=82.0, c=75.0, pixels=90.0)
    tops = {"a": 60.0, "b": 50.0, "c": 65.0}
    linear = [line(name, "linear", top1, str(i), seed=0) for i, (name, top1) in enumerate(tops.items())]
    write_lines(tmp_path / "linear" / "results.jsonl", linear)
    assert results.methods == ("b", "c", "a", "raw pixels")  # by k-NN alone
    results = group(collect([tmp_path]))
    assert results.methods == ("c", "b", "a", "raw pixels")
    assert [row[0].text for row in verdict(results).rows] == ["c", "b", "a", "raw pixels"]


def test_a_figure_that_says_nothing_does_not_lead(tmp_path: Path) -> None:
    doubtful = line("a", "knn", 99.0, "1", warnings=["test images among the training images"])
    lines = [doubtful, line("b", "knn", 80.0, "2"), line("c", "knn", 70.0, "3")]
    write_lines(tmp_path / "results.jsonl", lines)
    results = group(collect([tmp_path]))
    assert results.methods[0] == "b"
    assert summary(results).startswith("b has the highest figure in the only column that it is compared in.")


@pytest.mark.parametrize(
    ("dataset", "why"),
    [("fashion_mnist", "near-duplicates among the training images"), ("cifar10", "better than a does")],
)
def test_raw_pixels_above_the_best_model_are_explained(tmp_path: Path, dataset: str, why: str) -> None:
    # standard errors 0.367 and 0.363 of 10,000 images, 0.516 of the difference, of which 0.4 is less than 2
    told = summary(knn(tmp_path / "above", dataset, a=84.0, b=80.0, pixels=84.4))
    assert told.startswith("a has the highest figure in no column. Above it: raw pixels in k-NN on ")
    assert f"{dataset}, by 0.40 points (within the noise of the test images). " in told
    assert (
        "Of its 2 differences from other rows, 1 is beyond the noise of the test images and 1 is within"
        in told
    )
    assert why in told and ("such as cifar10" in told) == (dataset == "fashion_mnist")
    assert told.count(ABOUT_CHECKPOINTS) == 1
    level = summary(knn(tmp_path / "level", dataset, a=84.0, b=80.0, c=84.0))
    assert f"Level with it: c in k-NN on {dataset}. Of its 2" in level
    below = summary(knn(tmp_path / "below", dataset, a=84.0, b=80.0, pixels=83.6))
    assert "pixels" not in below and below.startswith("a has the highest figure in the only column")


def test_it_claims_of_methods_only_what_several_pretrainings_show(tmp_path: Path) -> None:
    """Two pretrainings a side: "noise" alone, and nothing about single checkpoints."""
    figures = (("a", 84.0), ("a", 84.1), ("b", 60.0), ("b", 60.1))
    lines = [line(label, "knn", top1, str(i)) for i, (label, top1) in enumerate(figures)]
    write_lines(tmp_path / "results.jsonl", lines)
    told = summary(group(collect([tmp_path])))
    assert told.endswith("The difference is beyond noise.") and ABOUT_CHECKPOINTS not in told


def test_one_row_alone_is_not_called_best(tmp_path: Path) -> None:
    assert summary(knn(tmp_path, a=84.0)).startswith("Nothing can be compared with a:")


def test_page_markdown_and_terminal_begin_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    told = summary(knn(tmp_path / "run", a=84.0, b=80.0))
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).startswith(told)
    assert max(map(len, printed.rpartition("\nreport: ")[0].splitlines())) <= 100
    # columns of 21, 6 and 28 characters, two apart: of 100 there are 39 left for the reasons
    row = (
        "\nk-NN top-1, k = 20: a  +4.00   beyond the noise of the test  binomial standard error of the test\n"
    )
    assert row in printed
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.index(told) < markdown.index("| weights |")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index(f'<p class="summary">{told}</p>') < page.index("<table")
    assert 'id="table-differences"' in page and "Differences between the others" not in page
