"""The report's section on a spectrum study: its table, statements and plots.

The study's own document is read, study.md with the SVG files beside it (transfer/spectrum/study_pictures.py):
what it says is said there once.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from transfer.report.evidence.collect import Picture
from transfer.report.evidence.labels import printable
from transfer.report.pages.tables import Table, cell, table

FILE = "study.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What the report shows of one study.md."""

    title: str
    table: Table | None
    statements: tuple[str, ...]
    pictures: tuple[Picture, ...]


def read_study(folder: Path, number: int) -> Study:
    """The first table, the bullets and the SVG pictures of `folder`/study.md."""
    lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [printable(line.expandtabs()) for line in lines]
    title = next((line[2:].strip() for line in lines if line.startswith("# ")), "Spectrum study")
    rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in rows if not all(re.fullmatch(r":?-+:?", c) for c in row)]
    heads, *body = rows or [[]]
    body = [row for row in body if len(row) == len(heads)]
    pictures = [
        Picture(path=file, caption=f"{title}: {file.stem}", section="studies")
        for file in sorted(folder.glob("*.svg"))
    ]
    return Study(
        title=title,
        table=table(f"study-{number}", title, [*heads], [[cell(c) for c in row] for row in body])
        if body
        else None,
        statements=tuple(line[2:].strip() for line in lines if line.startswith("- ")),
        pictures=tuple(pictures),
    )
