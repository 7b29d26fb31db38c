"""The leaderboard: like with like alone, ranked by hand-made figures, each row linked to its line."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pretrain.common.errors import UserError
from tests.helpers.report_data import write_lines
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.results import Result
from transfer.report import leaderboard

UNDER = {"image_size": 224, "precision": "float32", "n": 50_000, "mean": [0.5, 0.5, 0.5]}


def line(label: str, top1: float, sha256: str, protocol: str = "dino_knn@2", **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "task": "knn", "dataset": "imagenet", "split": "test", "n": 50_000, "metrics": {"top1_k20": top1},
        "protocol": load_protocol(protocol).reference, "arch": "resnet50", "label": label,
        "weights": {"path": f"{label}.pth", "sha256": sha256 * 32, "branch": "online"},
        "evaluated_under": UNDER, "started_at": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return dataclasses.asdict(Result(**(values | more)))


@pytest.fixture
def people(tmp_path: Path) -> list[str]:
    """Results of two groups, in folders as they would be committed."""
    write_lines(tmp_path / "ann" / "knn" / "results.jsonl", [
        line("A", 70.0, "a1"), line("C, our best", 64.0, "c1"),
        line("C, our best", 66.0, "c2", started_at="2026-01-03T03:04:05+00:00"),
    ])  # fmt: skip
    other = {**UNDER, "precision": "bfloat16"}
    write_lines(tmp_path / "bob's runs" / "results.jsonl", [
        line("B", 71.5, "b1"), line("D", 99.0, "d1", evaluated_under=other),
        line("E", 98.0, "e1", "solo_knn@2"), line("F", 97.0, "f1", evaluated_under={}),
        line("G", 96.0, "00", warnings=["nothing was learnt"]),
    ])  # fmt: skip
    return [str(tmp_path / "ann"), str(tmp_path / "bob's runs")]


def boards(output: Path) -> dict[str, list[dict[str, str]]]:
    found = {}
    for path in (output / "tables").glob("board-*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


def test_like_is_ranked_with_like(people: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "board"
    leaderboard.main([*people, "--output", str(output)])
    found = boards(output)
    assert len(found) == 3  # DINO's protocol under two precisions, and solo-learn's
    main = max(found.values(), key=len)
    # mean of 64 and 66, standard deviation sqrt(2); G has a warning; 67.5 is DINO's own, published
    assert [(r["rank"], re.sub(r" \(.*", "", r["weights"])) for r in main] == [
        ("1", "B"), ("2", "A"), ("3", "C, our best"), ("–", "G"),
        ("–", "DINO, resnet50, 800 epochs, multi-crop"),
    ]  # fmt: skip
    figures = [r["top-1, k = 20"] for r in main]
    # binomial: 100 sqrt(0.715 * 0.285 / 50000) = 0.20
    assert figures[0] == "71.50 (n 1, SE 0.20)" and figures[2] == "65.00 ± 1.41 (n 2)"
    assert figures[4].startswith("67.50")
    assert "nothing was learnt" in main[3]["weights"]
    # B is 1.5 above A, 5.2 standard errors of the test images' draw: A is not within noise of it
    shown = " ".join(capsys.readouterr().out.split())
    assert "B (71.50)" in shown and "precision bfloat16" in shown
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "F</" in page and "do not say what they were evaluated under" in page


def test_a_row_leads_to_its_line(people: list[str], tmp_path: Path) -> None:
    output = tmp_path / "site" / "board"
    leaderboard.main([*people, "--output", str(output)])
    markdown = (output / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\[(\w)[^\]]*\]\(([^)]*results\.jsonl)#L(\d+)\)", markdown)
    assert {name: number for name, _, number in links} == {
        "A": "1", "C": "2", "B": "1", "D": "2", "E": "3", "G": "5",
    }  # fmt: skip
    for name, link, number in links:
        path = output / unquote(link)
        assert f'"label": "{name}' in path.read_text().splitlines()[int(number) - 1]
    assert "results.jsonl:2" in markdown and "results.jsonl:3" in markdown  # both of C's
    html = (output / "index.html").read_text(encoding="utf-8")
    assert 'href="../../bob%27s%20runs/results.jsonl#L1"' in html


def test_the_same_again_and_nothing(people: list[str], tmp_path: Path) -> None:
    output = tmp_path / "board"
    leaderboard.main([*people, "--output", str(output)])
    first = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and not p.name.startswith(".")}
    leaderboard.main([*people, "--output", str(output)])
    assert {p: p.read_bytes() for p in first} == first
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["--output", "x"], "no folder given"),
        ([str(tmp_path / "empty"), "--output", "x"], "nothing"),
    ):
        with pytest.raises(UserError, match=said):
            leaderboard.main(words)
