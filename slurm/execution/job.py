"""One step as a submitit job: survives preemption, leaves a done marker or its real error.

One class for all steps. What a signal means here:

    SIGUSR2   time limit or preemption. A training loop saves and gives the signal back; submitit's
              handler calls `checkpoint()` and queues the job again, which goes on from its last checkpoint.
    SIGTERM   on SLURM a kill follows, and SLURM alone knows whether the job is queued again (preempted
              without a user signal, requeued by hand) or not (cancelled): save, then wait for the kill.
              On one machine it is a cancellation: save and leave.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.core.utils import DelayedSubmission, UncompletedJobError

from pretrain.common.cli import EXIT_STOPPED, EXIT_USAGE, log_level
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.locks import Held, hold
from pretrain.common.signals import Stopped, StopSignals
from slurm.execution.ranks import joined, rank_variables
from slurm.execution.snapshot import environment
from slurm.state.step_files import Record
from slurm.steps.graph import Step

logger = logging.getLogger(__name__)

KILL_WAIT_S = 20 * 60
LOCK_WAIT_S = 60
WAIT_MIN = {"knn": 24 * 60, "linear": 24 * 60}
"""How long ranks may wait for each other, by kind of step (else 30 minutes): rank 0 may be waiting for the
features that another job extracts, or fit alone."""


class StepFailed(RuntimeError):
    """A step did not finish; the message is its own last error line."""


class Job:
    """A step as a callable that submitit can pickle, run, checkpoint and queue again."""

    def __init__(
        self, step: Step, *, key: str, root: Path, needed: dict[str, str], max_requeues: int
    ) -> None:
        self.step, self.key, self.root, self.needed = step, key, root, needed
        self.max_requeues = max_requeues

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before it queues the job again: the state is in the command's own output."""
        self.record.set_state("requeued", ended_at=time.time())
        return DelayedSubmission(self)

    @property
    def record(self) -> Record:
        """The step's files in the suite's folder."""
        return Record(self.root, self.step.name)

    def __call__(self) -> str:
        """Run the step on this rank. Raises StepFailed or the command's own error, once it is noted."""
        import submitit

        env = submitit.JobEnvironment()
        os.environ.update(rank_variables(env))
        os.environ["BENCH_JOB_ID"] = env.job_id
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        attempt = f"{env.job_id}-{restarts}"
        _log_to_stderr()
        StopSignals.heard = None  # what came before this job began is not about it
        began = time.time()
        with _signals(lambda: self._stopping(env)):
            try:
                with self._only_one(env.global_rank):
                    if self.record.is_done(self.key, self.step.makes):
                        return "done before"
                    self._start(env, began, restarts)
                    rendezvous = self.record.folder / f"rendezvous-{attempt}.json"
                    with joined(env, rendezvous, timeout_min=WAIT_MIN.get(self.step.kind, 30)):
                        self._run()
                    self._check_made()
            except Stopped as stop:
                if env.global_rank == 0:
                    self.record.set_state("stopped", ended_at=time.time())
                if env.cluster == "slurm":
                    _wait_for_kill(str(stop))
                raise
            except Exception as error:
                if StopSignals.heard and not isinstance(error, UncompletedJobError):
                    # SLURM tells data workers and neighbours too: their end is no failure of this job.
                    logger.exception("error after %s", signal.Signals(StopSignals.heard).name)
                    os.kill(os.getpid(), StopSignals.heard)
                trace = None if isinstance(error, (UserError, StepFailed)) else traceback.format_exc()
                self.record.fail(attempt, _last_line(error), trace, env.global_rank)
                raise
        if env.global_rank == 0:
            self.record.finish(self.key, seconds=time.time() - began, job_id=env.job_id)
            self.record.set_state("done", ended_at=time.time())
        return "done"

    def _start(self, env: Any, began: float, restarts: int) -> None:
        """Rank 0 notes the start; every rank refuses to run on what is not there."""
        if env.global_rank == 0:
            before = self.record.state
            again = before.get("job_id") == env.job_id
            self.record.set_state(
                "running", job_id=env.job_id, host=env.hostname, pid=os.getpid(), started_at=began,
                ended_at=None, starts=before.get("starts", 0) + 1 if again else 1, ranks=env.num_tasks,
            )  # fmt: skip
            write_json(self.record.folder / "environment.json", environment())
        if restarts > self.max_requeues:
            raise StepFailed(
                f"queued again {restarts} times, more than max_requeues={self.max_requeues} allows; "
                "raise it in the profile and submit again to go on from the last checkpoint"
            )
        for name, key in self.needed.items():
            if not Record(self.root, name).is_done(key):
                raise StepFailed(
                    f"{self.step.name} needs {name}, which has not finished: submit the suite again"
                )

    def _stopping(self, env: Any) -> None:
        """SIGTERM, with everything saved: see this module's first lines."""
        if env.cluster != "slurm":
            raise Stopped("cancelled")
        if env.global_rank == 0:
            self.record.set_state("stopped", ended_at=time.time())
        _wait_for_kill("SIGTERM")

    @contextlib.contextmanager
    def _only_one(self, rank: int) -> Iterator[None]:
        """A second job of the same step, should there ever be one, waits and then finds it done."""
        if rank != 0:
            yield
            return
        lock = self.record.folder / "running.lock"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold(lock, wait_s=LOCK_WAIT_S))
            except Held as held:
                raise StepFailed(f"another job still runs {self.step.name}: {held}") from None
            yield

    def _run(self) -> None:
        """Call the command in this process; anything but success is raised."""
        main = importlib.import_module(self.step.module).main
        try:
            code = main(list(self.step.argv)) or 0
        except SystemExit as leaving:
            if leaving.code not in (0, None, EXIT_USAGE):
                raise  # submitit's handler leaves this way after it has queued the job again
            code = leaving.code or 0
        if code == EXIT_STOPPED:
            raise Stopped(f"{self.step.name} stopped with everything saved")
        if code != 0:
            raise StepFailed(_last_logged_line() or f"{self.step.command} ended with exit code {code}")

    def _check_made(self) -> None:
        missing = [str(p) for p in self.step.makes if not p.exists()]
        if missing:
            raise StepFailed(f"{self.step.command} said it was done but did not write {', '.join(missing)}")


@contextlib.contextmanager
def _signals(stopping: Callable[[], None]) -> Iterator[None]:
    """Handlers for SIGTERM and SIGUSR2 that leave forked children, data workers say, out of it."""
    own = os.getpid()
    requeue = signal.getsignal(signal.SIGUSR2)

    def on_usr2(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own and callable(requeue):
            requeue(number, frame)
            raise Stopped("asked to stop; rank 0 queues the job again")  # only ranks above 0 come here

    def on_term(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stopping()

    term = signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGUSR2, on_usr2)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, requeue)
        signal.signal(signal.SIGTERM, term)


def _wait_for_kill(why: str) -> None:
    """Leaving now would end the job for good; the one who stopped it kills it, and may queue it again."""
    logger.info("%s: waiting to be ended by SLURM", why)
    deadline = time.monotonic() + KILL_WAIT_S
    while time.monotonic() < deadline:
        time.sleep(1)


def _last_line(error: BaseException) -> str:
    """What a traceback's last line says, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, (StepFailed, UserError, UncompletedJobError)):
        return text
    return f"{type(error).__name__}: {text}"


def _last_logged_line() -> str:
    """The last line this process wrote to its standard error, where that is a file."""
    with contextlib.suppress(OSError), open(f"/proc/{os.getpid()}/fd/2", "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""


def _log_to_stderr() -> None:
    """The commands' own log lines, as on a terminal."""
    logging.basicConfig(
        level=log_level(),
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
