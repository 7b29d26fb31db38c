"""The two errors whose message is all that a user needs to see."""

from __future__ import annotations


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
