"""The report's section on the spectra of checkpoints, and on what they predict."""

from __future__ import annotations

from transfer.correlation import FEWEST
from transfer.report.evidence.grouping import Results, Task
from transfer.report.evidence.prediction import BETTER, DENSE, Prediction, predictions
from transfer.report.evidence.records import Record
from transfer.report.pages.tables import Cell, Table, cell, table

TEXT = (
    "From features of training images; no label is used but by the neural-collapse ratios. In brackets: 95 % "
    "intervals over the images, from random halves of them. Ranks depend on the number of images."
)
NAMES = {
    "rankme": "RankMe", "decay": "decay α", "stable_rank": "stable rank", "entropy_rank": "entropy rank",
    "condition_number": "condition number", "largest_share": "largest share", "uniformity": "uniformity",
    "cluster_learnability": "cluster learnability", "intrinsic_dimension": "intrinsic dimension",
    "clid": "CLID", "alignment": "alignment", "lidar": "LiDAR", "nc1": "NC1", "nc2_norms": "NC2 norms",
    "nc2_angles": "NC2 angles",
}  # fmt: skip


def spectrum_tables(results: Results) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """The diagnoses, Kendall's τ for classification and for dense tasks, and statements about them."""
    if not results.spectra:
        return (), ()
    found = predictions(results)
    groups = {
        "Classification": [p for p in found if p.task.name not in DENSE],
        "Dense tasks": [p for p in found if p.task.name in DENSE],
    }
    told = []
    shown = []
    for name, of_group in groups.items():
        enough = [p for p in of_group if p.n >= FEWEST]
        if enough:
            shown.append(_predicted(name, enough))
        short = {p.task: p.n for p in of_group if p.n < FEWEST}
        told += [
            f"{task.title} ({task.setting}): {n} diagnosed checkpoints with a result, too few to say whether "
            f"a metric predicts it, which takes {FEWEST}."
            for task, n in short.items()
        ]
        if not of_group:
            told.append(f"{name}: no diagnosed checkpoint has a result, or only one.")
    diagnoses = tuple(_diagnosis(results, task) for task in results.spectra)
    return (*diagnoses, *shown, *_choices(found)), tuple(told)


def _diagnosis(results: Results, task: Task) -> Table:
    """A row a checkpoint: every metric with its interval."""
    metrics = [m for m in NAMES if m in results.metrics(task)]
    rows = [
        [cell(method, note=_which(r)), *(_value(r, m) for m in metrics)]
        for method in results.methods
        for r in results.all_records(method, task)
    ]
    title = f"Spectrum: {task.setting}"
    return table(f"spectrum-{task.slug}", title, ["weights", *(NAMES[m] for m in metrics)], rows, TEXT)


def _which(record: Record) -> str:
    return "; ".join([f"{(record['settings'] or {}).get('features', '?')} features", *record.warnings])


def _value(record: Record, metric: str) -> Cell:
    value = record["metrics"].get(metric)
    if not isinstance(value, (int, float)):
        return cell("–")
    ends = ((record["settings"] or {}).get("intervals") or {}).get(metric)
    both = isinstance(ends, list) and len(ends) == 2 and all(isinstance(v, (int, float)) for v in ends)
    return cell(f"{value:.4g}", note=f"[{ends[0]:.4g}, {ends[1]:.4g}]" if both and ends else "")


def _predicted(name: str, found: list[Prediction]) -> Table:
    """Kendall's τ of each metric, a row, and task, a column."""
    tasks = sorted({p.task for p in found})
    by_place = {(p.metric, p.task): p for p in found}
    rows = [
        [cell(NAMES[m]), *(_tau(by_place.get((m, task))) for task in tasks)]
        for m in BETTER
        if any((m, task) in by_place for task in tasks)
    ]
    heads = [cell(t.title, note=t.setting) for t in tasks]
    note = (
        "Kendall's τ-b between a metric and the result, over checkpoints, with its 95 % interval: 1 the same "
        "order, −1 the reverse, and an interval with 0 in it says nothing."
    )
    return table(f"predicts-{name}", f"What predicts: {name.lower()}", ["metric", *heads], rows, note)


def _tau(p: Prediction | None) -> Cell:
    if p is None or p.tau is None:
        return cell("–")
    told = not p.low <= 0 <= p.high
    return cell(f"{p.tau:.2f}", note=f"[{p.low:.2f}, {p.high:.2f}], n = {p.n}", kind="best" if told else "")


def _choices(found: list[Prediction]) -> tuple[Table, ...]:
    """Which checkpoint each metric would have taken, such as which epoch of a run, beside the best."""
    rows = [
        [
            cell(p.task.title, note=p.task.setting), cell(NAMES[p.metric]), cell(p.chosen), cell(p.best),
            cell(f"{p.loss:.2f}"),
        ]
        for p in sorted(found, key=lambda p: (p.task, p.loss))
    ]  # fmt: skip
    if not rows:
        return ()
    heads: list[str | Cell] = ["task", "metric", "would choose", "best", "loss of the choice"]
    return (table("spectrum-choices", "Which checkpoint each metric would choose", heads, rows),)
