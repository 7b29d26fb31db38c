"""`transfer leaderboard`: one table a board from many people's results, each row linked to its lines.

A board holds what was measured alike: task, data set, split, share of labels, the protocol's hash, how the
epoch was chosen, and the hash of all else that can change the number (`evaluated_under`). The report sets
results of unlike conditions side by side and says so; here they are never ranked together.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.common.cli import save_settings
from pretrain.common.files import file_name
from pretrain.common.output_folder import output_folder
from transfer.options.commands import LeaderboardSettings, parse
from transfer.report.command import WRITES, show
from transfer.report.evidence.boards import Board, boards_of, key_of, numbered, results_of
from transfer.report.evidence.collect import Evidence, collect
from transfer.report.evidence.grouping import Results, Task, group, metric_name, task_of
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
    name = f"board-{board.task.slug}-{board.selection}-{board.under[:6]}"
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
    places = [(results_of(r), lines[r.folder].get(key_of(r.values), 0)) for r in records]
    file, number = places[0]
    link = urllib.parse.quote(os.path.relpath(file.resolve(), output.resolve()))
    told = [f"{path}:{n}" for path, n in places[:MOST_LINES]]
    more = [f"and {len(places) - MOST_LINES} more"] if len(places) > MOST_LINES else []
    return f"{link}#L{number}", ", ".join([*told, *more])


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
    lines = {folder: numbered(folder) for folder in {r.folder for r in evidence.records}}
    tables = tuple(board_table(board, output, lines) for board in boards)
    gaps = inventory.gaps(evidence)
    apart = [
        [cell(r.label), cell(task_of(r).title), cell(r.protocol), cell(str(results_of(r))), cell(UNKNOWN)]
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
        verdict=overview(boards) if boards else None, summary="", differences=None, alarms=(),
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
    show((), "", made.verdict, None)
    print(f"leaderboard: {(output / 'index.html').resolve()}")
