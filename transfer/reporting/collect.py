"""Folders of runs enter; everything in them that a report can show leaves, in one fixed order."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.cli import UserError
from pretrain.files import read_jsonl, sha256_of

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
RAW_PIXELS = "raw-pixels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a results.jsonl and where it stands."""

    values: dict[str, Any]
    """The line as it was written (see transfer/results.py for the fields)."""
    folder: Path
    """Folder of the results.jsonl."""
    root: int
    """Position on the command line of the DIR that it was found under."""
    stale: str = ""
    """Why the result no longer describes what is on the disk; empty when it does or nobody can tell."""

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    @property
    def label(self) -> str:
        """The name of its row: what --label gave, else the weights' file name."""
        return str(self["label"] or weights_name(self["weights"] or {}))

    @property
    def sha256(self) -> str:
        return str((self["weights"] or {}).get("sha256") or "")

    @property
    def protocol(self) -> str:
        """name@version, the way it is given on the command line."""
        return protocol_name(self["protocol"] or {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A curve over steps or iterations: one metrics.jsonl of pretraining or metrics.json of detectron2."""

    label: str
    """Its row's name where it has results, else its place under the given folder."""
    folder: Path
    rows: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    path: Path
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Something that was started or planned and has no result."""

    name: str
    state: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was found, each list in the order of the command line and then of the path."""

    roots: tuple[Path, ...]
    records: tuple[Record, ...] = ()
    pretraining: tuple[Run, ...] = ()
    detection: tuple[Run, ...] = ()
    pictures: tuple[Picture, ...] = ()
    studies: tuple[Path, ...] = ()
    gaps: tuple[Gap, ...] = ()
    problems: tuple[str, ...] = ()


def weights_name(weights: dict[str, Any]) -> str:
    """A short name for weights without a label: the file name, after its folder where it is a generic one."""
    path = str(weights.get("path") or "")
    if not path:
        return "random initialisation"
    if path == RAW_PIXELS:
        return "raw pixels"
    name = Path(path)
    return (
        f"{name.parent.name}/{name.name}" if name.stem.startswith(("backbone", "checkpoint")) else name.name
    )


def protocol_name(protocol: dict[str, Any]) -> str:
    name, version = protocol.get("name", "unnamed"), protocol.get("version")
    return name if version is None or "@" in str(name) else f"{name}@{version}"


def collect(dirs: Sequence[str | Path], *, skip: Path | None = None) -> Evidence:
    """Read everything under `dirs`; `skip` (the report's own folder) is left out.

    Raises UserError where a folder is missing or holds nothing that a report could show.
    """
    roots = tuple(Path(d) for d in dirs)
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give folders that earlier commands had as --output")
    records: list[Record] = []
    pretraining: list[Run] = []
    detection: list[Run] = []
    pictures: list[Picture] = []
    studies: list[Path] = []
    gaps: list[Gap] = []
    problems: list[str] = []
    seen: set[Path] = set()
    finished: set[Path] = set()
    suites = [_suite_of(root) for root in roots]
    for suite in dict.fromkeys(suites):
        gaps += _job_gaps(suite / "jobs", finished)
    for root in roots:
        index = suites.index(_suite_of(root))
        for folder, files in _folders(root, skip):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            lines = read_jsonl(folder / "results.jsonl") if "results.jsonl" in files else []
            if lines and "results.jsonl" in files:
                torn = _lines(folder / "results.jsonl") - len(lines)
                if torn:
                    problems.append(f"{folder / 'results.jsonl'}: {torn} unreadable line(s) left out")
            for line in lines:
                if not isinstance(line.get("metrics"), dict) or not line.get("task"):
                    problems.append(f"{folder / 'results.jsonl'}: a line without task or metrics left out")
                    continue
                records.append(Record(values=line, folder=folder, root=index, stale=_why_stale(line)))
            name = _label(folder, root, lines)
            if "study.jsonl" in files:
                studies.append(folder)
            elif "metrics.jsonl" in files:
                rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "step" in row]
                if rows:
                    pretraining.append(Run(label=name, folder=folder, rows=_last_of_each(rows, "step")))
            if "metrics.json" in files:
                rows = [row for row in read_jsonl(folder / "metrics.json") if "iteration" in row]
                if rows:
                    detection.append(Run(label=name, folder=folder, rows=_last_of_each(rows, "iteration")))
            if folder.name == "pictures":
                inside = _label_and_seed(folder.parent, root)
                found = sorted(f for f in files if f.lower().endswith(PICTURE_SUFFIXES))
                pictures += [Picture(path=folder / f, caption=f"{inside}: {Path(f).stem}") for f in found]
            if folder.resolve() not in finished:
                gaps += _gap(folder, root, files, bool(lines))
    evidence = Evidence(
        roots=roots, records=tuple(records), pretraining=tuple(pretraining), detection=tuple(detection),
        pictures=tuple(pictures), studies=tuple(studies), gaps=tuple(gaps), problems=tuple(problems),
    )  # fmt: skip
    if not (records or pretraining or detection or studies or gaps):
        where = ", ".join(str(r) for r in roots)
        raise UserError(
            f"nothing to report under {where}: no results.jsonl, metrics.jsonl or metrics.json there; "
            "give folders that `transfer knn`, `transfer linear`, `train_net` or `slurm suite` wrote"
        )
    return evidence


def _folders(root: Path, skip: Path | None) -> Iterator[tuple[Path, frozenset[str]]]:
    """Every folder under `root` in sorted order, hidden ones and `skip` left out."""
    skipped = skip.resolve() if skip else None
    for name, dirs, files in os.walk(root):
        folder = Path(name)
        dirs[:] = sorted(
            d
            for d in dirs
            if not d.startswith((".", "__"))
            and (folder / d).resolve() != skipped
            and not _is_jobs(folder / d)
        )
        if folder.resolve() != skipped:
            yield folder, frozenset(files)


def _lines(path: Path) -> int:
    text = path.read_text(encoding="utf-8", errors="replace")
    return sum(1 for line in text.splitlines() if line.strip())


def _last_of_each(rows: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], ...]:
    """Rows by rising `key`; those of one step joined, a resumed run's later values winning."""
    joined: dict[Any, dict[str, Any]] = {}
    for row in rows:
        joined[row[key]] = {**joined.get(row[key], {}), **row}
    return tuple(joined[step] for step in sorted(joined))


def _label(folder: Path, root: Path, lines: list[dict[str, Any]]) -> str:
    """Label of the run's results where it has them, else its place under the given folder."""
    if lines:
        return Record(values=lines[-1], folder=folder, root=0).label
    relative = folder.relative_to(root).as_posix()
    return root.resolve().name if relative == "." else relative


def _label_and_seed(folder: Path, root: Path) -> str:
    lines = read_jsonl(folder / "results.jsonl")
    seed = lines[-1].get("seed") if lines else None
    return _label(folder, root, lines) + ("" if seed is None else f", seed {seed}")


def _gap(folder: Path, root: Path, files: frozenset[str], has_results: bool) -> list[Gap]:
    """A run that wrote its configuration or progress, but no result."""
    progress = _read_json(folder / "progress.json") if "progress.json" in files else {}
    done, total = progress.get("done"), progress.get("total")
    cut_off = isinstance(done, int) and isinstance(total, int) and done < total
    expects_results = has_results is False and "config.yaml" in files and _is_evaluation(folder)
    if not (expects_results or (cut_off and not has_results)):
        return []
    detail = f"{progress.get('label', 'progress')}: {done} of {total} {progress.get('unit', 'step')}s done"
    return [
        Gap(
            name=_label(folder, root, []),
            state="unfinished" if cut_off else "no result",
            detail=detail if progress else "configured, but nothing was written to results.jsonl",
        )
    ]


def _is_jobs(folder: Path) -> bool:
    """Whether this is where a suite keeps its jobs' states, logs and replaced outputs."""
    return folder.name == "jobs" and next(folder.glob("*/step.json"), None) is not None


def _suite_of(root: Path) -> Path:
    """The suite's folder that `root` is a part of, else `root` itself."""
    return root.parent if _is_jobs(root.resolve().parent / "jobs") else root


def _job_gaps(jobs: Path, accounted: set[Path]) -> list[Gap]:
    """Steps of a suite (jobs/<step>/step.json) that did not end well; their outputs go into `accounted`."""
    gaps = []
    steps = [(_read_json(path), path.parent) for path in jobs.glob("*/step.json")]
    for step, folder in sorted(steps, key=lambda item: (item[0].get("order", 0), item[1].name)):
        if step.get("kind") == "report" or not step.get("name"):
            continue
        accounted.add(Path(str(step.get("output"))).resolve())
        if (folder / "done.json").is_file():
            continue
        failures = sorted(folder.glob("failure-*.json"), key=lambda p: p.stat().st_mtime)
        error = _read_json(failures[-1]).get("error", "") if failures else ""
        state = str(_read_json(folder / "state.json").get("state") or "")
        gaps.append(
            Gap(
                name=str(step["name"]),
                state="failed" if failures else state or "not started",
                detail=str(error).strip().splitlines()[-1]
                if error
                else f"no result of {step.get('module', 'it')}",
            )
        )
    return gaps


def _is_evaluation(folder: Path) -> bool:
    """Whether the folder's configuration is of a command that appends to results.jsonl."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and ({"protocol", "weights"} <= set(config) or "SOLVER" in config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@functools.cache
def _sha256_here(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)


def _why_stale(line: dict[str, Any]) -> str:
    """Compare the record with today's weights file and protocol file, where they are at hand."""
    weights = line.get("weights") or {}
    path = Path(str(weights.get("path") or ""))
    recorded = weights.get("sha256")
    if recorded and path.is_file():
        stat = path.stat()
        if _sha256_here(path, stat.st_size, stat.st_mtime_ns) != recorded:
            return "the weights file has changed since"
    protocol = line.get("protocol") or {}
    today = protocol_hash_today(protocol_name(protocol))
    if today and protocol.get("hash") and today != protocol["hash"]:
        return f"protocol {protocol_name(protocol)} has changed since"
    return ""


@functools.cache
def protocol_hash_today(name: str) -> str:
    """Hash of the protocol file of this name, empty where this version of the project has none."""
    try:
        from transfer.protocols import load_protocol

        return load_protocol(name).hash
    except (ValueError, ImportError):
        return ""
