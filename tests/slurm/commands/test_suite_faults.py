"""The driver of a suite killed at random moments: its jobs outlive it, and no step is run twice or lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.state.step_files import Record
from tests.helpers.killed_commands import after_kills
from tests.helpers.tiny_suite import graph

pytestmark = pytest.mark.faults


def test_twenty_kills_of_the_driver_run_every_step_once(tmp_path: Path) -> None:
    whole, cuts = after_kills("suite", ["{output}"], tmp_path)
    for root in (whole, *cuts):
        for step in graph(root):
            assert Record(root, step.name).is_done(graph(root).keys[step.name], step.makes), step.name
            runs = (step.output / "runs.txt").read_text().splitlines()
            assert len(runs) == 1 or (step.after and root != whole), (step.name, runs)
        assert (root / "long" / "steps0.txt").read_text().split() == [str(i) for i in range(10)]
        assert not list((root / "code").glob(".*"))
