"""A suite's folder enters; a table of how every job stands leaves."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import EXIT_FAILED, UserError, parse_settings
from slurm.look import CANCELLED, DONE, FAILED, View, all_views
from slurm.options import positional, spread
from slurm.queue import live_steps
from slurm.table import as_lines, as_table, summary


@dataclass(frozen=True, kw_only=True)
class Status:
    """Settings of `python -m slurm status`."""

    dir: str
    """The suite's output folder."""
    watch: bool = False
    """Stay and refresh until everything has ended."""
    every_s: float = 5.0
    """Seconds between two looks with --watch."""


def suite_folder(text: str) -> Path:
    """The folder, if it is one in which a suite was submitted."""
    root = Path(text).resolve()
    if not any(root.glob("jobs/*/step.json")):
        raise UserError(f"{text}: no suite was submitted into this folder (no {root}/jobs/*/step.json)")
    return root


def look_now(root: Path) -> list[View]:
    """Every step as it stands now."""
    return all_views(root, live_steps(root))


def main(argv: list[str]) -> int | None:
    """Print the table once, or until everything has ended; exit code 1 when something failed."""
    argv = spread(positional(argv, "--dir"), [], ["--watch"])
    asked = parse_settings(Status, argv, prog="python -m slurm status", description=__doc__ or "")
    root = suite_folder(asked.dir)
    views = look_now(root)
    over = {DONE, FAILED, CANCELLED}
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.live import Live

        console = Console()
        if not asked.watch:
            console.print(as_table(views, str(root)))
        else:
            with Live(as_table(views, str(root)), console=console) as live:
                while not all(v.state in over for v in views):
                    time.sleep(asked.every_s)
                    views = look_now(root)
                    live.update(as_table(views, str(root)))
    else:
        while True:
            print("\n".join(as_lines(views)), flush=True)
            if not asked.watch or all(v.state in over for v in views):
                break
            time.sleep(asked.every_s)
            views = look_now(root)
    print(summary(views))
    return EXIT_FAILED if any(v.state == FAILED for v in views) else None
