"""Loader workers: pipes where shared memory is short, one line where a worker dies or hangs."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from pretrain.common.cli import EXIT_FAILED, run
from pretrain.common.errors import RunFailed
from pretrain.data import workers
from pretrain.data.images import BrokenImage
from pretrain.data.workers import fits_shared_memory, load


class Squares(Dataset[Any]):
    """Number i as a tensor of i squared; -1 kills its worker, -2 hangs, -3 is a broken image."""

    def __getitem__(self, i: int) -> torch.Tensor:
        if i == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if i == -2:
            threading.Event().wait(600)
        if i == -3:
            raise BrokenImage("a.jpg: not a readable image (for the test)")
        return torch.tensor([i * i])


def squares(batches: list[list[int]], count: int, size: int = 8) -> list[list[int]]:
    made = load(Squares(), batches, workers=count, collate=torch.cat, batch_bytes=size)
    return [batch.tolist() for batch in made]


@pytest.mark.parametrize(("count", "size"), [(0, 10**15), (2, 8), (2, 10**15)])
def test_batches_are_the_same_by_every_way(count: int, size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert squares([[1, 2], [3], [4, 5]], count, size) == [[1, 4], [9], [16, 25]]
    piped = count > 0 and size > 10**12
    assert ("come through pipes" in caplog.text and "--shm-size" in caplog.text) is piped


def test_pipes_need_no_shared_memory() -> None:
    """The batch comes over as bytes: no tensor of it is in shared memory."""
    made = load(Squares(), [[3]], workers=1, collate=torch.cat, batch_bytes=10**15)
    assert not next(made).is_shared()
    assert next(load(Squares(), [[3]], workers=1, collate=torch.cat, batch_bytes=8)).is_shared()


def test_what_is_made_ahead_must_fit_for_all_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path))
    assert fits_shared_memory(free // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert not fits_shared_memory(free // 2)
    monkeypatch.setattr(workers, "SHARED_MEMORY", str(tmp_path / "none"))
    assert not fits_shared_memory(1)


def test_a_killed_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        squares([[1], [-1], [2]], 1)

    assert run(main, []) == EXIT_FAILED
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "DataLoader worker (pid" in line and "Fewer --workers" in line


def test_a_worker_that_gives_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE_S", 1.0)
    with pytest.raises(RunFailed, match=r"timed out after 1\.0 seconds: does the disk"):
        squares([[-2]], 1)


@pytest.mark.parametrize("count", [0, 1])
def test_a_broken_image_is_its_own_message(count: int) -> None:
    with pytest.raises(BrokenImage, match=r"^a\.jpg: not a readable image \(for the test\)$"):
        squares([[-3]], count)


def test_other_errors_stay_what_they_are() -> None:
    class Wrong(Dataset[Any]):
        def __getitem__(self, i: int) -> torch.Tensor:
            raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours") as caught:
        list(load(Wrong(), [[0]], workers=1, collate=torch.cat, batch_bytes=8))
    assert not isinstance(caught.value, RunFailed)
