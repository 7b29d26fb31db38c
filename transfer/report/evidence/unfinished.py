"""What was planned or started and has no result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pretrain.common.files import read_json
from pretrain.common.output_folder import read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Something that was started or planned and has no result."""

    name: str
    state: str
    detail: str


def suite_of(root: Path) -> Path:
    """The suite's folder that `root` is a part of, else `root` itself."""
    return root.parent if is_jobs(root.resolve().parent / "jobs") else root


def is_jobs(folder: Path) -> bool:
    """Whether this is where a suite keeps its jobs' states, logs and replaced outputs."""
    return folder.name == "jobs" and next(folder.glob("*/step.json"), None) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """How long a finished step of a suite took on how many ranks."""

    name: str
    kind: str
    output: Path
    seconds: float
    ranks: int


def job_times(jobs: Path) -> list[StepTime]:
    """Finished steps of a suite in the graph's order, its report left out."""
    times = []
    for step, folder in _steps(jobs):
        seconds = _number(read_json(folder / "done.json").get("seconds"), -1)
        if seconds >= 0:
            ranks = _number(read_json(folder / "state.json").get("ranks"), 1) or 1
            output = Path(str(step.get("output"))).resolve()
            kind = str(step.get("kind") or "")
            times.append(
                StepTime(name=str(step["name"]), kind=kind, output=output, seconds=seconds, ranks=ranks)
            )
    return times


def _steps(jobs: Path) -> list[tuple[dict[str, Any], Path]]:
    """Every jobs/<step>/step.json but the report's, with its folder."""
    steps = [(read_json(path), path.parent) for path in jobs.glob("*/step.json")]
    steps = [(step, folder) for step, folder in steps if step.get("name") and step.get("kind") != "report"]
    return sorted(steps, key=lambda item: (_number(item[0].get("order")), item[1].name))


def _number(value: Any, otherwise: int = 0) -> Any:
    """`value` where it is a number that can be computed with."""
    return value if type(value) in (int, float) and abs(value) < 1e15 else otherwise


def job_gaps(jobs: Path, accounted: set[Path]) -> list[Gap]:
    """Steps of a suite (jobs/<step>/step.json) that did not end well; their outputs go into `accounted`."""
    gaps = []
    for step, folder in _steps(jobs):
        accounted.add(Path(str(step.get("output"))).resolve())
        if (folder / "done.json").is_file():
            continue
        failures = sorted(folder.glob("failure-*.json"), key=lambda p: p.stat().st_mtime)
        error = read_json(failures[-1]).get("error", "") if failures else ""
        noted = read_json(folder / "state.json")
        never = noted.get("state") in ("skipped", "stopped") and not noted.get("starts")
        state = "" if never else str(noted.get("state") or "")
        gaps.append(
            Gap(
                name=str(step["name"]),
                state="failed" if failures else state or "not started",
                detail=_why(str(error), state, step),
            )
        )
    return gaps


def _why(error: str, state: str, step: dict[str, Any]) -> str:
    if error.strip():
        return error.strip().splitlines()[-1]
    waited = step.get("depends_on")
    waits = ", ".join(map(str, waited)) if isinstance(waited, list) else ""
    return "see its log" if state else f"comes after {waits}" if waits else "not started yet"


def run_gaps(folder: Path, name: str, files: frozenset[str]) -> list[Gap]:
    """A run that wrote its configuration or progress, but no result."""
    progress = read_json(folder / "progress.json") if "progress.json" in files else {}
    done, total = progress.get("done"), progress.get("total")
    cut_off = isinstance(done, int) and isinstance(total, int) and done < total
    expected = "config.yaml" in files and _is_evaluation(folder)
    if "results.jsonl" in files or not (expected or cut_off):
        return []
    detail = f"{progress.get('label', 'progress')}: {done} of {total} {progress.get('unit', 'step')}s done"
    return [
        Gap(
            name=name,
            state="unfinished" if cut_off else "no result",
            detail=detail if progress else "configured, but nothing was written to results.jsonl",
        )
    ]


def _is_evaluation(folder: Path) -> bool:
    """Whether the folder's configuration is of a command that appends to results.jsonl."""
    config = read_config(folder)
    return {"protocol", "weights"} <= set(config) or "SOLVER" in config
