"""Interleaved times, peak memory, the machine's name and Markdown tables."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
FRESH = multiprocessing.get_context("forkserver")
"""Processes of their own, forked by one that has done nothing but import the libraries."""
FRESH.set_forkserver_preload(["torchvision", "timm"])


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: the median of `repeats`, and the quartiles around it."""

    median_s: float
    lower_s: float
    upper_s: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours beside a plain reference on one case; both were measured in turns."""

    case: str
    reference: Timing
    ours: Timing
    speedup: float = field(init=False)
    reference_peak_bytes: int | None = None
    ours_peak_bytes: int | None = None
    memory_share: float | None = field(init=False)
    """Ours over the reference's peak extra memory."""
    target_speedup: float | None = None
    target_memory_share: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "speedup", self.reference.median_s / self.ours.median_s)
        both = self.reference_peak_bytes and self.ours_peak_bytes is not None
        share = self.ours_peak_bytes / self.reference_peak_bytes if both else None  # type: ignore[operator]
        object.__setattr__(self, "memory_share", share)

    @property
    def met(self) -> bool:
        """Whether every stated target holds."""
        fast = self.target_speedup is None or self.speedup >= self.target_speedup
        small = self.target_memory_share is None or (self.memory_share or 0) <= self.target_memory_share
        return fast and small


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures that are no comparison of two times."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str | float]]
    note: str = ""
    missed: int = 0
    """Rows that are beyond the limit they state."""


def interleave(
    steps: Mapping[str, Step],
    *,
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the steps in turns (a b, b a, a b …), so that what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.freeze()  # collecting looks at what the steps leave alone
    for turn in range(warm_up + repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            gc.collect()
            _synchronise()
            start = clock()
            steps[name]()
            _synchronise()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return {name: timing(values) for name, values in seconds.items()}


def timing(seconds: list[float]) -> Timing:
    """Median and quartiles."""
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return Timing(median_s=quarters[1], lower_s=quarters[0], upper_s=quarters[2], repeats=len(seconds))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_extra_bytes(
    make: Callable[..., Step], *args: Any, warm_up: Callable[..., Step] | None = None
) -> int:
    """Highest memory while `make(*args)()` runs, less what was held before, in a process of its own.

    On a GPU torch's allocator counts. On a CPU it is the process's resident set: the kernel's high-water
    mark, reset just before the call (Linux). `make` must be a module's function; what it builds is held
    before. `warm_up()()` runs first, to load libraries and start threads.
    """
    answers = FRESH.Queue()
    child = FRESH.Process(
        target=_measure_peak, args=(answers, torch.get_num_threads(), make, args, warm_up), daemon=True
    )
    child.start()
    peak = answers.get(timeout=600)
    child.join()
    return peak


def _measure_peak(answers: Any, threads: int, make: Callable[..., Step], args: Any, warm_up: Any) -> None:
    torch.set_num_threads(threads)
    if warm_up is not None:
        warm_up()()
    step = make(*args)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        answers.put(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    answers.put(max(_resident("VmHWM") - before, 0))


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_1min": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def as_record(title: str, comparisons: Sequence[Comparison], tables: Sequence[Table] = ()) -> dict[str, Any]:
    """Everything measured, as plain JSON values."""
    return {
        "title": title,
        "machine": machine(),
        "comparisons": [{**asdict(c), "met": c.met} for c in comparisons],
        "tables": [asdict(t) for t in tables],
    }


def as_markdown(record: dict[str, Any]) -> str:
    """The comparisons as one table (medians with quartiles, ratios, memory, targets), then the others."""
    where = record["machine"]
    lines = [
        f"# {record['title']}", "",
        f"{_machine_line(where)} Load {where['load_1min']}. Medians with quartiles, taken in turns.", "",
    ]  # fmt: skip
    if record["comparisons"]:
        lines += _comparison_lines(record["comparisons"])
    for table in record["tables"]:
        lines += [f"## {table['title']}", "", _row(table["columns"]), _row(["---"] * len(table["columns"]))]
        lines += [*map(_row, table["rows"]), "", *([table["note"], ""] if table["note"] else [])]
    return "\n".join(lines).rstrip("\n") + "\n"


def as_summary(records: Mapping[str, dict[str, Any]]) -> str:
    """All ratios of several benchmarks as one table, by the benchmarks' names."""
    rows = [("benchmark", "case", "speed-up", "memory share", "target"), ("---",) * 5]
    machines: dict[str, None] = {}
    for name, record in records.items():
        machines[_machine_line(record["machine"])] = None
        for c in record["comparisons"]:
            rows.append((name, c["case"], f"{c['speedup']:.2f}x", _share(c), _target(c)))
        for table in record["tables"]:
            beyond = f"{table['missed']} MISSED" if table["missed"] else ""
            rows.append((name, table["title"], f"see {name}.md", "", beyond))
    gpu = any(record["machine"]["gpu"] for record in records.values())
    lines = [
        "# Beside plain references",
        "",
        *machines,
        *([] if gpu else ["No GPU: its part was not measured."]),
    ]
    return "\n".join([*lines, "", *map(_row, rows)]) + "\n"


def _machine_line(where: Mapping[str, Any]) -> str:
    return f"{where['gpu'] or where['cpu']}, {where['threads']} thread(s), torch {where['torch']}."


def _comparison_lines(comparisons: list[dict[str, Any]]) -> list[str]:
    columns = (
        "case", "reference ms", "ours ms", "speed-up", "reference MiB", "ours MiB", "memory share", "target",
    )  # fmt: skip
    lines = [_row(columns), _row(["---"] * len(columns))]
    for c in comparisons:
        lines.append(
            f"| {c['case']} | {_ms(c['reference'])} | {_ms(c['ours'])} | {c['speedup']:.2f}x | "
            f"{_mib(c['reference_peak_bytes'])} | {_mib(c['ours_peak_bytes'])} | {_share(c)} | {_target(c)} |"
        )
    return [*lines, "", *[f"- {c['case']}: {c['note']}" for c in comparisons if c["note"]], ""]


def _row(cells: Sequence[str | float]) -> str:
    return f"| {' | '.join(c if isinstance(c, str) else f'{c:.3g}' for c in cells)} |"


def _ms(timing: dict[str, float]) -> str:
    low, middle, high = (1e3 * timing[k] for k in ("lower_s", "median_s", "upper_s"))
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


def _share(c: dict[str, Any]) -> str:
    return "" if c["memory_share"] is None else f"{c['memory_share']:.2f}"


def _target(c: dict[str, Any]) -> str:
    wanted = []
    if c["target_speedup"] is not None:
        wanted.append(f"≥ {c['target_speedup']:.2g}x")
    if c["target_memory_share"] is not None:
        wanted.append(f"≤ {c['target_memory_share']} of the memory")
    return f"{', '.join(wanted)}: {'met' if c['met'] else 'MISSED'}" if wanted else ""
