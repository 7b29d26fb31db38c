"""Progress of a long command: a bar, lines in a log, and progress.json for other processes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.common.files import write_json
from pretrain.common.terminal import console, printable


class Progress:
    """A progress bar on a terminal, a line now and then in a log, and a small JSON file for other processes.

    The file (`progress.json`: label, done, total, unit, per_second, eta_s, values) is what `python -m slurm
    status` reads. Only rank 0 shows and writes.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str,
        unit: str = "step",
        start: int = 0,
        file: str | Path | None = None,
        every_s: float = 10.0,
    ) -> None:
        self.total, self.label, self.unit, self.done, self.file = total, label, unit, start, file
        self._start, self._began = start, time.monotonic()
        self._every_s, self._shown, self._written = every_s, self._began, 0.0
        self._main = int(os.environ.get("RANK", 0)) == 0
        self._values: dict[str, float | str] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._main and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def update(self, count: int = 1, **values: float | str) -> None:
        """Count `count` more units done; `values` (loss, images/s …) are shown beside the bar until others of
        the same names come."""
        self.done += count
        self._values |= values
        values = self._values
        if not self._main:
            return
        now = time.monotonic()
        last = self.done >= self.total
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=_spell(values))
        elif now - self._shown >= self._every_s or (last and now - self._began > 2):
            self._shown = now
            left = "" if last else f", {_duration(self.eta_s(now))} left"
            line = f"{self.label}: {self.done}/{self.total} {self.unit}s {_spell(values)}".rstrip()
            print(printable(line + left), file=sys.stderr, flush=True)
        if self.file and (now - self._written >= 1 or last):
            self._written = now
            with contextlib.suppress(OSError):  # a full disk stops no run for the sake of its progress
                write_json(self.file, {
                    "label": self.label, "done": self.done, "total": self.total, "unit": self.unit,
                    "per_second": (self.done - self._start) / max(now - self._began, 1e-9),
                    "eta_s": self.eta_s(now), "values": values,
                })  # fmt: skip

    def eta_s(self, now: float) -> float:
        """Seconds left at the mean rate so far."""
        gone = self.done - self._start
        return (self.total - self.done) * (now - self._began) / gone if gone > 0 else 0.0

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def counted(count: int, noun: str) -> str:
    """1 GPU, 2 GPUs, 3 batches, 4 epochs."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("tch") else "s")


def _spell(values: dict[str, float | str]) -> str:
    return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {seconds % 60:02d} s"
        if minutes
        else f"{seconds} s"
    )
