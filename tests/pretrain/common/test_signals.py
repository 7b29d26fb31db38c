"""Stop signals: noted in the loop, handed over after saving."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.data import DataLoader

from pretrain.common import signals
from pretrain.common.signals import Stopped, StopSignals
from pretrain.data.workers import set_up_worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_becomes_a_flag_and_then_stopped(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name), StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        stop.hand_over()
    assert signal.getsignal(number) == before


def test_ctrl_c_saves_first_and_a_second_one_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        stop.hand_over()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt, match=r"^$"), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C was waited out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_second_signal_leaves_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name} without saving"), StopSignals() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # to the job's script and to its step: one request
        assert stop.requested
        stop._received_at -= 3
        os.kill(os.getpid(), number)
        pytest.fail("the second signal was waited out")
    assert signal.getsignal(number) == before


def test_a_job_that_hangs_is_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR2 before a time limit, and a loop that never asks for it: submitit's handler has its turn."""
    monkeypatch.setattr(signals, "REQUEUE_WAIT_S", 0.2)
    monkeypatch.setattr(signals, "ECHO_S", 0.1)

    def requeue(number: int, frame: object) -> None:
        raise SystemExit("queued again")

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit, match="queued again"), StopSignals():
            os.kill(os.getpid(), signal.SIGUSR2)
            threading.Event().wait(120)  # hangs
            pytest.fail("it was waited out")
        with pytest.raises(SystemExit), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            stop.hand_over()
        assert stop._overdue is not None and stop._overdue.finished.is_set()  # in time: nothing comes after
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_who_is_deaf_to_ctrl_c_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_earlier_handler_gets_the_signal_once_after_saving() -> None:
    """This is how submitit's handler, which asks for the job to be queued again, comes to its turn."""
    seen: list[str] = []

    def requeue(number: int, frame: object) -> None:
        seen.append("requeue")
        raise SystemExit(0)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            seen.append("saved")
            stop.hand_over()
        assert seen == ["saved", "requeue"]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with StopSignals() as stop:
            found.append(signal.getsignal(signal.SIGTERM))
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_a_command_stopped_after_saving_exits_with_75_and_says_how_to_go_on() -> None:
    program = (
        "import os, signal, sys\n"
        "from pretrain.common.cli import run\n"
        "from pretrain.common.signals import StopSignals\n"
        "def main(argv):\n"
        "    with StopSignals() as stop:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        stop.hand_over()\n"
        "sys.exit(run(main, []))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_starts_when_its_process_is_gone_already_ends() -> None:
    """Killed right after the fork, before torch's watch: such a worker would stay for ever."""
    fork = multiprocessing.get_context("fork")

    def work() -> None:
        time.sleep(1)
        set_up_worker(0)
        time.sleep(600)

    def start_and_die() -> None:
        fork.Process(target=work).start()
        os.kill(os.getpid(), signal.SIGKILL)

    ours, theirs = os.pipe()
    process = fork.Process(target=start_and_die)
    process.start()
    os.close(theirs)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    # The pipe ends when the last process that holds it does: the worker.
    assert select.select([ours], [], [], 60)[0] and os.read(ours, 1) == b""
    os.close(ours)


def test_a_loaders_worker_heeds_the_process_it_works_for_alone() -> None:
    """A signal from elsewhere, as SLURM sends it to all processes of a job, must not take it from a step."""
    loader = iter(DataLoader(list(range(8)), num_workers=1, worker_init_fn=set_up_worker))  # type: ignore[arg-type]
    next(loader)
    (worker,) = loader._workers
    for name in ("TERM", "INT", "USR2"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [int(batch) for batch in loader] == list(range(1, 8))
    worker.join(60)
    assert worker.exitcode == 0

    held = iter(DataLoader([0, 1], num_workers=1, worker_init_fn=set_up_worker))  # type: ignore[arg-type]
    next(held)
    (worker,) = held._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
