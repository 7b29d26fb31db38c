"""`slurm status`: how every job of a suite stands."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.common.cli import EXIT_FAILED, parse_settings
from pretrain.common.errors import UserError
from pretrain.common.terminal import console
from slurm.execution.slurm_queue import live_steps
from slurm.state.step_state import CANCELLED, DONE, FAILED, QUEUED, RUNNING, View, all_views
from slurm.state.step_table import as_lines, as_table, summary


@dataclass(frozen=True, kw_only=True)
class Status:
    """Settings of `python -m slurm status`."""

    dir: str
    """The suite's output folder."""
    watch: bool = False
    """Stay and refresh until everything has ended."""
    every_s: float = 5.0
    """Seconds between two looks with --watch."""
    json: bool = False
    """Print JSON, for programs: the folder and, step by step, name, state, detail, seconds, job and log."""

    def __post_init__(self) -> None:
        if self.json and self.watch:
            raise UserError("--json answers once: leave out --watch")


def suite_folder(text: str) -> Path:
    """The folder, if it is one in which a suite was submitted."""
    root = Path(text).resolve()
    if not any(root.glob("jobs/*/step.json")):
        raise UserError(f"{text}: no suite was submitted into this folder (no {root}/jobs/*/step.json)")
    return root


def look_now(root: Path) -> list[View]:
    """Every step as it stands now."""
    return all_views(root, live_steps(root))


def changing(root: Path, every_s: float) -> Iterator[list[View]]:
    """Looks `every_s` apart, until all have ended or, twice in a row, none that others wait for runs."""
    idle = 0
    while idle < 2:
        views = look_now(root)
        yield views
        if all(v.state in (DONE, FAILED, CANCELLED) for v in views):
            return
        idle = 0 if any(v.state in (RUNNING, QUEUED) for v in views) else idle + 1
        if idle < 2:
            time.sleep(every_s)


def main(argv: list[str]) -> int | None:
    """Print the table once, or until everything has ended; exit code 1 when something failed."""
    asked = parse_settings(
        Status, argv, prog="python -m slurm status", positional=["dir"],
        description="Say how every job of a suite stands; the exit code is 1 when one has failed.",
    )  # fmt: skip
    root = suite_folder(asked.dir)
    if asked.json:
        steps = [dataclasses.asdict(view) for view in look_now(root)]
        print(json.dumps({"folder": str(root), "steps": steps}, indent=2, default=str))
        return EXIT_FAILED if any(step["state"] == FAILED for step in steps) else None
    looks = changing(root, asked.every_s) if asked.watch else iter([look_now(root)])
    views: list[View] = []
    if sys.stdout.isatty():
        from rich.live import Live

        with Live(console=console()) as live:
            for views in looks:
                live.update(as_table(views, str(root)))
    else:
        for views in looks:
            print("\n".join(as_lines(views)), flush=True)
    print(summary(views))
    return EXIT_FAILED if any(v.state == FAILED for v in views) else None
