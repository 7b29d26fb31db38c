"""`transfer zoo`: the published checkpoints by name, with their figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable

from pretrain.common.cli import Parser
from pretrain.common.terminal import console
from transfer.zoo.download import place_of
from transfer.zoo.figures import Published
from transfer.zoo.manifest import PREFIX, Entry, find_entry, load_zoo

DESCRIPTION = """List published checkpoints, which --weights zoo:NAME fetches, or tell what is known of one.

A file is fetched once, checked and kept in the user's cache folder; `python -m transfer reproduce NAME`
evaluates it by the protocols that figures are published of.
"""


def figure_text(figure: Published) -> str:
    """`linear 75.3 (dino_rn50_linear@1)`, or what it is by where no protocol here repeats that."""
    metrics = ", ".join(f"{value:g}" if name.startswith("top1") else f"{name} {value:g}"
                        for name, value in figure.metrics.items())  # fmt: skip
    return f"{figure.task} {metrics} ({figure.protocol or figure.note or 'protocol not known'})"


def row(entry: Entry) -> dict[str, str]:
    """An entry's line of the table."""
    return {
        "name": entry.name, "architecture": entry.arch, "branch": entry.branch,
        "epochs": str(entry.epochs or ""), "format": entry.format,
        "published": "; ".join(map(figure_text, entry.figures)),
    }  # fmt: skip


def markdown() -> str:
    """What comes with the project as a Markdown table, for the documentation."""
    rows = [row(entry) | {"name": f"[`{entry.name}`]({entry.source})"} for entry in load_zoo().values()]
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(r.values() for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(entries: Iterable[Entry]) -> None:
    from rich.table import Table

    rows = [row(entry) | {"fetched": "yes" if place_of(entry).is_file() else ""} for entry in entries]
    view = Table(box=None, header_style="bold", pad_edge=False)
    for name in (shown := [name for name in rows[0] if name != "format"]):
        view.add_column(name, no_wrap=name == "name", overflow="fold")
    for r in rows:
        view.add_row(*(r[name] for name in shown))
    console(width=None if sys.stdout.isatty() else 160).print(view, markup=False)


def _one(entry: Entry) -> None:
    path = place_of(entry)
    said = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry) if f.name != "figures"}
    said["file"] = f"{path}{'' if path.is_file() else ' (not fetched yet)'}"
    for name, value in said.items():
        if value not in ("", None):
            print(f"{name:10s}{value}")
    for figure in entry.figures:
        chosen = ", best epoch on the images reported" if figure.selection == "best" else ""
        print(
            f"published {figure_text(figure)}{chosen}, {figure.dataset}, {figure.n:,} images: {figure.source}"
        )


def main(argv: list[str]) -> int:
    """`python -m transfer zoo`."""
    parser = Parser(prog="python -m transfer zoo", description=DESCRIPTION)
    parser.add_argument("name", nargs="?", metavar="NAME", help="Say all that is known of this one.")
    parser.add_argument("--zoo", metavar="FILE", help="Manifest of your own, listed first.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="As a Markdown table, for documentation.")
    form.add_argument("--json", action="store_true", help="As JSON.")
    asked = parser.parse_args(argv)
    entries = [find_entry(asked.name, asked.zoo)] if asked.name else [*load_zoo(asked.zoo).values()]
    if asked.markdown:
        print(markdown())
    elif asked.json:
        print(json.dumps([dataclasses.asdict(e) | {"file": str(place_of(e))} for e in entries], indent=2))
    elif asked.name:
        _one(entries[0])
    else:
        _table(entries)
        print(f"\n{len(entries)} checkpoints; --weights {PREFIX}NAME takes one")
    return 0
