"""Lines of a results.jsonl with every field made odd: each is shown or left out, and the report is made."""

from __future__ import annotations

import copy
import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_data import record, write_lines
from transfer.evaluation import results
from transfer.report.command import main as report
from transfer.report.pages.plots import MOST_LABELS, _log_lines, draw

ODD: list[Any] = [
    None, [], {}, "", -1, True, 10**400, "\ud800", "x\x1b]0;o\x07\0", "../../evil", "x" * 10_000, ["a", 1],
    {"a": {"b": [None]}},
]  # fmt: skip
DRAWN = ("x\x1b]0;o\x07\0", "x" * 10_000)
"""Lines with one of these have a plot, of accuracy by k: their words stand in its title or legend."""


def odd_lines() -> list[dict[str, Any]]:
    """The same good line with one field, or one of the weights' or the protocol's, replaced or taken away."""
    plotted = record("INTL", "knn", {"top1_k10": 80.0, "top1_k20": 81.0}) | {"dataset": "odd"}
    found = []
    for value in ODD:
        good = plotted if value in DRAWN else plotted | {"metrics": {"top1_k20": 81.0}}
        found += [good | {name: value} for name in good]
        for name in ("weights", "protocol"):
            found += [good | {name: good[name] | {key: value}} for key in good[name]]
    for name in good:
        found.append(copy.deepcopy(good))
        del found[-1][name]
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": {"name": "x", "version": 1, "differs": 5}}, "protocol.differs is 5, which is no list"),
        ({"protocol": {"name": "x", "differs": ["a", 5]}}, "protocol.differs holds 5, which is no str"),
        ({"metrics": {"top1_k" + "9" * 5000: 1.0}}, "is no name of a metric: 5,006 characters"),
        ({"metrics": {"top1": True}}, "top1 is True, which is no number"),
        ({"weights": {"path": ["a"]}}, "weights.path is ['a'], which is no str or null"),
        ({"settings": {"sweep": 5}}, "settings.sweep is 5, which is no list or null"),
        ({"settings": {"sweep": [5]}}, "settings.sweep holds 5, which is no dict"),
        ({"settings": {"world_size": "two"}}, "settings.world_size is 'two'"),
        ({"settings": {"train_loss": {}}}, "settings.train_loss is {}"),
        ({"evaluated_under": {"n": [10**400]}}, "evaluated_under holds a number that is not finite or too"),
        ({"evaluated_under": {"mean": float("nan")}}, "evaluated_under holds a number that is not finite"),
        ({"warnings": [{}]}, "warnings holds {}, which is no str"),
    ],
)
def test_a_line_out_of_shape_is_left_out_with_its_number(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    good = record("INTL", "knn", {"top1_k10": 80.0, "top1_k20": 81.0})
    write_lines(tmp_path / "run" / results.FILE, [good, good | change])
    report([str(tmp_path), "--output", str(tmp_path / "out")])
    with open(tmp_path / "out" / "tables" / "gaps.csv", encoding="utf-8", newline="") as file:
        (gap,) = csv.DictReader(file)
    assert f"{tmp_path / 'run' / results.FILE}: left out line 2 (" in gap["detail"]
    assert said in gap["detail"]
    assert len(results.read(tmp_path / "run")) == 1


def test_odd_files_of_runs_and_suites_are_passed_over(tmp_path: Path) -> None:
    good = record("INTL", "knn", {"top1_k10": 80.0, "top1_k20": 81.0})
    run = tmp_path / "suite" / "knn"
    write_lines(run / results.FILE, [good, good | {"evaluated_under": {"a": _nested(500)}}])
    steps = [1, "a", None, [1], 10**400, float("nan"), True, 2]
    write_lines(run / "metrics.jsonl", [{"step": s, "loss": v, "deep": _nested(500) if s == 1 else 0}
                                        for s in steps for v in (1.5, 10**400, "x")])  # fmt: skip
    for name, step in (("a", {"name": "a", "order": "x", "output": 5, "depends_on": 5}),
                       ("b", {"name": ["b"], "order": 3, "output": "o"})):  # fmt: skip
        (tmp_path / "suite" / "jobs" / name).mkdir(parents=True)
        (tmp_path / "suite" / "jobs" / name / "step.json").write_text(json.dumps(step))
    done = {"state.json": {"ranks": "two"}, "done.json": {"seconds": 1e308}}
    for name, said in done.items():
        (tmp_path / "suite" / "jobs" / "b" / name).write_text(json.dumps(said))
    os.mkfifo(run / "metrics.json")
    report([str(tmp_path / "suite"), "--output", str(tmp_path / "out")])
    shown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "left out line 2 (no JSON object" in shown.replace("\\", "") and "not started yet" in shown
    assert [p.name for p in (tmp_path / "out" / "plots").glob("pretrain-*")] == ["pretrain-loss.svg"]


def _nested(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def test_odd_sweeps_and_conditions_are_shown(tmp_path: Path) -> None:
    good = record("INTL", "linear", {"top1": 80.0})
    sweep = [{"lr": 0.1, "top1": 80.0}, {"lr": 1.0, "top1": 79.0}, {"lr": "x", "top1": 1.0}, {"lr": 3}]
    write_lines(tmp_path / "run" / results.FILE, [
        good | {"settings": {"sweep": sweep}, "evaluated_under": {"mean": mean}}
        for mean in ([0.5], ["x", None], {"a": 1})
    ])  # fmt: skip
    report([str(tmp_path), "--output", str(tmp_path / "out")])
    assert "mean x, None" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert len(list((tmp_path / "out" / "plots").glob("sweep-*.svg"))) == 3


def test_a_plot_shows_the_first_lines_of_very_many() -> None:
    series = [(f"m{i}", [1, 2], [3.0, 4.0]) for i in range(MOST_LABELS + 5)]
    plot = draw("many", "Many", _log_lines, series, x="k", y="percent")
    assert plot.title == f"Many: the first {MOST_LABELS} of {MOST_LABELS + 5}"
    assert f">m{MOST_LABELS - 1}<" in plot.svg and f">m{MOST_LABELS}<" not in plot.svg


def test_odd_lines_are_left_out_or_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = odd_lines()
    assert len(lines) > 350
    root = tmp_path / "below" / "suite"
    (root / "odd").mkdir(parents=True)
    odd = root / "odd" / results.FILE
    odd.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    kept = results.read(odd)
    known = {json.dumps(line) for line in lines}
    assert 0 < len(kept) < len(lines)
    for r in kept:
        assert r.n > 0 and all(-1 <= v <= 100 for v in r.metrics.values()) and isinstance(r.dataset, str)
    good = record("INTL", "knn", {"top1_k10": 83.0, "top1_k20": 84.2})
    write_lines(root / "good" / results.FILE, [good])
    report([str(root), "--output", str(tmp_path / "below" / "report")])
    assert "84.2" in (tmp_path / "below" / "report" / "report.md").read_text(encoding="utf-8")
    assert {json.dumps(json.loads(line)) for line in odd.read_text().splitlines()} == known  # nothing lost
    assert sorted(p.name for p in tmp_path.iterdir()) == ["below"]
    out = capsys.readouterr().out
    assert "\x1b]" not in (tmp_path / "below" / "report" / "report.md").read_text(encoding="utf-8") and out
