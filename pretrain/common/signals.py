"""SIGTERM, SIGUSR2 and Ctrl-C as a flag that a loop reads between two steps.

Preemption, a time limit and an administrator's kill all say so by signal some seconds ahead. A loop asks
`stop.requested` after each step, saves, and leaves the `with` block by `stop.hand_over()`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, ClassVar

OWN_SIGNAL_WAIT_S = 10.0


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command continues it."""


class StopSignals:
    """Turn SIGTERM, SIGUSR2 and SIGINT into the flag `requested` for as long as the block lasts.

    A second Ctrl-C does not wait: it raises KeyboardInterrupt. A process that is deaf to Ctrl-C (a job, which
    whoever started it stops) stays so. Outside the main thread, where Python allows no handlers, the flag
    stays False.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
    heard: ClassVar[int | None] = None
    """The last of them that this process noted: an error that follows it may be of its making."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._earlier: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._earlier[number] = signal.signal(number, self._note)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._earlier[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received == number:
                raise KeyboardInterrupt
            print("saving; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        self.received = StopSignals.heard = number

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()

    def hand_over(self) -> None:
        """After saving: give the signal to whoever handled it before, or raise Stopped.

        Under submitit the earlier handler of SIGUSR2 asks for the job to be queued again. With several ranks
        one may be told before the others: a rank that stops because of another waits for its own signal.
        """
        deadline = time.monotonic() + OWN_SIGNAL_WAIT_S
        while self.received is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.received is None:
            raise Stopped("stopped because another rank was told to, with everything saved")
        earlier = self._earlier.get(self.received)
        self._restore()
        if callable(earlier):
            os.kill(os.getpid(), self.received)
        raise Stopped(f"stopped by {signal.Signals(self.received).name} with everything saved")
