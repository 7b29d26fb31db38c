"""A process that has imported what the steps need, and forks each job of this machine: it starts at once.

Importing PyTorch, torchvision and timm takes several seconds of a core, for each of a suite's steps. The jobs
are submitit's all the same: its pickles and logs, its controller, its signals. Only where it would start a
new Python, `JobServer`'s process, which runs the pinned code, forks. Jobs outlive it, and the driver.
"""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from submitit.core.submission import process_job
from submitit.core.utils import JobPaths
from submitit.local.local import Controller, LocalExecutor, LocalJob

from pretrain.common.errors import RunFailed

FORK = multiprocessing.get_context("fork")
GO = "go"
BEHIND = {"pretrain.__main__": ("pretrain.train",), "transfer.train_net": ("transfer.detection.run",)}
"""What these modules import only once they are called."""


class JobServer:
    """The driver's end: the process starts with the first job and ends with `close`, or with the driver."""

    def __init__(self, command: list[str], modules: Iterable[str]) -> None:
        """`command` is Python in the pinned code's folder; `modules` are imported before the first job."""
        self._command = [*command, "-m", "slurm.execution.job_server", *sorted(set(modules))]
        self._process: subprocess.Popen[str] | None = None

    def start(self, folder: Path, environment: Mapping[str, str]) -> int:
        """The process id of a new controller of submitit's, for the job that lies in `folder`.

        It waits for `release`, and ends if the driver ends before: no job runs whose id nobody has noted.
        Raises RunFailed where the process cannot be had.
        """
        for _ in range(2):  # it may have been killed since the last job
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                self._ask(None)  # imports take seconds: whoever interrupts them leaves no job behind
            pid = self._ask({"folder": str(folder), "environment": dict(environment)})
            if pid:
                return int(pid)
            self.close()
        raise RunFailed(f"no job can be started: {' '.join(self._command)} ended by itself")

    def _ask(self, request: Any) -> str:
        assert self._process is not None and self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()

    def release(self) -> None:
        """Let the job that was started last begin."""
        self._ask(GO)

    def close(self) -> None:
        """End the process; its jobs go on."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class ForkingExecutor(LocalExecutor):
    """submitit's local executor, whose jobs a JobServer starts."""

    def __init__(self, folder: Path, server: JobServer, *, threads: int) -> None:
        super().__init__(folder)
        self.server, self.threads = server, threads

    def _submit_command(self, command: str) -> LocalJob[Any]:
        """The job, which waits for the server's `release`."""
        asked = self.parameters
        tasks = asked["tasks_per_node"]
        pid = self.server.start(self.folder, {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * asked["timeout_min"])),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(asked["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, asked["visible_gpus"])),
            "OMP_NUM_THREADS": str(self.threads),
        })  # fmt: skip
        return LocalJob(folder=self.folder, job_id=str(pid), tasks=list(range(tasks)))


def modules_of(modules: Iterable[str]) -> set[str]:
    """What is imported beforehand for steps that run these modules."""
    return {name for module in modules for name in (module, *BEHIND.get(module, ()))}


class Fork:
    """A function in a forked process that ends as a Python of its own does, with Popen's words for it."""

    def __init__(self, function: Callable[..., None], *given: Any) -> None:
        self._process = FORK.Process(target=_as_a_program, args=(function, *given))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkingController(Controller):
    """submitit's controller of one job, whose tasks are forked."""

    def start_tasks(self) -> None:
        """Fork them; each says on its own log files what it has to say."""
        self.folder.mkdir(exist_ok=True)
        paths = [JobPaths(self.folder, self.pid, rank) for rank in range(self.ntasks)]
        self.stdouts = [p.stdout.open("a") for p in paths]
        self.stderrs = [p.stderr.open("a") for p in paths]
        for rank, logs in enumerate(zip(self.stdouts, self.stderrs)):
            environment = {
                "SUBMITIT_LOCAL_LOCALID": str(rank), "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_JOB_ID": self.pid,
            }  # fmt: skip
            self.tasks.append(Fork(_task, self.folder, environment, logs))  # type: ignore[arg-type]


def _task(folder: Path, environment: Mapping[str, str], logs: tuple[TextIO, TextIO]) -> None:
    for number, log in enumerate(logs, start=1):
        os.dup2(log.fileno(), number)
    os.environ.update(environment)
    if "torch" in sys.modules:  # which has read the server's own number when it was imported
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    process_job(folder)


def _control(folder: Path, environment: Mapping[str, str], gate: tuple[int, int]) -> None:
    os.dup2(2, 1)  # the server's own is the driver's pipe
    os.close(gate[1])
    if not os.read(gate[0], 1):
        return
    os.environ.update(environment)
    ForkingController(folder).run()


def _as_a_program(function: Callable[..., None], *given: Any) -> None:
    for number in (signal.SIGCHLD, signal.SIGTERM):  # as the process that forked this one handles them
        signal.signal(number, signal.SIG_DFL)
    atexit._clear()  # what is left to do when that process ends
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        function(*given)
    finally:
        atexit._run_exitfuncs()


def main(modules: list[str]) -> None:
    """Import the modules, then fork a controller for each line of standard input and answer with its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it shares the driver's terminal
        for name in modules:
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # jobs that have ended leave no zombies
    waiting = -1
    while line := sys.stdin.readline():
        asked, answer = json.loads(line), None
        if asked == GO:
            os.write(waiting, b"x")
            os.close(waiting)
        elif asked is not None:
            gate = os.pipe()
            answer = Fork(_control, Path(asked["folder"]), asked["environment"], gate).pid
            os.close(gate[0])
            waiting = gate[1]
        print(answer, flush=True)
    os._exit(0)  # without waiting for the jobs


if __name__ == "__main__":
    main(sys.argv[1:])
