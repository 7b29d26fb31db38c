"""Tables of what was evaluated, what is missing, what it took, and of all figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pretrain.common.output_folder import read_config
from pretrain.common.progress import counted
from pretrain.settings import RECIPES
from transfer.evaluation.provenance import weights_name
from transfer.options.weights import RAW_PIXELS
from transfer.report.evidence.collect import Evidence
from transfer.report.evidence.grouping import Results
from transfer.report.evidence.records import Record
from transfer.report.pages.tables import STALE, Cell, Table, cell, table

MAX_ALARMS = 8
MAX_CHANGES = 3


def judged(evidence: Evidence) -> Table | None:
    """The weights behind the results: sha256, format, branch, pretraining, whether they are still there."""
    rows: dict[tuple[str, ...], list[Cell]] = {}
    counts: dict[tuple[str, ...], int] = {}
    sizes: dict[tuple[str, ...], dict[int, str]] = {}
    parameters: dict[tuple[str, ...], str] = {}  # which results of detection do not say
    for record in evidence.records:
        weights, settings = record["weights"] or {}, record["settings"] or {}
        key = (record.label, *record.identity)
        counts[key] = counts.get(key, 0) + 1
        at = sizes.setdefault(key, {})
        if "parameters" in settings:
            parameters[key] = _short(settings["parameters"])
        if isinstance(record["image_size"], int) and isinstance(settings.get("multiply_adds"), int):
            at[record["image_size"]] = _short(settings["multiply_adds"])
        if key in rows:
            continue
        path = str(weights.get("path") or "")
        here = "stale: changed since" if "weights file" in record.stale else _presence(path, record.sha256)
        rows[key] = [
            cell(record.label), cell(_file(path), note=path),
            cell(record.sha256[:16] or "-"),
            cell(weights.get("format") or "-"), cell(weights.get("branch") or "-"),
            cell(record["arch"] or "-"),
            cell(pretraining_of(path) or "-"),
            cell(here, kind=STALE if here.startswith("stale") else ""),
        ]  # fmt: skip
    if not rows:
        return None
    columns: list[str | Cell] = [
        "label", "weights", "sha256", "format", "branch", "architecture", "parameters",
        Cell(text="multiply-adds", note="of an image: convolutions, matrix products"), "pretraining",
        "file today", "results",
    ]  # fmt: skip
    body = [
        [*row[:6], cell(parameters.get(key, "-")), _at_sizes(sizes[key]), *row[6:], cell(counts[key])]
        for key, row in rows.items()
    ]
    return table("judged", "What was evaluated", columns, body, _twins(evidence.records))


def _file(path: str) -> str:
    return weights_name(path) if path in ("", RAW_PIXELS) or path.startswith("zoo:") else Path(path).name


def _at_sizes(found: dict[int, str]) -> Cell:
    """Multiply-adds at each size of images, px."""
    if not found:
        return cell("-")
    return cell(", ".join(f"{found[size]} at {size} px" for size in sorted(found)))


def _short(count: object) -> str:
    """A count in three digits: 23.5 M, 4.09 G."""
    if not isinstance(count, int) or count < 0:
        return "-"
    for factor, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{unit}" if count < 999.5 * factor else f"{count / factor:.0f}{unit}"
    return str(count)


def _twins(records: list[Record]) -> str:
    """Which labels stand for the same weights."""
    labels: dict[tuple[str, str], dict[str, None]] = {}
    for r in records:
        if r.sha256:
            labels.setdefault(r.identity, {})[r.label] = None
    told = [f"{' and '.join(same)} are the same weights." for same in labels.values() if len(same) > 1]
    return " ".join([*told, "One --label for all makes them one row."] if told else [])


def _presence(path: str, sha256: str) -> str:
    if not sha256 or not path or path == RAW_PIXELS:
        return "-"
    return "unchanged" if os.path.isfile(path) else "not found from here"


def pretraining_of(path: str) -> str:
    """How weights of this project came about, from the configuration beside them; empty for others."""
    values = read_config(Path(path).parent) if path else {}
    if not {"epochs", "dataset", "batch_global", "seed"} <= set(values):
        return ""
    parts = [_recipe(values), f"{values['dataset']}", counted(values["epochs"], "epoch")]
    if values.get("max_steps"):
        parts.append(f"at most {values['max_steps']} steps")
    views = "+".join(str(v) for v in values.get("view_sizes") or [])
    parts += [f"batch {values['batch_global']}", f"views {views}" if views else ""]
    parts += ["EMA" if values.get("ema") else "", f"seed {values['seed']}"]
    return ", ".join(filter(None, parts))


def _recipe(values: dict[str, Any]) -> str:
    """The recipe that was run, told by its values: all of them, or all but a few."""
    known = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(RECIPES.glob("*.yaml"))}
    differing = {
        name: [key for key, value in recipe.items() if values.get(key) != value]
        for name, recipe in known.items()
    }
    if not differing:
        return ""
    name = min(differing, key=lambda n: (len(differing[n]), n))
    keys = differing[name]
    if len(keys) > MAX_CHANGES:
        return ""
    return f"recipe {name}" + (f" with another {', '.join(keys)}" if keys else "")


def alarms(evidence: Evidence) -> tuple[str, ...]:
    """What is missing or failed, for the top of the page: the first few, and how many more there are."""
    told = [f"{g.name}: {g.state} ({g.detail})" for g in evidence.gaps]
    more = len(told) - MAX_ALARMS
    if more <= 0:
        return tuple(told)
    return (*told[:MAX_ALARMS], f"and {more} more: see Missing, failed and stale")


def gaps(evidence: Evidence) -> Table | None:
    """What is missing, failed or stale."""
    rows = [
        [cell(g.name), cell(g.state, kind="bad"), cell(g.detail)]
        for g in evidence.gaps
    ]  # fmt: skip
    told: dict[tuple[str, str, str], int] = {}
    for r in evidence.records:
        for state, why in [("stale", r.stale)] * bool(r.stale) + [("doubtful", w) for w in r.warnings]:
            key = (f"{r.label}: {r['task']} {r.protocol}", state, why)
            told[key] = told.get(key, 0) + 1
    for (what, state, why), count in told.items():
        kind = STALE if state == "stale" else "bad"
        rows.append([cell(what), cell(state, kind=kind), cell(f"{why} ({count} result lines)")])
    rows += [[cell("input"), cell("unreadable", kind="bad"), cell(p)] for p in evidence.problems]
    if not rows:
        return None
    return table("gaps", "Missing, failed and stale", ["what", "state", "detail"], rows)


def costs(evidence: Evidence) -> Table | None:
    """Wall time and device-hours of each evaluation, its lines counted once, and of a suite's steps."""
    rows = []
    runs: dict[tuple[Any, ...], Record] = {}
    for r in evidence.records:
        if r["seconds"]:
            runs.setdefault((r.folder, r["started_at"], r["seed"]), r)
    for step in evidence.times:
        if step.output not in {folder.resolve() for folder, _, _ in runs}:
            ranks = "1 process" if step.ranks == 1 else f"{step.ranks} processes"
            rows.append([
                cell(step.name), cell(step.kind), cell("-"), cell("-"), cell(ranks),
                *_time_cells(step.seconds, step.ranks), cell("-"),
            ])  # fmt: skip
    for r in runs.values():
        settings = r["settings"] or {}
        devices = settings.get("world_size") or settings.get("num_gpus") or 1
        rows.append([
            cell(r.label), cell(r["task"]), cell(r.protocol), cell("-" if r["seed"] is None else r["seed"]),
            cell(r["device"] or "-"), *_time_cells(r["seconds"], max(int(devices), 1)),
            cell(str(r["commit"] or "-")[:12]),
        ])  # fmt: skip
    if not rows:
        return None
    columns: list[str | Cell] = [
        "what", "task", "protocol", "seed", "device", "seconds", "device-hours", "commit",
    ]  # fmt: skip
    return table("costs", "Wall time", columns, rows)


def _time_cells(seconds: float, devices: int) -> tuple[Cell, Cell]:
    return cell(f"{seconds:.0f}"), cell(f"{seconds * devices / 3600:.3f}")


def measurements(results: Results) -> Table:
    """Every mean as numbers alone, one a line, for further analysis (CSV only)."""
    columns: list[str | Cell] = [
        "method", "task", "label_percent", "dataset", "split", "images", "protocol", "protocol_hash",
        "selection", "metric", "mean", "std", "n", "binomial_se", "over", "seeds",
    ]  # fmt: skip
    rows = []
    for method, task, selection in results.groups:
        for metric in results.metrics(task):
            s = results.summary(method, task, selection, metric)
            if s is None:
                continue
            error = s.binomial_error if s.n == 1 else None
            rows.append([cell(v) for v in (
                method, task.name, task.label_percent, task.dataset, task.split, task.images, task.protocol,
                task.protocol_hash, selection, metric, f"{s.mean:.6f}",
                None if s.std is None else f"{s.std:.6f}", s.n,
                None if error is None else f"{error:.6f}", s.over, s.seeds,
            )])  # fmt: skip
    return table("measurements", "All figures", columns, rows)
