"""Command lines as people write them: see `pretrain.common.word_lists`."""

from pretrain.common.word_lists import spread

__all__ = ["spread"]
