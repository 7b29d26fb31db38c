"""A graph run on this machine: steps in order, as many at once as fit.

The jobs are submitit's own (its local executor), so they outlive this process: run again, it takes up those
that are still there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.common.machine import cores
from pretrain.common.terminal import console
from slurm.execution.job_server import JobServer
from slurm.execution.launch import handling, job_server, submit_local
from slurm.execution.snapshot import gpu_names
from slurm.state.local_process import LocalProcess
from slurm.state.step_files import Record, stop_waiting
from slurm.state.step_state import FAILED, QUEUED, RUNNING, WAITING, View, look, spell_seconds
from slurm.state.step_table import as_table, one_line
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import Resources

POLL_S = 0.5
SAY_EVERY_S = 10.0
STOP_WAIT_S = 90.0
SAY_AGAIN_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What steps share."""

    cpus: int
    gpus: tuple[int, ...] = ()

    @staticmethod
    def here() -> Machine:
        """The cores this process may use and the GPUs it sees."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            gpus = tuple(range(len(gpu_names())))
        else:
            gpus = tuple(int(x) for x in visible.split(",") if x.strip().isdigit())
        return Machine(cpus=cores(), gpus=gpus)

    def fit(self, asked: Resources) -> Resources:
        """The request cut to what is here: no more GPUs, tasks or CPUs than there are."""
        gpus = min(asked.gpus_per_node, len(self.gpus))
        tasks = min(asked.tasks_per_node or max(1, gpus), self.cpus)
        cpus = self.cpus if asked.cpus_per_task == "all" else min(tasks * asked.cpus_per_task, self.cpus)
        return replace(
            asked, nodes=1, gpus_per_node=gpus, tasks_per_node=tasks, cpus_per_task=max(1, cpus // tasks)
        )


@dataclass
class Running:
    """A step in flight and what it holds of the machine."""

    step: Step
    record: Record
    cpus: int
    gpus: tuple[int, ...]
    process: LocalProcess


@dataclass
class LocalRun:
    """The graph on this machine."""

    graph: Graph
    root: Path
    resources: dict[str, Resources]
    code: Path
    machine: Machine = field(default_factory=Machine.here)
    running: dict[str, Running] = field(default_factory=dict)
    ended: dict[str, bool] = field(default_factory=dict)
    server: JobServer = field(init=False)

    def run(self) -> list[View]:
        """Run what is not done yet and return how every step stands. Ctrl-C and SIGTERM stop all jobs."""
        self._take_stock()
        began = time.monotonic()
        self.server = job_server([s for s in self.graph if s.name not in self.ended], self.code)
        with (
            handling(_interrupt, signal.SIGTERM, signal.SIGHUP), contextlib.closing(self.server),
            self._shown() as show,
        ):  # fmt: skip
            try:
                while len(self.ended) < len(self.graph):
                    self._collect()
                    self._start_what_fits()
                    show(f"{spell_seconds(time.monotonic() - began)} gone")
                    time.sleep(POLL_S)
                show(f"{spell_seconds(time.monotonic() - began)}")
            except KeyboardInterrupt:
                self.stop()
                raise
        return self.views()

    def _take_stock(self) -> None:
        """What is done stays done; what an earlier call left running is waited for."""
        for step in self.graph:
            record = Record(self.root, step.name)
            record.clean()
            if record.is_done(self.graph.keys[step.name], step.makes) and not step.after:
                self.ended[step.name] = True
                continue
            process = LocalProcess.submitted(record.submitted)
            if process is not None and process.is_alive:
                fit = self.machine.fit(self.resources[step.kind])
                cpus = fit.tasks * int(fit.cpus_per_task)
                self.running[step.name] = Running(step, record, cpus, (), process)
        for step in self.graph:  # a report is made again unless nothing it tells about is new
            record = Record(self.root, step.name)
            unchanged = all(self.ended.get(name) for name in step.after)
            if step.after and unchanged and record.is_done(self.graph.keys[step.name], step.makes):
                self.ended[step.name] = True
        for order, step in enumerate(self.graph):
            if step.name not in self.ended and step.name not in self.running:
                record = Record(self.root, step.name)
                record.announce(step, self.graph.keys[step.name], order)

    def _collect(self) -> None:
        for name, run in list(self.running.items()):
            if not run.process.is_alive:
                del self.running[name]
                self.ended[name] = run.record.is_done(self.graph.keys[name], run.step.makes)

    def _start_what_fits(self) -> None:
        for step in self.graph:
            if step.name in self.ended or step.name in self.running:
                continue
            failed = [n for n in step.depends_on if self.ended.get(n) is False]
            if failed:
                self.ended[step.name] = False
                Record(self.root, step.name).set_state("skipped", lacks=failed)
                continue
            if not all(n in self.ended for n in (*step.depends_on, *step.after)):
                continue
            self._start_if_it_fits(step)

    def _start_if_it_fits(self, step: Step) -> None:
        fit = self.machine.fit(self.resources[step.kind])
        cpus = fit.tasks * int(fit.cpus_per_task)
        taken = {g for r in self.running.values() for g in r.gpus}
        free_gpus = [g for g in self.machine.gpus if g not in taken]
        free_cpus = self.machine.cpus - sum(r.cpus for r in self.running.values())
        if (cpus > free_cpus or fit.gpus_per_node > len(free_gpus)) and self.running:
            return
        gpus = free_gpus[: fit.gpus_per_node]
        submit_local(self.server, step, self.graph, self.root, fit, self.code, gpus, cpus)
        record = Record(self.root, step.name)
        process = LocalProcess.submitted(record.submitted)
        assert process is not None
        self.running[step.name] = Running(step, record, cpus, tuple(gpus), process)

    def stop(self) -> None:
        """Ask every job to save and leave; kill what does not."""
        # A second Ctrl-C does not leave the jobs behind.
        with handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            print("stopping the jobs; what they have saved is kept ...", file=sys.stderr, flush=True)
            end_jobs([run.process for run in self.running.values()])
            self._collect()
            stop_waiting(self.root)

    def views(self) -> list[View]:
        """How every step of the graph stands."""
        views = []
        for step in self.graph:
            if step.name not in self.ended and step.name not in self.running:
                views.append(View(name=step.name, state=WAITING))
                continue
            view = look(Record(self.root, step.name), "RUNNING" if step.name in self.running else None)
            views.append(replace(view, state=RUNNING) if view.state == QUEUED else view)
        return views

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Any]:
        """A live table on a terminal, else a line now and then and one for each step that ends."""
        if sys.stderr.isatty():
            from rich.live import Live

            with Live(console=console(stderr=True), refresh_per_second=2) as live:
                yield lambda title: live.update(as_table(self.views(), title))
            return
        said = dict.fromkeys(self.ended, True)
        last = -SAY_EVERY_S
        if said:
            print(f"{len(said)} of {len(self.graph)} steps were done before", file=sys.stderr, flush=True)

        def show(title: str) -> None:
            nonlocal last
            views = self.views()
            for view in views:
                if view.name in self.ended and view.name not in said:
                    said[view.name] = True
                    took = f" in {spell_seconds(view.seconds)}" if view.seconds is not None else ""
                    told = f": {view.detail}" if view.detail else ""
                    log = f" (log: {view.log})" if view.state == FAILED and view.log else ""
                    print(f"{view.name} {view.state}{took}{told}{log}", file=sys.stderr, flush=True)
            if time.monotonic() - last >= SAY_EVERY_S:
                last = time.monotonic()
                print(f"{title}: {one_line(views)}", file=sys.stderr, flush=True)

        yield show


def end_jobs(jobs: list[LocalProcess]) -> None:
    """SIGTERM to submitit's controllers, which hand it to their tasks; SIGKILL to what does not leave.

    A task that was still starting does not hear the first one, so it is said again.
    """
    deadline = time.monotonic() + STOP_WAIT_S
    said = 0.0
    while alive := [job for job in jobs if job.is_alive]:
        now = time.monotonic()
        for job in alive:
            if now > deadline:
                kill_job(job)
            elif now - said > SAY_AGAIN_S:
                job.send(signal.SIGTERM)
        said = now if now - said > SAY_AGAIN_S else said
        time.sleep(0.1)


def kill_job(job: LocalProcess) -> None:
    """SIGKILL to the controller and to all below it."""
    for process in [*(LocalProcess.of(pid) for pid in _below(job.pid)), job]:
        process.send(signal.SIGKILL)


def _below(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
