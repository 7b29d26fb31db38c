"""`transfer report`: one report of all results, as HTML, Markdown, CSV and LaTeX."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pretrain.common.cli import save_settings
from pretrain.common.output_folder import output_folder
from pretrain.common.progress import Progress
from pretrain.common.terminal import console
from pretrain.common.terminal import width as terminal_width
from transfer.options.commands import ReportSettings, parse
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import group
from transfer.report.pages import inventory, page, statements, tables
from transfer.report.pages.page import Page
from transfer.report.pages.summary import summary
from transfer.report.pages.tables import Cell, Table

WRITES = ("config.yaml", "index.html", "report.md", "tables", "plots", "pictures")


def main(argv: list[str]) -> None:
    """`python -m transfer report DIR... --output DIR`."""
    settings: ReportSettings = parse("report", argv)
    with output_folder(settings.output, "transfer report", writes=WRITES, earlier=ReportSettings) as output:
        report = _write(settings, output)
    show(report.alarms, report.summary, report.verdict, report.differences)
    print(f"\nreport: {(output / 'index.html').resolve()}")


def _write(settings: ReportSettings, output: Path) -> Page:
    with Progress(3, label="report", unit="part") as bar:
        evidence = collect(settings.dirs, skip=output)
        results = group(evidence, pool=settings.pool)
        bar.update(1, now="tables, plots and pictures")
        report = page.compose(evidence, results, title=settings.title, per_folder=settings.pictures)
        bar.update(1, now="files")
        page.write(report, output)
        save_settings(settings, output / "config.yaml")
        bar.update(1)
    return report


def show_summary(folder: Path) -> None:
    """Print the verdict over the results in `folder` without writing a report."""
    evidence = collect([str(folder)], skip=folder / "report")
    results = group(evidence, pool=False)
    verdict = statements.verdict(results) if results.tasks else None
    show(inventory.alarms(evidence), summary(results), verdict, statements.differences(results)[0])


def show(alarms: Sequence[str], told: str, verdict: Table | None, differences: Table | None) -> None:
    """Print what is missing, the summary and the tables; coloured on a terminal, plain in a pipe."""
    for alarm in alarms:
        print(f"missing: {alarm}")
    if verdict is None:
        print("no result has been written yet")
        return
    width = terminal_width(1000, otherwise=110)  # COLUMNS, where there is no terminal
    if told:
        print(textwrap.fill(told, width), end="\n\n")
    shown = [verdict] if differences is None else [verdict, _short(differences)]
    for i, t in enumerate(shown):
        if sys.stdout.isatty():
            _show_rich(t)
        else:
            print("\n" * (i > 0) + tables.to_text(t, width, wide_end=i > 0))


def _short(differences: Table) -> Table:
    """Task, who and against whom in one column, without the interval: as a terminal has room for."""
    columns = (Cell(text="who against whom"), *(differences.columns[i] for i in (3, 5, 6)))
    rows = [
        (Cell(text=f"{task.text}: {who.text} against {whom.text}"), points, verdict, why)
        for task, who, whom, points, _, verdict, why in differences.rows
    ]
    return dataclasses.replace(differences, columns=columns, rows=tuple(rows))


def _show_rich(t: Table) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    styles = {"best": "bold green", "missing": "dim", "published": "italic", "stale": "yellow"}
    shown = RichTable(title=t.title)
    for c in t.columns:
        shown.add_column(Text(c.text) + Text(f"\n{c.note}" if c.note else "", style="dim"))
    for row in t.rows:
        shown.add_row(
            *(
                Text(c.text, style=styles.get(c.kind, ""))
                + Text(f"\n{c.note}" if c.note else "", style="dim")
                for c in row
            )
        )
    console().print(shown)
