"""Data-loading worker processes: how batches are passed on, how workers end, the error when one dies."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from pretrain.common.errors import RunFailed, worker_failure
from pretrain.data.images import BrokenImage

logger = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"
PARENT_LOOK_S = 5.0  # between two looks of a worker at the process it works for
PATIENCE_S = 900.0  # for a batch: more than the slowest disk takes, less than a night


def load(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    *,
    workers: int,
    collate: Callable[[Any], Any],
    batch_bytes: int,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> Iterator[Any]:
    """The collated `batches` of `dataset` in order, made ahead by `workers` processes (0: in this one).

    They come through shared memory, or through pipes where that has no room for what is made ahead, batches
    of `batch_bytes`. Raises BrokenImage for an unreadable image that the dataset does not handle, and
    RunFailed for a worker that was killed or gave nothing for PATIENCE_S.
    """
    through_pipes = workers > 0 and not fits_shared_memory((workers * prefetch + 1) * batch_bytes)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=batches, collate_fn=_Pickled(collate) if through_pipes else collate,  # type: ignore[arg-type]
        num_workers=workers, pin_memory=pin_memory, prefetch_factor=prefetch if workers else None,
        worker_init_fn=set_up_worker, timeout=PATIENCE_S if workers else 0,
    )  # fmt: skip
    return _checked(iter(loader), pickle.loads if through_pipes else lambda batch: batch)


def _checked(loader: Iterator[Any], read: Callable[[Any], Any]) -> Iterator[Any]:
    try:
        for batch in loader:
            yield read(batch)
        return
    except BrokenImage as error:
        failure: Exception = BrokenImage(str(error).rpartition("BrokenImage: ")[2].strip())
        error.__traceback__ = None  # break the reference cycle that delays the loader's shutdown
    except RuntimeError as error:
        said = worker_failure(error)
        if said is None:
            raise
        failure = RunFailed(said)
        error.__traceback__ = None
    raise failure


def fits_shared_memory(size: int) -> bool:
    """Whether `size` bytes for each rank of this node fit into shared memory; says so where they do not."""
    try:
        disk = os.statvfs(SHARED_MEMORY)
        free = disk.f_bavail * disk.f_frsize
    except OSError:
        free = 0
    needed = size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed <= 0.9 * free:
        return True
    logger.warning(
        "%s has %.0f MB free and the loader's workers need %.0f: batches come through pipes, which is slower "
        "(containers: docker run --shm-size=8g, or --ipc=host)", SHARED_MEMORY, free / 1e6, needed / 1e6,
    )  # fmt: skip
    return False


class _Pickled:
    """Collate to bytes, which need no shared memory."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> bytes:
        return pickle.dumps(self.collate(items))


def set_up_worker(_: int) -> None:
    """Start of a DataLoader's worker: signals are for the main process, OpenCV takes one thread."""
    # A signal to the whole group (SLURM, Ctrl-C) must not take the workers from under the last step.
    for number in (signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_follow_parent, daemon=True).start()
    cv2.setNumThreads(0)  # the workers are the threads


def _follow_parent() -> None:
    """End this worker when the process it works for terminates it or is gone.

    Otherwise it would wait for ever where an error kept the loader from closing in order, or where that
    process was killed before torch's own watch over it had begun.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while os.getppid() == parent.pid:
        heard = signal.sigtimedwait({signal.SIGTERM}, PARENT_LOOK_S)
        if heard is not None and heard.si_pid == parent.pid:
            break
    os._exit(0)
