"""The report's section "Spectrum": diagnoses, and what they predict, of checkpoints in a known order."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_data import record, write_lines
from transfer.correlation import kendall
from transfer.report import command
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import group
from transfer.report.evidence.prediction import predictions


def _lines(i: int, top1: float, rankme: float, ap: float | None = None) -> list[dict[str, Any]]:
    """A checkpoint's diagnosis, its k-NN, and the AP of a detector of another file, all of one label."""
    weights = {"path": f"runs/checkpoint_epoch{i}.pt", "sha256": f"{i:02d}" * 32, "format": "intl-bench"}
    same = {"weights": {**weights, "branch": "online"}}
    ranks = {"rankme": rankme, "uniformity": -rankme / 100, "decay": 1 + i / 10}
    said = {"intervals": {"rankme": [rankme - 3, rankme + 3]}, "features": 512}
    lines = [
        record("INTL", "spectrum", ranks, n=2000, split="train", settings=said, **same),
        record("INTL", "knn", {"top1_k20": top1}, **same),
    ]
    if ap is not None:
        other = {"path": "w.pkl", "sha256": "f" * 64, "format": "detectron2", "branch": "online"}
        lines.append(record("INTL", "detection", {"AP": ap}, weights=other, seed=0))
    return [line | {"label": f"epoch {i}"} for line in lines]


def _write(folder: Path, *checkpoints: tuple[float, ...]) -> None:
    for i, values in enumerate(checkpoints):
        write_lines(folder / str(i) / "results.jsonl", _lines(i, *values))


def test_tau_and_what_would_be_chosen(tmp_path: Path) -> None:
    """Six epochs; of 15 pairs two are discordant, τ = (13 − 2) / 15. RankMe takes epoch 4, 0.5 too low."""
    _write(
        tmp_path / "in", (50, 100, 30), (55, 120, 29), (60, 130, 28), (62, 150, 27), (64.0, 170, 26),
        (64.5, 140, 25),
    )  # fmt: skip
    results = group(collect([tmp_path / "in"]))
    assert [t.name for t in results.tasks] == ["knn", "detection"] and len(results.spectra) == 1
    found = {(p.metric, p.task.name): p for p in predictions(results)}
    assert {m for m, _ in found} == {"rankme", "uniformity", "decay"}
    knn = found["rankme", "knn"]
    assert knn.n == 6 and knn.tau == pytest.approx(11 / 15)
    z = math.atanh(11 / 15)
    margin = 1.959964 * math.sqrt(0.437 / 2)
    assert (knn.low, knn.high) == pytest.approx((math.tanh(z - margin), math.tanh(z + margin)))
    assert (knn.chosen, knn.best, knn.loss) == ("epoch 4", "epoch 5", 0.5)
    assert found["uniformity", "knn"].tau == pytest.approx(-11 / 15)
    assert found["uniformity", "knn"].chosen == "epoch 4"  # the least is the widest
    assert found["decay", "knn"].chosen == "epoch 0"  # the nearest to 1
    # classification rises while dense falls: they are never put together
    assert found["rankme", "detection"].tau == pytest.approx(-11 / 15)

    command.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert "## Spectrum" in text and "What predicts: classification" in text and "dense tasks" in text
    (ranks,) = (tmp_path / "out/tables").glob("spectrum-spectrum-*.csv")
    assert '"150 ([147, 153])"' in ranks.read_text()
    (taus,) = (tmp_path / "out/tables").glob("predicts-*lassification.csv")
    assert "RankMe" in taus.read_text() and "0.73" in taus.read_text()
    verdict = text[text.index("epoch 0") : text.index("## ")]
    assert "RankMe" not in verdict, "a diagnosis is no result to compare"


def test_too_few_checkpoints_are_said_to_be(tmp_path: Path) -> None:
    _write(tmp_path, (50, 100), (55, 120), (60, 130), (62, 150))
    command.main([str(tmp_path), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert "4 diagnosed checkpoints with a result, too few to say" in text and "What predicts" not in text
    assert "Dense tasks: no diagnosed checkpoint has a result" in text
    assert "Which checkpoint each metric would choose" in text


def test_an_kendall() -> None:
    x = [1.0, 2, 3, 4, 5]
    assert kendall(x[:4], x[:4])[0] is None and kendall(x, [1.0] * 5)[0] is None
    tau, low, high = kendall(x, x)
    assert tau == high == pytest.approx(1) and low == pytest.approx(
        math.tanh(math.atanh(0.9) - 1.2957), abs=1e-3
    )


def test_pictures_of_a_diagnosis_stand_in_its_section(tmp_path: Path) -> None:
    one, other = _lines(0, 50, 100)[0], _lines(1, 50, 100)[0]
    write_lines(tmp_path / "a/results.jsonl", [one, other])
    (tmp_path / "a/pictures").mkdir()
    (tmp_path / "a/spectra.json").write_text(json.dumps({}))
    (tmp_path / "a/pictures/spectra.svg").write_text('<svg viewBox="0 0 10 10"></svg>')
    (picture,) = collect([tmp_path]).pictures
    assert (picture.section, picture.caption) == ("spectrum", "a: spectra")  # not of either checkpoint
    (tmp_path / "a/spectra.json").unlink()
    assert [p.section for p in collect([tmp_path]).pictures] == ["predictions"]
