"""What a report says of a suite's steps that did not end well."""

from __future__ import annotations

import json
from pathlib import Path

from slurm.state.step_files import Record
from slurm.steps.graph import Step
from transfer.report.evidence.unfinished import job_gaps


def test_a_step_that_never_began_is_told_from_one_that_was_stopped(tmp_path: Path) -> None:
    for order, (name, state) in enumerate({
        "pretrain": {"state": "stopped", "starts": 1}, "knn/intl": {"state": "stopped"},
        "linear/intl": {"state": "skipped", "lacks": ["pretrain"]}, "convert/intl": {},
    }.items()):  # fmt: skip
        needs = () if name == "pretrain" else ("pretrain",)
        step = Step(name=name, kind="knn", command="m", argv=(), output=tmp_path / name, depends_on=needs)
        Record(tmp_path, name).describe(step, "key", order)
        (Record(tmp_path, name).folder / "state.json").write_text(json.dumps(state))
    gaps = {gap.name: (gap.state, gap.detail) for gap in job_gaps(tmp_path / "jobs", set())}
    never = ("not started", "comes after pretrain")
    assert gaps.pop("pretrain") == ("stopped", "see its log")
    assert set(gaps.values()) == {never} and len(gaps) == 3
