"""The two errors whose message is all a user needs to see; one line for a full disk or a killed process."""

from __future__ import annotations

import errno
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUTSIDE = (
    *DISK_FULL,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
)
# What libraries in C++ and Rust say where Python would have raised OSError.
FULL_IN_WORDS = re.compile(r"No space left on device|os error 28\b|Disk quota exceeded|File too large")
WRITER_FAILED = re.compile(
    r"(PytorchStreamWriter|inline_container).*(failed|unexpected pos)|file write failed", re.S
)


class UserError(ValueError):
    """A mistake the user can mend: the message says what we got, what we wanted and what to do."""


class RunFailed(RuntimeError):
    """A run that cannot go on for a reason that its message gives in full: exit code 1, no traceback."""


def worker_failure(error: RuntimeError) -> str | None:
    """What to say where PyTorch's loader lost a worker process or waited for one in vain; else None."""
    said = str(error).strip()
    if not said.startswith("DataLoader "):
        return None
    first = said.splitlines()[0].split(". ")[0].rstrip(". ")
    if "timed out" in first:
        return f"{first}: does the disk with the images still answer?"
    return (
        f"{first}: was memory short? Fewer --workers (0: none), a smaller batch or more memory may help; run "
        "the same command again to go on"
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room to write; libraries say it in words of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    return bool(FULL_IN_WORDS.search(str(error)))


def gpu_full(error: BaseException) -> str | None:
    """What to say of torch.OutOfMemoryError, looked for by its name, as PyTorch loads slowly; else None."""
    if type(error).__name__ != "OutOfMemoryError":
        return None
    return f"the GPU's memory does not suffice ({'. '.join(str(error).split('. ')[:2])})"


def outside_reason(error: BaseException) -> str | None:
    """One line for what the outside world did to a run: a full disk, a killed process. None for others.

    An error's causes are looked at as well.
    """
    cause: BaseException | None = error
    while cause is not None:
        place = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
        if is_disk_full(cause):
            return f"{place}the disk is full; what was saved is kept: free some space and run it again"
        if isinstance(cause, OSError) and cause.errno in OUTSIDE:
            return f"{place}{cause.strerror}"
        if isinstance(cause, RuntimeError) and WRITER_FAILED.search(str(cause)):
            first = str(cause).splitlines()[0]
            return f"a file could not be written, is the disk or a quota full? ({first})"
        if full := gpu_full(cause):
            return (
                f"{full}; a smaller batch takes less, another process may hold some; what was saved is kept"
            )
        cause = cause.__cause__ or cause.__context__
    return None
