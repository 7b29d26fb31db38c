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
ECHO_S = 2.0  # a scheduler may send the same signal to a job's script and to its step: one request
REQUEUE_WAIT_S = 60.0  # half of what a job is given between SIGUSR2 and its end (slurm/steps/resources.py)


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command continues it."""


class StopSignals:
    """Turn SIGTERM, SIGUSR2 and SIGINT into the flag `requested` for as long as the block lasts.

    A second signal leaves at once, without saving: Ctrl-C raises KeyboardInterrupt, the others are handed
    over. So is SIGUSR2 where the loop has not come round to it within REQUEUE_WAIT_S: a job that hangs is
    queued again all the same. Processes that ignore SIGINT (a job, which whoever started it stops) keep
    ignoring it. Outside the main thread, where Python allows no handlers, the flag stays False.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
    heard: ClassVar[int | None] = None
    """The last of them that this process noted: an error that follows it may be of its making."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._earlier: dict[int, Any] = {}
        self._overdue: threading.Timer | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal asked to stop: save, then call `hand_over`."""
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
        now = time.monotonic()
        if self.received is not None:
            if number == self.received == signal.SIGINT:
                raise KeyboardInterrupt
            if now - self._received_at > ECHO_S:
                self._leave(number, "without saving: what was saved before is kept")
            return
        if number == signal.SIGINT:
            print("saving; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        self.received = StopSignals.heard = number
        self._received_at = now
        if number == signal.SIGUSR2 and callable(self._earlier.get(number)):
            self._overdue = threading.Timer(REQUEUE_WAIT_S, os.kill, (os.getpid(), number))
            self._overdue.daemon = True
            self._overdue.start()

    def _leave(self, number: int, how: str) -> None:
        """Give the signal to whoever handled it before, or raise Stopped."""
        earlier = self._earlier.get(number)
        self._restore()
        if callable(earlier):
            os.kill(os.getpid(), number)
        raise Stopped(f"stopped by {signal.Signals(number).name} {how}")

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()
        if self._overdue is not None:
            self._overdue.cancel()

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
        self._leave(self.received, "with everything saved")

    def hand_over_together(self) -> None:
        """`hand_over` where all ranks stop at one point, told or not: none waits for a signal of its own."""
        self.received = self.received or int(self.SIGNALS[0])
        self.hand_over()
