"""The two errors whose message is all that a user needs to see."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: the message says what we got, what we wanted and what to do."""


class RunFailed(RuntimeError):
    """A run that cannot go on for a reason that its message gives in full: exit code 1, no traceback."""
