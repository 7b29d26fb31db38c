"""Corrupt images of a run: one warning each, and an error when there are too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from pretrain.common.collectives import any_rank, gather_objects
from pretrain.common.errors import RunFailed

logger = logging.getLogger(__name__)


class CorruptImages:
    """The image files that could not be read, over all ranks and the whole run, and how many may be."""

    def __init__(self, limit: int, before: Iterable[str] = ()) -> None:
        self.limit, self.images = limit, set(before)
        self._agreed = len(self.images)

    def note(self, messages: Iterable[str]) -> None:
        """What this rank could not read, told once each. Raises RunFailed beyond the limit."""
        for message in messages:
            if message not in self.images:
                self.images.add(message)
                logger.warning("skipped: %s", message)
                self._check(message)

    def agree(self) -> None:
        """Join the ranks' images. Raises RunFailed beyond the limit. All ranks must call."""
        if any_rank(len(self.images) > self._agreed):
            self.images = set().union(*gather_objects(self.images))
            self._agreed = len(self.images)
            self._check(max(self.images))

    def _check(self, last: str) -> None:
        if len(self.images) > self.limit:
            raise RunFailed(
                f"more than --max-broken-images {self.limit} images cannot be read; the last: {last}"
            )
