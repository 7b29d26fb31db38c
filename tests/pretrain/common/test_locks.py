"""One process at a time, on file systems with and without locks of the kernel's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.common import locks
from pretrain.common.locks import Held, Holder, hold, holder, process_start


def is_here(held: Holder | None) -> bool:
    """Whether this process holds it, since whatever second."""
    return held is not None and replace(held, since="") == replace(Holder.here(), since="")


@pytest.fixture(params=["flock", "lease"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file on a file system with flock, and on one that says it has none."""
    if request.param == "lease":

        def flock(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", flock)
    return tmp_path / "lock"


def child_that_holds(path: Path) -> int:
    """A process that holds the lock, with a child of its own that must not."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with hold(path):
            grandchild = os.fork()
            if grandchild == 0:
                time.sleep(60)
                os._exit(0)
            os.write(write, f"{grandchild}\n".encode())
            time.sleep(60)
        os._exit(0)
    global GRANDCHILD
    GRANDCHILD = int(os.read(read, 20))
    return pid


GRANDCHILD = 0


def test_the_holder_is_named_and_its_death_noticed_at_once(path: Path) -> None:
    pid = child_that_holds(path)
    try:
        with pytest.raises(Held) as held, hold(path):
            pass
        assert held.value.by is not None and held.value.by.pid == pid and held.value.by.is_here
        assert f"process {pid} on {os.uname().nodename} (" in str(held.value)
        assert holder(path) == held.value.by
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert holder(path) is None
        with hold(path):  # although a process that it started lives on, as a loader's workers do
            assert is_here(holder(path))
        assert not path.with_name("lock.by").exists()
    finally:
        os.kill(GRANDCHILD, signal.SIGKILL)


def test_one_lets_another_wait(path: Path) -> None:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        with hold(path):
            time.sleep(0.5)
        os._exit(0)
    while not path.with_name("lock.by").exists():
        time.sleep(0.01)
    with hold(path, wait_s=None):
        assert time.monotonic() - began >= 0.5
    os.waitpid(child, 0)


def test_a_lease_of_another_machine_is_taken_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "LEASE_S", 0.4)
    path = tmp_path / "lock"
    path.with_name("lock.lease").write_text(
        "filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=00\nduration=0.4\nstart=1\n"
    )
    gone = {**Holder.here().__dict__, "host": "elsewhere"}
    path.with_name("lock.by").write_text(json.dumps(gone))
    with hold(path):
        assert is_here(holder(path))


def test_a_number_that_came_round_is_another_process(tmp_path: Path) -> None:
    mine = Holder.here()
    assert mine.is_here and process_start(os.getpid()) == mine.started != ""
    assert not Holder(**{**mine.__dict__, "started": "1 boot"}).is_here
    assert not Holder(**{**mine.__dict__, "host": "elsewhere"}).is_here


def test_a_process_that_waits_to_be_buried_holds_nothing() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    alive = Holder(**{**Holder.here().__dict__, "pid": child, "started": process_start(child)})
    assert alive.is_here
    os.write(write, b"x")
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert process_start(child) == "" and not alive.is_here
    os.waitpid(child, 0)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), hold(tmp_path / "lock"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
