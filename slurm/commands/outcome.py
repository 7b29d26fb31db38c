"""How a suite on this machine ended: its steps, the verdict over its results, where the report is."""

from __future__ import annotations

from pathlib import Path

from pretrain.common.cli import EXIT_FAILED
from slurm.state.step_state import DONE, View
from slurm.state.step_table import as_lines, summary


def show_outcome(root: Path, views: list[View]) -> int | None:
    """Print the steps, then the verdict table and its sentences; exit code 1 unless every step is done."""
    print("\n".join(as_lines(views)))
    print(summary(views))
    report = root / "report" / "index.html"
    if report.exists():
        from transfer.report.command import show_summary

        print()
        show_summary(root)
        print(f"\nreport: {report}")
    return EXIT_FAILED if any(v.state != DONE for v in views) else None
