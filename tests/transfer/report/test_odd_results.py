"""Lines of a results.jsonl with every field made odd: each is shown or left out, and the report is made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_data import record, write_lines
from transfer.evaluation import results
from transfer.report.command import main as report

ODD: list[Any] = [
    None, [], {}, "", -1, True, 10**400, "\ud800", "x\x1b]0;o\x07\0", "../../evil", "x" * 10_000, ["a", 1],
    {"a": {"b": [None]}},
]  # fmt: skip


def odd_lines() -> list[dict[str, Any]]:
    """The same good line with one field, or one of the weights' or the protocol's, replaced or taken away."""
    good = record("INTL", "knn", {"top1_k10": 80.0, "top1_k20": 81.0}) | {"dataset": "odd"}
    found = []
    for value in ODD:
        found += [good | {name: value} for name in good]
        for name in ("weights", "protocol"):
            found += [good | {name: good[name] | {key: value}} for key in good[name]]
    for name in good:
        found.append(copy.deepcopy(good))
        del found[-1][name]
    return found


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
