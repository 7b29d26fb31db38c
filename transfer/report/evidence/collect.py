"""Everything in folders of runs that a report can show, in one fixed order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pretrain.common.errors import UserError
from pretrain.common.files import numbered_jsonl, read_jsonl
from transfer.evaluation.results import check
from transfer.report.evidence.labels import named, printable
from transfer.report.evidence.records import Record, why_altered, why_stale
from transfer.report.evidence.unfinished import (
    Gap,
    StepTime,
    is_jobs,
    job_gaps,
    job_times,
    run_gaps,
    suite_of,
)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg")
MOST_TOLD = 5
LARGEST = 1e300
DRAWN_HERE = ("curves.png",)
"""Pictures of what the report draws itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve over steps or iterations: one metrics.jsonl of pretraining or metrics.json of detectron2."""

    label: str
    """Its row's name where it has results, else its place under the given folder."""
    folder: Path
    rows: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An image file of a run, to be shown with a caption."""

    path: Path
    caption: str
    section: Literal["predictions", "studies", "spectrum"]
    """Where it belongs: what a detector finds, or plots of other commands."""


@dataclasses.dataclass(kw_only=True)
class Evidence:
    """All that was found, each list in the order of the command line and then of the path."""

    roots: list[Path]
    records: list[Record] = dataclasses.field(default_factory=list)
    pretraining: list[Curve] = dataclasses.field(default_factory=list)
    detection: list[Curve] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    studies: list[Path] = dataclasses.field(default_factory=list)
    """Folders of spectrum studies."""
    gaps: list[Gap] = dataclasses.field(default_factory=list)
    times: list[StepTime] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    """Input that could not be read or is not shown, each as a sentence."""


def collect(dirs: Sequence[str | Path], *, skip: Path | None = None) -> Evidence:
    """Read everything under `dirs`; `skip` (the report's own folder) is left out.

    Raises UserError where a folder is missing or holds nothing that a report could show.
    """
    found = Evidence(roots=[Path(d) for d in dirs])
    for root in found.roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give folders that earlier commands had as --output")
    suites = [suite_of(root) for root in found.roots]
    accounted: set[Path] = set()
    for suite in dict.fromkeys(suites):
        found.gaps += job_gaps(suite / "jobs", accounted)
        found.times += job_times(suite / "jobs")
    seen: set[Path] = set()
    for root, suite in zip(found.roots, suites):
        for folder, files in _folders(root, skip):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                name = _read(folder, files, root, suites.index(suite), found)
                if folder.resolve() not in accounted:
                    found.gaps += run_gaps(folder, name, files)
    found = printable(found)
    found.records = named(found.records)
    kinds = (found.records, found.pretraining, found.detection, found.pictures, found.studies, found.gaps)
    if not any(kinds):
        raise UserError(
            f"nothing to report under {', '.join(map(str, dirs))}: no results.jsonl, metrics.jsonl or "
            "metrics.json there; give folders that `transfer knn`, `transfer linear`, `train_net` or "
            "`slurm suite` wrote"
        )
    return found


def _read(folder: Path, files: frozenset[str], root: Path, index: int, found: Evidence) -> str:
    """Add what one folder holds to `found`; returns the name of the run in it."""
    lines = _results(folder / "results.jsonl", found.problems) if "results.jsonl" in files else []
    found.records += [
        Record(values=v, folder=folder, root=index, stale=why_stale(v), altered=why_altered(v)) for v in lines
    ]
    name = _label(folder, root, lines, qualified=len(found.roots) > 1)
    for file, step, runs in (
        ("metrics.jsonl", "step", found.pretraining),
        ("metrics.json", "iteration", found.detection),
    ):
        read = map(_numbers, read_jsonl(folder / file)) if file in files else ()
        rows = [row for row in read if step in row]
        if rows:
            runs.append(Curve(label=name, folder=folder, rows=_last_of_each(rows, step)))
    if "study.md" in files:
        found.studies.append(folder)
    if folder.name == "pictures":
        run = _label_and_seed(folder.parent, root)
        section = _section_of(folder.parent)
        for file in sorted(f for f in files - {*DRAWN_HERE} if f.lower().endswith(PICTURE_SUFFIXES)):
            caption = f"{run}: {Path(file).stem.replace('_', ' ')}"
            found.pictures.append(Picture(path=folder / file, caption=caption, section=section))
    return name


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The finite numbers of a row of curves, of a size that can be drawn."""
    return {k: v for k, v in row.items() if type(v) in (int, float) and abs(v) < LARGEST}


def _section_of(run: Path) -> Literal["predictions", "studies", "spectrum"]:
    """Where the pictures of a run belong."""
    if (run / "spectra.json").exists():
        return "spectrum"
    found = any((run / f).exists() for f in ("metrics.json", "results.jsonl"))
    return "predictions" if found else "studies"


def _results(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines that say what was measured; others are told among the problems, each with its number."""
    whole, lost = [], []
    for number, line, _ in numbered_jsonl(path):
        if why := _why_none(line):
            lost.append(f"line {number} ({why})")
        elif line is not None:
            whole.append(line)
    if lost:
        more = f" and {len(lost) - MOST_TOLD} more" if len(lost) > MOST_TOLD else ""
        problems.append(f"{path}: left out {', '.join(lost[:MOST_TOLD])}{more}")
    return whole


def _why_none(line: dict[str, Any] | None) -> str:
    """Why a line is no result; empty where it is one."""
    if line is None:
        return "no JSON object, or lists in it are nested too deeply"
    if not (line.get("metrics") and line.get("task")):
        return "without task or metrics"
    try:
        check(line)
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


def _folders(root: Path, skip: Path | None) -> Iterator[tuple[Path, frozenset[str]]]:
    """Every folder under `root` in sorted order, hidden ones, `skip` and earlier reports left out."""
    skipped = skip.resolve() if skip else None

    def wanted(folder: Path) -> bool:
        hidden = folder.name.startswith((".", "__"))
        report = (folder / "index.html").is_file() and (folder / "report.md").is_file()
        return not (hidden or report or folder.resolve() == skipped or is_jobs(folder))

    for name, dirs, files in os.walk(root):
        folder = Path(name)
        dirs[:] = sorted(d for d in dirs if wanted(folder / d))
        if folder.resolve() != skipped:
            yield folder, frozenset(f for f in files if (folder / f).is_file())  # no pipes, no devices


def _last_of_each(rows: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], ...]:
    """Rows by rising `key`; those of one step joined, a resumed run's later values winning."""
    joined: dict[Any, dict[str, Any]] = {}
    for row in rows:
        joined[row[key]] = {**joined.get(row[key], {}), **row}
    return tuple(joined[step] for step in sorted(joined))


def _label(folder: Path, root: Path, lines: list[dict[str, Any]], *, qualified: bool = False) -> str:
    """Label of the run's results where it has them, else its place under the given folder."""
    if lines:
        return Record(values=lines[-1], folder=folder, root=0).label
    relative = folder.relative_to(root).as_posix()
    name = root.resolve().name
    return name if relative == "." else f"{name}/{relative}" if qualified else relative


def _label_and_seed(folder: Path, root: Path) -> str:
    lines = read_jsonl(folder / "results.jsonl")
    if len({str(line.get("weights")) for line in lines}) > 1:  # pictures of several in one
        lines = []
    seed = lines[-1].get("seed") if lines else None
    return _label(folder, root, lines) + ("" if seed is None else f", seed {seed}")
