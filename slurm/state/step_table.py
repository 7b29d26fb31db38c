"""The states of all steps as a table for a terminal, or plain lines for a log."""

from __future__ import annotations

from collections import Counter

from rich.table import Table
from rich.text import Text

from slurm.state.step_state import CANCELLED, DONE, FAILED, RUNNING, View, spell_seconds

STYLE = {DONE: "green", RUNNING: "bold cyan", FAILED: "bold red", CANCELLED: "yellow"}


def as_table(views: list[View], title: str = "") -> Table:
    """A rich table: step, state, time, detail; the log's path below what failed."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    table.add_column("step", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for v in views:
        detail = f"{v.detail}\nlog: {v.log}" if v.state == FAILED and v.log else v.detail
        time = spell_seconds(v.seconds) if v.seconds is not None else ""
        table.add_row(v.name, Text(v.state, style=STYLE.get(v.state, "dim")), time, Text(detail))
    return table


def as_lines(views: list[View]) -> list[str]:
    """The same for a log: one line a step."""
    width = max((len(v.name) for v in views), default=0)
    lines = []
    for v in views:
        time = spell_seconds(v.seconds) if v.seconds is not None else ""
        lines.append(f"{v.name:{width}}  {v.state:9}  {time:>7}  {v.detail}".rstrip())
        if v.state == FAILED and v.log:
            lines.append(f"{'':{width}}  log: {v.log}")
    return lines


def summary(views: list[View]) -> str:
    """3 done, 1 running, 2 waiting."""
    counted = Counter(v.state for v in views)
    return ", ".join(f"{n} {state}" for state, n in counted.items())


def one_line(views: list[View]) -> str:
    """What runs now, for a line every few seconds."""
    running = "; ".join(f"{v.name} {v.detail}" for v in views if v.state == RUNNING)
    return f"{summary(views)}{' | ' + running if running else ''}"
