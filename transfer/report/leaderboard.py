"""`transfer leaderboard`: one table a board from many people's results, each row linked to its lines.

A board holds what was measured alike: task, data set, split, share of labels, the protocol's hash, how the
epoch was chosen, and the hash of all else that can change the number (`evaluated_under`). The report sets
results of unlike conditions side by side and says so; here they are never ranked together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.parse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.common.cli import save_settings
from pretrain.common.files import file_name
from pretrain.common.output_folder import output_folder
from transfer.evaluation.results import FILE, hash_of
from transfer.options import LeaderboardSettings, parse
from transfer.report.command import WRITES, show
from transfer.report.evidence.collect import Evidence, collect
from transfer.report.evidence.grouping import SPECTRUM, Results, Task, condition, group, metric_name, task_of
from transfer.report.evidence.labels import printable
from transfer.report.evidence.pairs import leading
from transfer.report.evidence.published import same_protocol
from transfer.report.evidence.records import Record
from transfer.report.pages import inventory, page, statements
from transfer.report.pages.page import Page, Section
from transfer.report.pages.tables import MISSING, PUBLISHED, Cell, Table, cell, table

TEXT = (
    "Ranked by the mean; ± is the standard deviation over pretrainings or, of a single one, over evaluation "
    "seeds. Bold: the first and all that are within noise of it. A name leads to its line in results.jsonl."
)
UNKNOWN = "the lines do not say what they were evaluated under (an older version wrote them)"
MOST_LINES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """Results that may be ranked."""

    task: Task
    selection: str
    conditions: tuple[str, ...]
    """What parts it from other boards of the same task."""
    under: str
    """Hash of the conditions."""
    results: Results

    @property
    def title(self) -> str:
        """What was measured, and how."""
        chosen = {"last": "last epoch", "best": "best epoch on the images reported"}.get(
            self.selection, f"epoch chosen on {self.selection} images"
        )
        return ", ".join([f"{self.task.title}: {self.task.setting}", chosen, *self.conditions])

    @property
    def metric(self) -> str:
        """What is ranked by."""
        return self.results.headline_metric(self.results.tasks[0])

    def means(self) -> dict[str, float]:
        """Of the methods that may be ranked, the best first: none that is stale or warned of."""
        task = self.results.tasks[0]
        found = {}
        for method in self.results.methods:
            summary = self.results.headline(method, task)
            records = self.results.records(method, task, self.selection)
            if summary and not self.results.warnings(method, task) and not any(r.stale for r in records):
                found[method] = summary.mean
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def boards_of(evidence: Evidence, *, pool: bool) -> tuple[list[Board], list[Record]]:
    """The boards in the report's order of tasks, and the records that say too little to be ranked."""
    found: dict[tuple[Task, str, str], list[Record]] = defaultdict(list)
    unranked = []
    for record in evidence.records:
        under = record["evaluated_under"]
        if record["task"] == SPECTRUM:
            continue
        if not isinstance(under, dict) or not under:
            unranked.append(record)
            continue
        ambiguous = frozenset([record.protocol])  # by its hash, whatever it is called
        task = task_of(record, ambiguous)
        found[task, str(record["selection"] or "last"), hash_of(under)].append(record)
    boards = []
    for task, selection, under in sorted(found):
        others = [records for (t, _, _), records in found.items() if t == task]
        parting = _parting([records[0] for records in others])
        records = found[task, selection, under]
        boards.append(Board(
            task=task, selection=selection, under=under,
            conditions=tuple(condition(records[0], key) for key in parting),
            results=group(dataclasses.replace(evidence, records=records), pool=pool),
        ))  # fmt: skip
    return boards, unranked


def _parting(records: Sequence[Record]) -> list[str]:
    """The conditions in which any two of the records differ."""
    keys = sorted({key for r in records for key in r.conditions})
    return [
        key for key in keys if len({json.dumps(r.conditions.get(key), sort_keys=True) for r in records}) > 1
    ]


def board_table(board: Board, output: Path, lines: Mapping[Path, Mapping[str, int]]) -> Table:
    """Ranked methods, below them those that cannot be ranked, and the published figures of the protocol."""
    (task,), results = board.results.tasks, board.results
    means, best = board.means(), leading(results, task)
    rows = []
    for method in [*means, *(m for m in results.methods if m not in means)]:
        records = results.records(method, task, board.selection)
        rank = str(1 + sum(v > means[method] for v in means.values())) if method in means else "–"
        why = [*results.warnings(method, task), *dict.fromkeys(r.stale for r in records if r.stale)]
        link, where = _links(records, output, lines)
        figures = [_figure(results, method, task, m, method in best) for m in results.metrics(task)]
        sha256 = ", ".join(dict.fromkeys(r.sha256[:12] or "-" for r in records))
        rows.append([
            cell(rank), cell(method, note="; ".join([*why, where]), link=link, kind="bad" if why else ""),
            *figures, cell(records[0]["arch"] or "-"), cell(sha256),
        ])  # fmt: skip
    for p in same_protocol(board.task):
        if board.metric in p.metrics and p.selection in ("", board.selection):
            figures = [statements.published_value(p, m) for m in results.metrics(task)]
            head = cell(p.name, note=p.note or "published", link=p.source, kind=PUBLISHED)
            rows.append([cell("–"), head, *figures, cell(p.arch), cell("-")])
    columns: list[str | Cell] = ["rank", "weights", *map(metric_name, results.metrics(task))]
    name = f"board-{board.task.slug}-{board.selection}-{board.under}"
    note = f"Protocol {board.task.protocol}, hash {board.task.protocol_hash}; evaluated under {board.under}."
    return table(file_name(name), board.title, [*columns, "architecture", "sha256"], rows, note)


def _figure(results: Results, method: str, task: Task, metric: str, bold: bool) -> Cell:
    summary = results.headline(method, task, metric)
    if summary is None:
        return cell("–", kind=MISSING)
    best = bold and metric == results.headline_metric(task)
    note = statements.spread_text(summary)
    return cell(statements.value_text(summary), note=note, kind="best" if best else "")


def _links(
    records: Sequence[Record], output: Path, lines: Mapping[Path, Mapping[str, int]]
) -> tuple[str, str]:
    """Where the first record's line stands, from the board's folder, and in words where all of them do."""
    places = [(r.folder / FILE, lines[r.folder].get(_key(r.values), 0)) for r in records]
    file, number = places[0]
    link = urllib.parse.quote(os.path.relpath(file.resolve(), output.resolve()))
    told = [f"{path}:{n}" for path, n in places[:MOST_LINES]]
    more = [f"and {len(places) - MOST_LINES} more"] if len(places) > MOST_LINES else []
    return f"{link}#L{number}", ", ".join([*told, *more])


def _key(line: dict[str, Any]) -> str:
    """A line's content but its label, which the report may have changed."""
    return json.dumps(printable({k: v for k, v in line.items() if k != "label"}), sort_keys=True)


def _numbered(folder: Path) -> dict[str, int]:
    """The number of each line of a folder's results, by its content."""
    found: dict[str, int] = {}
    text = (folder / FILE).read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.setdefault(_key(value), number)
    return found


def overview(boards: Sequence[Board]) -> Table:
    """A row a board: how many are ranked, and who leads."""
    rows = []
    for board in boards:
        means, best = board.means(), leading(board.results, board.results.tasks[0])
        first = next(iter(means), None)
        told = "–" if first is None else f"{first} ({means[first]:.2f})"
        level = [m for m in means if m in best and m != first]
        note = f"within noise of it: {', '.join(level)}" if level else ""
        rows.append([
            cell(board.title), cell(metric_name(board.metric)), cell(len(means)),
            cell(told, note=note, kind="best" if first else MISSING),
        ])  # fmt: skip
    return table("boards", "Boards", ["board", "by", "ranked", "first"], rows)


def compose(evidence: Evidence, output: Path, *, title: str, pool: bool) -> Page:
    """The page of all boards."""
    boards, unranked = boards_of(evidence, pool=pool)
    lines = {folder: _numbered(folder) for folder in {r.folder for r in evidence.records}}
    tables = tuple(board_table(board, output, lines) for board in boards)
    gaps = inventory.gaps(evidence)
    apart = [
        [cell(r.label), cell(task_of(r).title), cell(r.protocol), cell(str(r.folder / FILE)), cell(UNKNOWN)]
        for r in unranked
    ]
    columns: list[str | Cell] = ["weights", "task", "protocol", "file", "why"]
    left_out = table("unranked", "Not ranked", columns, apart)
    sections = [
        Section(slug="boards", title="Boards", text=TEXT, tables=tables),
        Section(slug="unranked", title="Not ranked", tables=(left_out,) if apart else ()),
        Section(slug="missing", title="Missing, failed and stale", tables=(gaps,) if gaps else ()),
    ]
    return Page(
        title=printable(title), roots=tuple(printable(str(r)) for r in evidence.roots),
        verdict=overview(boards) if boards else None, findings=(), alarms=(),
        sections=tuple(s for s in sections if s.tables),
        measurements=inventory.measurements(group(evidence, pool=pool)),
    )  # fmt: skip


def main(argv: list[str]) -> None:
    """`python -m transfer leaderboard DIR... --output DIR`."""
    settings: LeaderboardSettings = parse("leaderboard", argv)
    with output_folder(
        settings.output, "transfer leaderboard", writes=WRITES, earlier=LeaderboardSettings
    ) as output:
        evidence = collect(settings.dirs, skip=output)
        made = compose(evidence, output, title=settings.title, pool=settings.pool)
        page.write(made, output)
        save_settings(settings, output / "config.yaml")
    show((), made.verdict, ())
    print(f"leaderboard: {(output / 'index.html').resolve()}")
