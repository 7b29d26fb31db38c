"""The report command on folders as the other commands leave them."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.data.datasets import open_dataset
from pretrain.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.report_data import record, write_lines, write_suite
from transfer.__main__ import main as transfer_main
from transfer.evaluation.protocol import load_protocol
from transfer.report import command
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import group
from transfer.report.evidence.published import load_published, same_protocol
from transfer.report.pages import page, tables
from transfer.report.pages.inventory import RECIPES, judged, pretraining_of
from transfer.report.pages.statements import differences, verdict
from transfer.spectrum.study_pictures import write_study


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_suite(tmp_path_factory.mktemp("suite"))
    command.main([str(root), "--output", str(root / "report")])
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# the command


def test_verdict_has_every_row_and_column(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([str(suite), "--output", str(suite / "report")])
    printed = capsys.readouterr().out
    assert f"report: {suite / 'report' / 'index.html'}" in printed
    assert "\x1b" not in printed  # no colours in a pipe
    found = {row["weights"]: row for row in rows(suite / "report" / "tables" / "verdict.csv")}
    assert list(found) == ["INTL", "random control", "random initialisation", "raw pixels"]
    cells = list(found["INTL"].values())[1:]
    # linear: 86.4, 86.5, 86.6 in three seeds; AP: 14 and 15, standard deviation 1/sqrt(2)
    assert cells[0] == "84.20 (n 1, SE 0.36)"
    assert cells[1] == "86.50 ± 0.10 (n 3; best 86.80 ± 0.10)"
    assert cells[2] == "14.50 ± 0.71 (n 2)"
    assert list(found["raw pixels"].values())[3] == "–"
    for row in found:
        assert row in printed


def test_figures_as_numbers(suite: Path) -> None:
    found = rows(suite / "report" / "tables" / "measurements.csv")
    ap = next(r for r in found if (r["method"], r["task"], r["metric"]) == ("INTL", "segmentation", "AP"))
    assert float(ap["mean"]) == 13.5 and float(ap["std"]) == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert (ap["n"], ap["over"], ap["seeds"]) == ("2", "evaluation seeds", "0, 1")
    knn = next(r for r in found if (r["method"], r["metric"]) == ("INTL", "top1_k20"))
    assert (knn["n"], knn["std"], knn["over"]) == ("1", "", "deterministic")


def test_same_input_same_bytes(suite: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        command.main([str(suite), "--output", str(tmp_path / name)])
    for file in sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name != "config.yaml"):
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_page_is_self_contained_with_unique_ids(suite: Path) -> None:
    page = (suite / "report" / "index.html").read_text()
    outside = re.findall(r'(?:src|href)="((?!#|data:)[^"]*)"', page)
    assert [u for u in outside if not u.startswith("https://github.com/")] == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and len(ids) > 30
    assert page.count("<svg ") == len(list((suite / "report" / "plots").glob("*.svg"))) >= 14
    assert page.count("data:image/png") == 3
    assert "currentColor" in page and "#0a0b0c" not in page


def test_markdown_names_files_that_exist(suite: Path) -> None:
    text = (suite / "report" / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) > 15
    for link in links:
        assert (suite / "report" / link).is_file(), link
    assert "86.50 ± 0.10" in text


def test_tex_is_escaped_and_balanced(suite: Path) -> None:
    for file in (suite / "report" / "tables").glob("*.tex"):
        body = [line for line in file.read_text().splitlines() if not line.startswith("%")]
        width = len(re.findall("[lr]", re.search(r"\{([lr]+)\}$", body[0])[1]))  # type: ignore[index]
        for line in body:
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == width - 1, line
        assert not re.search(r"(?<!\\)[_%#]", "\n".join(body)), file.name
    assert tables.tex_escape("50 % of a_b ± 1") == r"50 \% of a\_b $\pm$ 1"


def test_text_from_files_cannot_become_markup(tmp_path: Path) -> None:
    label = "<script>alert(1)</script>|`x`"
    line = {**record("INTL", "knn", {"top1_k20": 50.0}), "label": label, "dataset": "<b>&"}
    write_lines(tmp_path / "run" / "results.jsonl", [line])
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert r"\|\`x\`" in (tmp_path / "out" / "report.md").read_text()


# what is missing, failed, stale or replaced


def test_missing_and_failed_steps_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "knn" / "intl" / "results.jsonl", [record("INTL", "knn", {"top1_k20": 84.0})])
    for order, (name, error) in enumerate(
        (("knn/intl", ""), ("linear/intl/seed0", "ValueError: 3 NaN features"))
    ):
        job = tmp_path / "jobs" / name.replace("/", ".")
        job.mkdir(parents=True)
        step = {"name": name, "kind": "x", "order": order, "output": str(tmp_path / name)}
        (job / "step.json").write_text(json.dumps(step))
        (job / ("failure-1.json" if error else "done.json")).write_text(json.dumps({"error": error}))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text("protocol: solo_knn@1\nweights: x.pt\n")
    (tmp_path / "alone" / "progress.json").write_text('{"label": "features", "done": 3, "total": 9}')
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "missing: linear/intl/seed0: failed (ValueError: 3 NaN features)" in printed
    assert "missing: alone: unfinished (features: 3 of 9 steps done)" in printed
    assert "missing: knn/intl" not in printed
    page = (tmp_path / "report" / "index.html").read_text()
    assert "3 NaN features" in page and "84.00" in page


def test_nothing_finished_still_makes_a_report(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("protocol: solo_knn@1\nweights: x.pt\n")
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert "No result has been written yet" in (tmp_path / "report" / "index.html").read_text()


def test_changed_weights_make_a_result_stale(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"new content")
    line = record("INTL", "knn", {"top1_k20": 84.0})
    line["weights"] = {"path": str(weights), "sha256": "0" * 64, "format": "timm", "branch": "online"}
    write_lines(tmp_path / "run" / "results.jsonl", [line])
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    verdict = rows(tmp_path / "out" / "tables" / "verdict.csv")[0]
    assert list(verdict.values())[1].endswith("(stale; n 1, SE 0.37)")
    gap = rows(tmp_path / "out" / "tables" / "gaps.csv")[0]
    assert gap["state"] == "stale" and "weights file has changed" in gap["detail"]


def test_a_torn_line_is_left_out_and_told(tmp_path: Path) -> None:
    file = tmp_path / "run" / "results.jsonl"
    write_lines(file, [record("INTL", "knn", {"top1_k20": 84.0})])
    with open(file, "a") as out:
        out.write('{"task": "knn", "metr')
    evidence = collect([tmp_path])
    assert len(evidence.records) == 1
    assert evidence.problems == [
        f"{file}: left out line 2 (no JSON object, or lists in it are nested too deeply)"
    ]


def test_a_repeated_run_replaces_its_earlier_result(tmp_path: Path) -> None:
    old = record("INTL", "knn", {"top1_k20": 80.0}, started_at="2026-01-01T00:00:00Z")
    new = record("INTL", "knn", {"top1_k20": 84.0}, started_at="2026-01-02T00:00:00Z")
    write_lines(tmp_path / "results.jsonl", [new, old])
    results = group(collect([tmp_path]))
    (task,) = results.tasks
    summary = results.headline("INTL", task)
    assert summary is not None and summary.mean == 84.0
    assert results.notes == ("1 earlier result was replaced by a later run of the same.",)
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "index.html").read_text()
    assert results.notes[0] in page and "Missing, failed and stale" not in page


@pytest.mark.parametrize(
    ("labels", "methods"),
    [
        (("INTL", None), ["INTL"]),
        ((None, None), ["control/backbone"]),
        (("INTL", "mine"), ["INTL", "mine"]),
        (("INTL", "mine", None), ["INTL", "control/backbone", "mine"]),
    ],
)
def test_a_label_given_once_names_the_same_weights_elsewhere(
    labels: tuple[str | None, ...], methods: list[str], tmp_path: Path
) -> None:
    for i, label in enumerate(labels):
        line = {**record("random control", "knn", {f"top1_k{k}": 84.0 for k in (10, 20)}), "label": label}
        line["dataset"] = f"set{i}"
        write_lines(tmp_path / str(i) / "results.jsonl", [line])
    evidence = collect([tmp_path])
    assert sorted(group(evidence).methods) == methods
    told = judged(evidence)
    assert told is not None and ("are the same weights" in told.note) == (len(methods) > 1)


def test_files_of_one_name_and_networks_of_one_file_have_rows_of_their_own(tmp_path: Path) -> None:
    def line(path: str, sha256: str, branch: str, label: str | None) -> dict[str, Any]:
        weights = {"path": path, "sha256": sha256 * 32, "format": "x", "branch": branch}
        return {**record("INTL", "knn", {"top1_k20": 80.0}), "weights": weights, "label": label}

    given = [
        ("a/model.pth", "a1", "online", None), ("b/model.pth", "b2", "online", None),  # two files
        ("copy/model.pth", "a1", "ema", None),  # the first one again, its other network
        ("s0/m.pth", "c3", "online", "mine"), ("s1/m.pth", "d4", "online", "mine"),  # seeds of one method
        ("c/old.pth", "e5", "online", None), ("c/old.pth", "f6", "online", None),  # changed meanwhile
    ]  # fmt: skip
    for i, fields in enumerate(given):
        write_lines(tmp_path / str(i) / "results.jsonl", [line(*fields)])
    results = group(collect([tmp_path]))
    assert sorted(results.methods) == ["a/model", "a/model (ema)", "b/model", "mine", "old"]
    (task,) = results.tasks
    counts = {m: s.n for m in results.methods if (s := results.headline(m, task)) is not None}
    assert counts["mine"] == 2 and counts["a/model"] == counts["a/model (ema)"] == 1


def test_published_figures_do_not_stand_beside_a_part_of_a_set(tmp_path: Path) -> None:
    for split in ("test", "test (2,000 of 10,000 test images)"):
        rest = {"dataset": "cifar10", "split": split, "protocol": {"name": "intl_cifar_5nn", "version": 2}}
        write_lines(
            tmp_path / split[:9] / "results.jsonl", [record("INTL", "knn", {"top1_k5": 60.0}, **rest)]
        )
        (task,) = group(collect([tmp_path / split[:9]])).tasks
        assert bool(same_protocol(task)) == (split == "test")


def test_names_break_behind_their_marks_and_figures_do_not(tmp_path: Path) -> None:
    line = {**record("INTL", "knn", {"top1_k20": 84.25}), "label": "out/my_model.pth <b>"}
    write_lines(tmp_path / "results.jsonl", [line])
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "out/<wbr>my_<wbr>model.<wbr>pth &lt;b&gt;" in page and ">84.25<" in page


# protocols, published numbers, several folders


def test_another_image_size_is_told_beside_the_difference(tmp_path: Path) -> None:
    for sizes, said in (((48, 32), True), ((48, 48), False)):
        out = tmp_path / str(sizes[1])
        lines = [
            record(label, "knn", {"top1_k20": top1}, image_size=size)
            for label, top1, size in (("INTL", 84.0, sizes[0]), ("random control", 80.0, sizes[1]))
        ]
        write_lines(out / "results.jsonl", lines)
        found, _ = differences(group(collect([out])))
        assert found is not None
        assert ("evaluated under image size 48 against image size 32" in found.rows[0][6].text) == said


def test_results_of_two_protocols_are_never_in_one_column(tmp_path: Path) -> None:
    other = {"name": "solo_knn", "version": 1, "hash": "d4" * 32}
    write_lines(tmp_path / "results.jsonl", [
        record("INTL", "knn", {"top1_k20": 84.0}),
        record("random control", "knn", {"top1_k20": 80.0}, protocol=other),
    ])  # fmt: skip
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert len(group(collect([tmp_path])).tasks) == 2
    assert not (tmp_path / "report" / "tables" / "differences.csv").exists()


def test_published_figures_stand_beside_the_same_protocol_only(tmp_path: Path) -> None:
    protocol = load_protocol("moco_linear@2").reference
    rest = {"dataset": "imagenet", "split": "val", "n": 50_000, "protocol": protocol, "seed": 0, "epoch": 100}
    write_lines(tmp_path / "results.jsonl", [record("INTL", "linear", {"top1": 70.0}, **rest)])
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    folder = tmp_path / "report" / "tables"
    beside = rows(next(folder.glob("task-linear-*.csv")))
    assert [r["weights"].partition(",")[0] for r in beside[1:]] == [
        "MoCo v2",
        "MoCo v1",
        *["MoCo v2"] * 2,
        "MoCo v1",
    ]
    assert beside[1]["top-1"] == "67.50 ± 0.10 (n 5)"
    assert beside[1]["link"].startswith("https://github.com/facebookresearch/moco/tree/78b69ca")
    apart = {r["method"].partition(",")[0] for r in rows(folder / "published-elsewhere.csv")}
    assert "SwAV" in apart and "MoCo v2" not in apart
    verdict = (folder / "verdict.csv").read_text()
    assert "MoCo v2" in verdict and "SwAV" not in verdict


def test_a_published_model_has_one_row_over_several_tasks(tmp_path: Path) -> None:
    def of(task: str, protocol: str, **metrics: float) -> dict[str, Any]:
        rest = {"dataset": "cifar10", "split": "test", "protocol": {"name": protocol, "version": 2}}
        return record("INTL", task, metrics, **rest)

    lines = [of("knn", "intl_cifar_5nn", top1_k5=60.0), of("linear", "intl_cifar_linear", top1=62.0)]
    write_lines(tmp_path / "results.jsonl", lines)
    _, theirs = verdict(group(collect([tmp_path]))).rows
    assert [c.text for c in theirs] == ["INTL, resnet18, 1000 epochs", "90.03", "92.60"]


def test_unknown_protocol_prints_none_known(suite: Path) -> None:
    assert "none known" in (suite / "report" / "report.md").read_text()


def test_published_data_has_a_source_for_every_figure() -> None:
    entries = load_published()
    assert len(entries) > 40
    for entry in entries:
        assert entry.source.startswith("https://")
        assert all(0 < value <= 100 for value in entry.metrics.values())
        assert set(entry.spread) <= set(entry.metrics)
        if entry.protocol and entry.task in ("knn", "linear", "semisup"):
            assert str(load_protocol(entry.protocol, entry.task)) == entry.protocol
        elif entry.protocol:
            config = Path("detection_configs", f"{entry.protocol.partition('@')[0]}.yaml")
            assert entry.protocol in (Path(__file__).parents[3] / config).read_text()


def two_folders(root: Path) -> list[str]:
    for name, sha, values in (("first", "1" * 64, (80.0, 81.0)), ("second", "2" * 64, (84.0, 85.5))):
        for seed, value in enumerate(values):
            line = record("INTL", "linear", {"top1": value}, seed=seed)
            line["weights"] = {**line["weights"], "sha256": sha}
            write_lines(root / name / f"seed{seed}" / "results.jsonl", [line])
    return [str(root / "first"), str(root / "second")]


def test_several_folders_side_by_side(tmp_path: Path) -> None:
    command.main([*two_folders(tmp_path), "--output", str(tmp_path / "report")])
    names = [r["weights"] for r in rows(tmp_path / "report" / "tables" / "verdict.csv")]
    assert names == ["INTL (second)", "INTL (first)"]  # the best first
    (difference,) = rows(tmp_path / "report" / "tables" / "differences.csv")
    assert (difference["who"], difference["against"]) == ("INTL (second)", "INTL (first)")
    assert difference["points"] == "+4.25" and "paired t test over 2 evaluation seeds" in difference["why"]


def test_pooled_folders_are_seeds_of_one_method(tmp_path: Path) -> None:
    dirs = two_folders(tmp_path)
    command.main(["--pool", *dirs, "--output", str(tmp_path / "report")])
    (row,) = rows(tmp_path / "report" / "tables" / "verdict.csv")
    # two checkpoints with seeds 80, 81 and 84, 85.5: means 80.5 and 84.75, standard deviation 4.25 / sqrt(2)
    assert list(row.values())[1] == "82.62 ± 3.01 (n 2, of 4 runs)"


def test_parts_of_one_suite_are_one_method(tmp_path: Path) -> None:
    """`report OUT/knn OUT/linear` must not call INTL two methods."""
    root = write_suite(tmp_path)
    (root / "jobs" / "x").mkdir(parents=True)
    (root / "jobs" / "x" / "step.json").write_text("{}")
    results = group(collect([root / "knn", root / "linear", root / "detection"]))
    assert "INTL" in results.methods and len(results.methods) == 4


# curves


def test_sweep_and_label_shares_are_drawn(tmp_path: Path) -> None:
    sweep = [{"lr": 10.0**-e, "weight_decay": w, "top1": 50 + e + w} for e in range(4) for w in (0, 1)]
    linear = record("INTL", "linear", {"top1": 60.0}, seed=0, selection="held-out", settings={"sweep": sweep})
    shares = [
        record("INTL", "semisup", {"top1": v}, seed=0, label_percent=p, epoch=20)
        for p, v in ((1, 40.0), (10, 60.0), (100, 75.0))
    ]
    write_lines(tmp_path / "results.jsonl", [linear, *shares])
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    plots = {p.name.partition("-")[0]: p.read_text() for p in (tmp_path / "report" / "plots").glob("*.svg")}
    assert {"sweep", "labels"} <= set(plots)
    # a marker for each point: four rates, of each the better weight decay; three shares of the labels
    marks = {name: len(re.findall(r"<use [^>]*stroke: #", svg)) for name, svg in plots.items()}
    assert (marks["sweep"] - marks["labels"]) == 1
    assert ">100<" in plots["labels"]
    assert "Semi-supervised 1 %" in (tmp_path / "report" / "report.md").read_text()


def test_one_share_of_the_labels_makes_no_curve(tmp_path: Path) -> None:
    line = record("INTL", "semisup", {"top1": 40.0}, seed=0, label_percent=1, epoch=20)
    write_lines(tmp_path / "results.jsonl", [line])
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert not list((tmp_path / "report").glob("plots/labels-*"))


def test_coco_minus_one_is_no_figure(tmp_path: Path) -> None:
    """pycocotools gives −1 where there is no object of a size."""
    write_lines(tmp_path / "results.jsonl", [record("INTL", "detection", {"AP": 3.0, "APl": -1.0}, seed=0)])
    command.main([str(tmp_path), "--output", str(tmp_path / "report")])
    (row,) = rows(next((tmp_path / "report" / "tables").glob("task-detection-*.csv")))
    assert (row["AP"], row["APl"]) == ("3.00", "–")


def test_a_terminal_gets_a_table_with_all_rows(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    command.main([str(suite), "--output", str(suite / "report")])
    assert "86.50 ± 0.10" in out.getvalue() and "raw pixels" in out.getvalue() and "\x1b[" in out.getvalue()


# what was judged


def test_recipe_is_told_by_its_values(tmp_path: Path) -> None:
    recipe = yaml.safe_load((RECIPES / "cifar10_ep1000.yaml").read_text())
    weights = tmp_path / "backbone.safetensors"
    config = {"batch_global": 256, "dataset": "cifar10", **recipe, "seed": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    told = pretraining_of(str(weights))
    assert told.startswith("recipe cifar10_ep1000, cifar10, 1000 epochs") and told.endswith("seed 3")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "epochs": 2}))
    assert pretraining_of(str(weights)).startswith(
        "recipe cifar10_ep1000 with another epochs, cifar10, 2 epochs"
    )
    assert pretraining_of("") == pretraining_of("/nowhere/x.pt") == ""


# nearest neighbours


def test_neighbours_of_a_real_run(cifar_folder: Path, tmp_path: Path) -> None:
    words = ["knn", "--weights", "raw-pixels", "--protocol", "solo_knn@1", "--dataset", "cifar10"]
    words += ["--data-dir", str(cifar_folder), "--output", str(tmp_path / "run")]
    assert transfer_main(words) == 0
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    told = re.search(r"of the 6 nearest to each of (\d+) test images, ([\d.]+) % have its class", page)
    assert told and "Not shown" not in page

    # the same by brute force: six nearest by cosine
    train, test = (open_dataset("cifar10", cifar_folder, split) for split in ("train", "test"))
    bank, queries = (
        np.stack([np.asarray(d.image(i), np.float64).ravel() for i in range(len(d))]) for d in (train, test)
    )
    mean, std = (
        np.repeat(np.array(v)[None], 32 * 32, 0).ravel() * 255 for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    bank, queries = ((x - mean) / std for x in (bank, queries))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    nearest = train.labels_N[np.argsort(-queries @ bank.T, axis=1)[:, :6]]
    assert int(told[1]) == len(test)
    assert told[2] == f"{100 * (nearest == test.labels_N[:, None]).mean():.1f}"


def test_neighbours_without_images_are_told(suite: Path) -> None:
    page = (suite / "report" / "index.html").read_text()
    assert "Not shown: INTL: " in page and "does not say where the images are" in page


# mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no folder given"),
        (["{tmp}/nowhere"], "no such folder"),
        (["{tmp}/empty"], "nothing to report"),
        (["{tmp}/empty", "--pictures", "-1"], "at least 0"),
    ],
)
def test_mistakes_end_in_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [a.format(tmp=tmp_path) for a in argv]
    assert transfer_main(["report", *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_unreadable_picture_is_told_and_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "run" / "results.jsonl", [record("INTL", "detection", {"AP": 3.0}, seed=0)])
    (tmp_path / "run" / "pictures").mkdir()
    (tmp_path / "run" / "pictures" / "a.png").write_bytes(b"not a picture")
    command.main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert "not a readable picture" in (tmp_path / "out" / "report.md").read_text()


def test_plots_of_other_commands_are_shown_as_images(tmp_path: Path) -> None:
    """An SVG that another command wrote is embedded as an image, in which no script runs."""
    folder = tmp_path / "study" / "pictures"
    folder.mkdir(parents=True)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 200"><script>alert(1)</script></svg>'
    (folder / "condition_number.svg").write_text(svg)
    (folder / "broken.svg").write_text("<html/>")
    command.main([str(tmp_path / "study"), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "study: condition number" in page and 'width="320" height="200"' in page
    assert "data:image/svg+xml;base64," in page and "<script" not in page
    assert "Predictions beside" not in page
    assert "broken.svg: not a readable picture" in page.replace("<wbr>", "")


def test_a_spectrum_study_is_shown(tmp_path: Path) -> None:
    """What transfer/spectrum/study_pictures.py writes for three runs, one of them collapsed."""
    eigenvalues = [0.5, 0.3, 0.2]
    log = {"step": 120, "loss": 1.0, "condition_number": 2.5, "rankme": 2.9, "eigenvalues": eigenvalues,
           "transformed": eigenvalues, "stable_rank": 2.0, "row_condition_number": 2.0}  # fmt: skip
    runs = [
        {"instance": name, "kind": kind, "seed": seed, "log": [{**log, "step": 1}, log], "diverged": None,
         "verdict": verdict, "knn_top1": 30.0 + seed, "possible_rank": 3, "floor": 0.0, "seconds": 1.0}
        for name, kind, seed, verdict in (
            ("INTL", "intl", 0, None), ("INTL", "intl", 1, None), ("λ^-1", "power", 0, "collapsed: rank 1"),
        )
    ]  # fmt: skip
    write_study(runs, tmp_path / "study", title="cifar10, channel whitening")
    command.main([str(tmp_path / "study"), "--output", str(tmp_path / "out")])
    (table,) = list((tmp_path / "out" / "tables").glob("study-*.csv"))
    assert [r["trained with"] for r in rows(table)] == ["INTL", "λ^-1"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == len(list((tmp_path / "study").glob("*.svg"))) >= 3
    assert "Avoided collapse in all seeds: INTL" in page and "λ^-1, seed 0: collapsed: rank 1" in page


def files_below(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def test_a_report_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    write_lines(tmp_path / "run" / "results.jsonl", [record("INTL", "knn", {"top1_k20": 84.0})])
    words, out = [str(tmp_path / "run"), "--output", str(tmp_path / "out")], tmp_path / "out"
    command.main(words)
    listed = json.loads((out / page.MANIFEST).read_text())
    assert listed == sorted(f for f in files_below(out) if f != "config.yaml" and not f.startswith("."))
    for name in ("tables/old.csv", "tables/mine.csv", "notes.txt"):
        (out / name).write_text("x")
    foreign = tmp_path / "run" / "results.jsonl"
    write_json(
        out / page.MANIFEST, [*listed, "tables/old.csv", "notes.txt", "tables/../../run/results.jsonl"]
    )
    command.main(words)
    assert not (out / "tables" / "old.csv").exists()
    assert (out / "tables" / "mine.csv").exists() and (out / "notes.txt").exists() and foreign.exists()


def test_an_earlier_report_is_no_evidence(suite: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(suite, folder)
    (folder / "report" / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "report" / "pictures" / "000.png")
    before = collect([folder], skip=folder / "report")
    assert [p.path for p in collect([folder]).pictures] == [p.path for p in before.pictures]


def test_user_error_is_a_value_error() -> None:
    with pytest.raises(UserError, match="no such folder"):
        collect(["/nowhere/at/all"])


def test_what_was_judged_has_its_size_and_cost_at_each_size_of_images(tmp_path: Path) -> None:
    for size, count in ((224, 4_087_136_256), (32, 37_011_456), (64, None)):
        line = record("INTL", "knn", {"top1_k20": 80.0}, image_size=size)
        known = {} if size == 224 else {"parameters": 999_600}  # as results of detection, which say neither
        line["settings"] = {**known, **({"multiply_adds": count} if count else {})}
        write_lines(tmp_path / str(size) / "results.jsonl", [line])
    told = judged(collect([tmp_path]))
    assert told is not None
    (row,) = told.rows
    by_name = {head.text: c.text for head, c in zip(told.columns, row)}
    assert by_name["parameters"] == "1000 k" and by_name["results"] == "3"
    assert by_name["multiply-adds"] == "37 M at 32 px, 4.09 G at 224 px"
