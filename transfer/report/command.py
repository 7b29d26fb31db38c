"""`transfer report`: one report of all results, as HTML, Markdown, CSV and LaTeX."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pretrain.common.cli import save_settings
from pretrain.common.output_folder import output_folder
from pretrain.common.progress import Progress
from pretrain.common.terminal import console
from transfer.options import ReportSettings, parse
from transfer.report.evidence.collect import collect
from transfer.report.evidence.grouping import group
from transfer.report.pages import inventory, page, statements, tables
from transfer.report.pages.page import Page
from transfer.report.pages.statements import Finding
from transfer.report.pages.tables import Table

WRITES = ("config.yaml", "index.html", "report.md", "tables", "plots", "pictures")


def main(argv: list[str]) -> None:
    """`python -m transfer report DIR... --output DIR`."""
    settings: ReportSettings = parse("report", argv)
    with output_folder(settings.output, "transfer report", writes=WRITES, earlier=ReportSettings) as output:
        report = _write(settings, output)
    show(report.alarms, report.verdict, report.findings)
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
    show(inventory.alarms(evidence), verdict, statements.differences(results)[1])


def show(alarms: Sequence[str], verdict: Table | None, findings: Sequence[Finding]) -> None:
    """Print what is missing, the verdict and its statements; coloured on a terminal, plain in a pipe."""
    for alarm in alarms:
        print(f"missing: {alarm}")
    if verdict is None:
        print("no result has been written yet")
        return
    width = shutil.get_terminal_size((110, 24)).columns  # COLUMNS, where there is no terminal
    if sys.stdout.isatty():
        _show_rich(verdict)
    else:
        print(tables.to_text(verdict, width))
    print()
    for finding in findings:
        print(textwrap.fill(f"- {finding.sentence}", width, subsequent_indent="  "))


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
