"""A process known by host, pid and start time, so that another of the same pid is not taken for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.common.files import whole_number
from pretrain.common.locks import process_start


@dataclass(frozen=True, kw_only=True)
class LocalProcess:
    """Host, process id, and when it started in which boot of that host."""

    host: str
    pid: int
    started: str
    """Start in clock ticks after boot, and the boot's own id."""

    @staticmethod
    def of(pid: int) -> LocalProcess:
        """The process that has this number on this machine now."""
        return LocalProcess(host=os.uname().nodename, pid=pid, started=process_start(pid))

    @staticmethod
    def submitted(sent: Mapping[str, Any]) -> LocalProcess | None:
        """The one that a step's submitted.json names; None for a step that was not started on a machine."""
        pid = whole_number(sent.get("job_id"))
        if sent.get("cluster") != "local" or pid is None:
            return None
        return LocalProcess(host=str(sent.get("host", "")), pid=pid, started=str(sent.get("started", "")))

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, and not on another that shares the folder."""
        return self.host == os.uname().nodename

    @property
    def is_alive(self) -> bool:
        """Whether that very process runs on this machine now, and is not a zombie."""
        return self.is_here and bool(self.started) and process_start(self.pid) == self.started

    def send(self, number: int) -> None:
        """Signal it, and no other process."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive:
                os.kill(self.pid, number)
