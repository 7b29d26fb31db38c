"""Learning rate and EMA momentum of each step."""

from __future__ import annotations

import math


def lr_at(step: int, *, base: float, warmup: int, total: int, final_ratio: float = 0.001) -> float:
    """Linear warm-up to `base` over `warmup` steps, then a cosine to `final_ratio · base` at the last step.

    As in the released INTL code (main.py): step 0 has base / warmup, the last step the final value.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / max(total - warmup, 1)))
    return base * (cosine + final_ratio * (1 - cosine))


def ema_momentum_at(step: int, *, base: float, total: int) -> float:
    """From `base` at step 0 to 1 at `total`, by a cosine."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total))
