"""What is one result: what was judged differently is parted or named, and never beside published figures."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_data import record, write_lines
from transfer.evaluation.protocol import all_protocols, load_protocol
from transfer.report import command
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import Results, group
from transfer.report.evidence.pairs import compared, leading
from transfer.report.evidence.published import load_published, other_protocols, same_protocol
from transfer.report.evidence.records import DETECTION_HASHES
from transfer.report.pages import tables
from transfer.report.pages.inventory import gaps
from transfer.report.pages.statements import differences, task_table, verdict

ONE = {
    "image_size": 48,
    "precision": "float32",
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "resize": 54,
    "n": 10_000,
}


def read(tmp_path: Path, *lines: dict[str, Any]) -> Results:
    write_lines(tmp_path / "results.jsonl", list(lines))
    return group(collect([tmp_path]))


def under(label: str, top1: float, **changes: Any) -> dict[str, Any]:
    return {**record(label, "knn", {"top1_k20": top1}), "evaluated_under": {**ONE, **changes}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 24}, "image size 24"),
        ({"precision": "bfloat16"}, "precision bfloat16"),
        ({"mean": [0.4, 0.5, 0.5]}, "mean 0.4, 0.5, 0.5"),
        ({"std": [0.228, 0.25, 0.25]}, "std 0.228, 0.25, 0.25"),
        ({"resize": None}, "resize not recorded"),
        ({"fit": "whole"}, None),  # a key that the other line does not have is unknown there
        ({"world_size": 2, "image_size": 24}, "image size 24"),
    ],
)
def test_one_method_under_two_conditions_has_two_columns(
    change: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    results = read(
        tmp_path, under("INTL", 84.0), under("INTL", 80.0, **change), under("random control", 70.0)
    )
    settings = [task.setting for task in results.tasks]
    if said is None:
        assert len(settings) == 1 and len(results.notes) == 1
        return
    assert len(settings) == 2 and results.notes == ()
    assert sum(said in s for s in settings) == 1
    texts = {c.text for row in verdict(results).rows for c in row}
    assert {"84.00", "80.00", "70.00"} <= texts
    assert len({task.slug for task in results.tasks}) == 2


def test_lines_without_the_field_are_told_apart_as_well(tmp_path: Path) -> None:
    def old(size: int, precision: str) -> dict[str, Any]:
        line = record(
            "INTL", "knn", {"top1_k20": float(size)}, image_size=size, settings={"precision": precision}
        )
        return {k: v for k, v in line.items() if k not in ("evaluated_under", "evaluated_under_hash")}

    results = read(tmp_path, old(32, "float32"), old(24, "float32"), old(24, "bfloat16"))
    assert len(results.tasks) == 3 and results.notes == ()


def test_methods_under_different_conditions_are_compared_with_the_difference_named(tmp_path: Path) -> None:
    results = read(tmp_path, under("INTL", 84.0), under("random control", 80.0, precision="bfloat16"))
    assert len(results.tasks) == 1
    found, _ = differences(results)
    assert found is not None
    assert "evaluated under precision float32 against precision bfloat16" in found.rows[0][6].text
    alike, _ = differences(read(tmp_path / "b", under("INTL", 84.0), under("random control", 80.0)))
    assert alike is not None and "evaluated under" not in alike.rows[0][6].text


def test_what_deviates_from_its_protocol_has_a_column_of_its_own(tmp_path: Path) -> None:
    def line(top1: float, **changes: Any) -> dict[str, Any]:
        rest = {"dataset": "imagenet", "split": "val", "n": 50_000, "epoch": 100, "seed": 0}
        rest["protocol"] = load_protocol("moco_linear@2").reference
        return {**record("INTL", "linear", {"top1": top1}, **rest), **changes}

    results = read(
        tmp_path, line(67.0), line(60.0, deviations=["images of 96 px; the protocol's are of 224 px"])
    )
    plain, other = sorted(results.tasks, key=lambda t: t.altered)
    assert other.setting.endswith(
        "; differs from moco_linear@2: images of 96 px; the protocol's are of 224 px"
    )
    assert same_protocol(plain) and not same_protocol(other)
    assert all(p in other_protocols(other) for p in same_protocol(plain))


def test_a_users_own_file_named_like_a_shipped_one_is_told_and_not_called_stale(tmp_path: Path) -> None:
    rest = {"dataset": "imagenet", "split": "val", "n": 50_000, "epoch": 100, "seed": 0}
    own = {"name": "moco_linear", "version": 2, "hash": "0" * 12}
    (task,) = read(tmp_path, record("INTL", "linear", {"top1": 70.0}, protocol=own, **rest)).tasks
    assert "differs from moco_linear@2: other values than the shipped file has" in task.setting
    assert same_protocol(task) == [] and gaps(collect([tmp_path])) is None


@pytest.mark.parametrize(
    ("changes", "beside", "said"),
    [
        ({}, True, ""),
        ({"n": 128}, False, "128 images"),
        ({"hash": "f" * 16}, False, "other values than the shipped file has"),
        (
            {"hash": "f" * 16, "differs": ["SOLVER.MAX_ITER 1 instead of 180000"]},
            False,
            "MAX_ITER 1 instead of",
        ),
    ],
)
def test_an_altered_detection_protocol_is_never_beside_published_figures(
    changes: dict[str, Any], beside: bool, said: str, tmp_path: Path
) -> None:
    n = changes.pop("n", 5000)
    protocol = {"name": "coco_R50_C4_2x", "version": "1", "hash": DETECTION_HASHES["coco_R50_C4_2x@1"][0]}
    rest = {"dataset": "coco_2017", "split": "val", "n": n, "seed": 0, "protocol": {**protocol, **changes}}
    (task,) = (results := read(tmp_path, record("INTL", "detection", {"AP": 40.0}, **rest))).tasks
    assert said in task.setting
    names = [row[0].text for row in verdict(results).rows]
    assert any(name.startswith("INTL, resnet50") for name in names) is beside
    assert len(task_table(results, task).rows) == 1 + beside


def test_detection_hashes_are_those_of_the_shipped_configurations() -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from transfer.detection import config, protocol

    for name, known in DETECTION_HASHES.items():
        shipped = config.load_config(name.partition("@")[0], [], to_run_here=False)
        assert protocol.protocol_of(shipped, shipped)["hash"] in known, name


def test_a_figure_that_says_nothing_is_marked_and_not_compared(tmp_path: Path) -> None:
    def line(label: str, top1: float, loss: float, **changes: Any) -> dict[str, Any]:
        rest = {"label_percent": 10, "seed": 0, "epoch": 20, "settings": {"train_loss": loss}}
        return {**record(label, "semisup", {"top1": top1}, **rest), **changes}

    # guessing among ten classes: ln 10 = 2.303
    first = line("INTL", 15.8, 2.31)
    second, third = line("random control", 60.0, 0.9), line("random initialisation", 40.0, 0.9)
    for gone in (first, second, third):
        gone.pop("warnings", None)
    results = read(tmp_path, first, second, third)
    (task,) = results.tasks
    cells = {row[0].text: row[1] for row in verdict(results).rows}
    assert cells["INTL"].kind == "bad" and "nothing was learnt: a training loss of 2.31" in cells["INTL"].note
    assert cells["random control"].kind == "best"
    assert list(compared(results, task)) == [("random control", "random initialisation")]
    assert leading(results, task) == {"random control"}
    found = gaps(collect([tmp_path]))
    assert found is not None and [row[1].text for row in found.rows] == ["doubtful"]
    told = read(tmp_path / "b", line("INTL", 15.8, 0.1, warnings=["training and test images are the same"]))
    assert "training and test images are the same" in verdict(told).rows[0][1].note


# published figures


def test_every_published_figure_can_show() -> None:
    """A figure's name is one that results of its protocol have: DINO's k-NN stands under k = 20."""
    values = {str(p): p for p in all_protocols()}
    for entry in load_published():
        assert entry.n > 0 and entry.selection in ("", "best")
        if entry.task == "knn" and entry.protocol:
            ks = values[entry.protocol].values["ks"]
            assert set(entry.metrics) <= {f"{m}_k{k}" for m in ("top1", "top5") for k in ks}, entry.name
    dino = [p for p in load_published() if (p.method, p.task, p.protocol) == ("DINO", "knn", "dino_knn@2")]
    assert [p.metrics for p in dino] == [{"top1_k20": 67.5}]


def test_published_figures_are_those_of_their_sources() -> None:
    def figures(method: str, dataset: str, **more: str) -> list[dict[str, float]]:
        found = [p for p in load_published() if (p.method, p.dataset, p.task) == (method, dataset, "linear")]
        return [p.metrics for p in found if all(getattr(p, k) == v for k, v in more.items())]

    # offline, not the online accuracies that stand beside them in solo-learn's table
    assert figures("Barlow Twins (solo-learn)", "imagenet100") == [{"top1": 80.16, "top5": 95.14}]
    assert figures("VICReg (solo-learn)", "imagenet100") == [{"top1": 79.40, "top5": 95.02}]
    assert figures("W-MSE (solo-learn)", "imagenet100") == [{"top1": 69.06, "top5": 91.22}]
    assert {p.source for p in load_published() if "solo-learn" in p.method} == {
        "https://github.com/vturrisi/solo-learn"
    }
    assert figures("Barlow Twins", "imagenet") == [{"top1": 73.5, "top5": 91.0}]
    assert {"top1": 71.1} in figures("MoCo v2", "imagenet")
    assert len(figures("ReSA", "imagenet")) == 5
    assert len([p for p in load_published() if "(lightly)" in p.method and p.task == "linear"]) == 10
    best = {p.method for p in load_published() if p.selection == "best"}
    assert {"INTL", "INTL (EMA)", "SwAV", "DINO", "Barlow Twins", "VICReg"} <= best


# text of strangers


def test_names_of_files_are_plain_and_stay_in_the_folder(tmp_path: Path) -> None:
    evil = "../../../x/\x1b[31m\u202e" + "long" * 100
    lines = [
        record("INTL", task, {"top1_k20": 50.0, "top1_k5": 49.0, "top1": 50.0}, dataset=f"{evil}{i}", seed=0,
               split=f"({evil})", label_percent=percent,
               protocol={"name": evil, "version": 1, "hash": "../../y"})
        for task in ("knn", "semisup") for i in (1, 2) for percent in (1, 10)
    ]  # fmt: skip
    write_lines(tmp_path / "run" / "results.jsonl", lines)
    before = set(tmp_path.rglob("*"))
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    written = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "out") for p in written)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,150}", p.name) for p in written)
    # k-NN on two sets and semi-supervised on two sets with two shares; no table took another's place
    assert len(list((tmp_path / "out" / "tables").glob("task-*.csv"))) == 8


def test_texts_of_files_run_nothing_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = "=HYPERLINK(1)\x1b[2J"
    write_lines(tmp_path / "run" / "results.jsonl", [
        {**record("INTL", "knn", {"top1_k20": 50.0}), "label": label},
        {**record("random control", "knn", {"top1_k20": 40.0}), "label": "@SUM(A1)"},
    ])  # fmt: skip
    words = [str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--title", "a](x)\n# <b>\x1b[2J"]
    command.main(words)
    assert "\x1b" not in capsys.readouterr().out
    for file in (
        p for p in (tmp_path / "out").rglob("*") if p.suffix in (".csv", ".md", ".html", ".tex", ".svg")
    ):
        assert "\x1b" not in file.read_text(encoding="utf-8"), file
    for file in (tmp_path / "out" / "tables").glob("*.csv"):
        with open(file, encoding="utf-8", newline="") as opened:
            for text in (text for row in csv.reader(opened) for text in row):
                assert not text.startswith(("=", "@")), (file, text)
                assert text[:1] not in ("+", "-") or not text[1:] or float(text) is not None
    assert "'=HYPERLINK(1)" in (tmp_path / "out" / "tables" / "verdict.csv").read_text()
    assert "+10.00" in (tmp_path / "out" / "tables" / "differences.csv").read_text()
    first = (tmp_path / "out" / "report.md").read_text().splitlines()[0]
    assert first.startswith(r"# a\](x)") and r"\<b\>" in first
    assert tables.markdown_escape("a_b\n*c*") == r"a\_b \*c\*"


def test_a_folder_of_images_is_called_by_its_name(tmp_path: Path) -> None:
    """A copy of another name is the same data; other files of the same name are other data, and shown so."""

    def line(folder: str | None, files: str, top1: float, sha256: str) -> dict[str, Any]:
        given = {"dataset": "imagefolder", "split": f"test (3 classes, files {files})"}
        weights = {"path": sha256, "sha256": sha256 * 64, "branch": "online"}
        settings = {"folder": folder} if folder else {}
        return record("INTL", "knn", {"top1_k20": top1}, **given, settings=settings, weights=weights)

    old = line(None, "ab12cd", 70.0, "1")
    named, copied = line("birds", "ab12cd", 80.0, "2"), line("birds-copy", "ab12cd", 81.0, "3")
    (task,) = read(tmp_path / "one", old, named, copied).tasks
    assert task.setting == "birds test (3 classes), solo_knn@1, 10,000 images"
    (before,) = read(tmp_path / "before", old).tasks
    assert before.setting.startswith("imagefolder test (3 classes, files ab12cd), solo_knn@1")
    assert task == before and task.slug == before.slug  # what is shown changes no identity
    both = read(tmp_path / "both", named, line("birds", "ef34ab", 90.0, "2")).tasks
    assert [t.data for t in both] == [f"birds test (3 classes, files {h})" for h in ("ab12cd", "ef34ab")]


def test_a_published_checkpoint_is_called_as_a_suite_calls_it(tmp_path: Path) -> None:
    line = record("INTL", "knn", {"top1_k20": 80.0}, weights={"path": "zoo:tiny", "sha256": "1" * 64})
    assert read(tmp_path, line | {"label": None}).methods == ("tiny",)
