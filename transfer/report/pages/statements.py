"""The tables of figures, and plain statements about them."""

from __future__ import annotations

from collections import Counter

from transfer.report.evidence.compare import Summary
from transfer.report.evidence.grouping import Results, Task, metric_name
from transfer.report.evidence.pairs import MOST_SHOWN, MOST_TESTED, compared, leading, pairs_of
from transfer.report.evidence.published import Published, other_protocols, same_protocol
from transfer.report.evidence.records import Record
from transfer.report.pages.tables import MISSING, PUBLISHED, STALE, Cell, Table, cell, table

NONE_KNOWN = "Published figures of this protocol and data set: none known."


def value_text(summary: Summary) -> str:
    """`82.60 ± 0.31` over trials (standard deviation, n − 1), `82.60` for a single one."""
    return f"{summary.mean:.2f}" + ("" if summary.std is None else f" ± {summary.std:.2f}")


def spread_text(summary: Summary) -> str:
    """n, and the binomial standard error where it is all that is known."""
    error = summary.binomial_error if summary.n == 1 else None
    return summary.count + ("" if error is None else f", SE {error:.2f}")


def when(record: Record) -> str:
    """The epoch or iteration that was evaluated."""
    if record["epoch"] is not None:
        return f"epoch {record['epoch']}"
    return "" if record["iteration"] is None else f"iteration {record['iteration']}"


def published_value(p: Published, metric: str) -> Cell:
    """A published figure's cell: with its spread, the number of trials and how the epoch was chosen."""
    if metric not in p.metrics:
        return cell("–", kind=MISSING)
    spread = p.spread.get(metric)
    notes = [f"n {p.trials}" if p.trials else "", f"{p.selection} epoch" if p.selection else ""]
    return cell(
        f"{p.metrics[metric]:.2f}" + ("" if spread is None else f" ± {spread:.2f}"),
        note="; ".join(filter(None, notes)), kind=PUBLISHED,
    )  # fmt: skip


def verdict(results: Results) -> Table:
    """Every method in every task: the last epoch's headline metric, with the best epoch's beneath it."""
    columns: list[str | Cell] = ["weights"]
    for task in results.tasks:
        metric = results.headline_metric(task)
        columns.append(cell(f"{task.title} {metric_name(metric)}", note=task.setting))
    best = {task: leading(results, task) for task in results.tasks}
    rows = [
        [cell(m), *(_verdict_cell(results, m, task, bold=m in best[task]) for task in results.tasks)]
        for m in results.methods
    ]
    rows += _published_rows(results)
    note = (
        "Percent. ± is the standard deviation (n − 1) over n pretrainings or, of a single one, n evaluation "
        "seeds; SE the binomial standard error of one run over its images. Main figures are of the last "
        "epoch; beside it, a best epoch chosen on the reported split, or one chosen on training images held "
        "out."
    )
    if len(results.methods) > 1:
        note += (
            " The first row is the model that is above most others over all columns. Bold: the highest of a "
            "column and all that are within noise of it (see the differences); nothing where that is every "
            "row."
        )
    return table("verdict", "Verdict", columns, rows, note)


def _published_rows(results: Results) -> list[list[Cell]]:
    """A row for each published model with a figure under the protocol of one of our tasks, or of several."""
    rows: dict[tuple[str, str, int], list[Cell]] = {}
    for index, task in enumerate(results.tasks):
        metric = results.headline_metric(task)
        told: Counter[tuple[str, str]] = Counter()  # one model may have two figures, of two settings
        for p in same_protocol(task):
            if metric in p.metrics:
                head = cell(p.name, note="published", link=p.source, kind=PUBLISHED)
                row = rows.setdefault(
                    (p.name, p.source, told[p.name, p.source]),
                    [head, *(cell("", kind=MISSING) for _ in results.tasks)],
                )
                row[1 + index] = published_value(p, metric)
                told[p.name, p.source] += 1
    return list(rows.values())


def _verdict_cell(results: Results, method: str, task: Task, *, bold: bool) -> Cell:
    summary = results.headline(method, task)
    if summary is None:
        return cell("–", kind=MISSING)
    metric = results.headline_metric(task)
    shown, *others = results.selections(method, task)
    notes = [spread_text(summary)]
    if shown == "best":
        notes.append("best epoch")
    for other in others:
        second = results.summary(method, task, other, metric)
        if second is not None:
            at = when(results.records(method, task, other)[0]) if second.n == 1 else ""
            notes.append(f"{other} {value_text(second)}" + (f" at {at}" if at else ""))
    if warnings := results.warnings(method, task):
        return cell(value_text(summary), note="; ".join([*warnings, *notes]), kind="bad")
    if any(r.stale for r in results.records(method, task, shown)):
        return cell(value_text(summary), note="stale; " + "; ".join(notes), kind=STALE)
    return cell(value_text(summary), note="; ".join(notes), kind="best" if bold else "")


def task_table(results: Results, task: Task) -> Table:
    """All metrics of one task under one protocol, published figures of that protocol below ours."""
    metrics = results.metrics(task)
    columns: list[str | Cell] = ["weights", "chosen", *(metric_name(m) for m in metrics)]
    columns += ["n", "over", "seeds", "evaluated at", "source"]
    rows = []
    for method in results.methods:
        for selection in results.selections(method, task):
            records = results.records(method, task, selection)
            values, first = [], None
            for metric in metrics:
                found = results.summary(method, task, selection, metric)
                first = first or found
                stale = STALE if any(r.stale for r in records) else ""
                values.append(
                    cell("–", kind=MISSING)
                    if found is None
                    else cell(value_text(found), note=_error_note(found, stale), kind=stale)
                )
            if first is None:
                continue
            at = ", ".join(dict.fromkeys(filter(None, (when(r) for r in records))))
            warned = list(dict.fromkeys(w for r in records for w in r.warnings))
            notes = "; ".join(filter(None, [_input_note(records), *warned]))
            name = cell(method, note=notes, kind="bad" if warned else "")
            tail = [cell(first.n), cell(first.over), cell(first.seeds), cell(at or "-"), cell("this report")]
            rows.append([name, cell(selection), *values, *tail])
    published = same_protocol(task)
    for p in published:
        values = [published_value(p, m) for m in metrics]
        tail = [
            cell(p.trials or "not given"),
            cell("-"),
            cell("-"),
            cell("-"),
            cell("published", link=p.source),
        ]
        rows.append([cell(p.name, note=p.note, kind=PUBLISHED), cell(p.selection or "-"), *values, *tail])
    note = f"Protocol {task.protocol}" + (f", hash {task.protocol_hash[:12]}" if task.protocol_hash else "")
    note += (f", {task.images:,} images evaluated, each once." if task.images else ".") + (
        "" if published else f" {NONE_KNOWN}"
    )
    return table(f"task-{task.slug}", f"{task.title}: {task.setting}", columns, rows, note)


def _error_note(summary: Summary, stale: str) -> str:
    error = summary.binomial_error if summary.n == 1 else None
    return "; ".join(filter(None, [stale, "" if error is None else f"SE {error:.2f}"]))


def _input_note(records: tuple[Record, ...]) -> str:
    sizes = sorted({r["image_size"] for r in records if isinstance(r["image_size"], int)})
    return f"{', '.join(map(str, sizes))} px" if sizes else ""


def published_elsewhere(results: Results) -> Table | None:
    """Figures for the same data sets under other protocols: apart, never ranked."""
    rows, seen = [], set()
    for task in results.tasks:
        for p in other_protocols(task):
            stands_beside = any(p in same_protocol(other) for other in results.tasks)
            if id(p) in seen or stands_beside:
                continue
            seen.add(id(p))
            figures = ", ".join(
                f"{metric_name(m)}: {v:.2f}" + (f" ± {p.spread[m]:.2f}" if m in p.spread else "")
                for m, v in p.metrics.items()
            )
            rows.append([
                cell(p.name, kind=PUBLISHED), cell(task.title), cell(p.dataset), cell(figures),
                cell("; ".join(filter(None, [p.protocol, p.note])) or "the source's own"),
                cell("published", link=p.source),
            ])  # fmt: skip
    if not rows:
        return None
    columns: list[str | Cell] = ["method", "task", "data set", "figures", "protocol", "source"]
    note = "Other protocols than those used above: not comparable with this report's figures, and not ranked."
    return table("published-elsewhere", "Published under other protocols", columns, rows, note)


def differences(results: Results) -> tuple[Table | None, Table | None]:
    """Every pair of methods in every task that both have under one protocol: those of the first method of
    the task, and all others."""
    of_first: list[list[Cell]] = []
    others: list[list[Cell]] = []
    for task in results.tasks:
        found = compared(results, task)
        for (first, second), d in found.items():
            kind = "good" if d.verdict == "beyond noise" else "" if d.beyond else "bad" if d.p else MISSING
            row = [
                cell(f"{task.title} {metric_name(results.headline_metric(task))}", note=task.setting),
                cell(first), cell(second), cell(f"{d.points:+.2f}"), cell(d.spread),
                cell(d.verdict, kind=kind), cell(d.reason),
            ]  # fmt: skip
            (of_first if first == next(iter(found))[0] else others).append(row)
    heads: list[str | Cell] = ["task", "who", "against", "points", "spread", "verdict", "why"]
    many = any(
        p is None or len(p.summaries) > MOST_SHOWN for p in (pairs_of(results, t) for t in results.tasks)
    )
    note = DIFFERENCES_NOTE + (MANY_NOTE if many else "")
    return (
        table("differences", "Differences", heads, of_first, note) if of_first else None,
        table("other-differences", "Differences between the others", heads, others) if others else None,
    )


OF_THESE = "another pretraining may differ more"
DIFFERENCES_NOTE = (
    "Two-sided, 5 %, the comparisons of one task corrected by Holm (the intervals are not). Beyond noise: "
    "over several pretrainings a side, each counted once by the mean of its evaluation seeds. With one "
    "checkpoint a side the verdict is about these checkpoints and names the noise that was measured; "
    f"{OF_THESE}. Of a top-1, the binomial error of the test images is always a part of the noise, as if "
    "each side evaluated images of its own."
)
MANY_NOTE = (
    f" Of tasks with more than {MOST_SHOWN} methods only the differences from the first are shown; with more "
    f"than {MOST_TESTED:,} none is tested."
)
