"""What is doubtful about a loaded backbone's BatchNorm statistics, in words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transfer.checkpoints.backbone import Backbone
from transfer.checkpoints.families.match import COUNTER

NEVER_TRAINED = (
    "never trained: every running mean of BatchNorm is 0 and every counter 0, as in a freshly initialised "
    "network (or one saved without its buffers)"
)


def never_trained(backbone: Backbone) -> bool:
    """Whether BatchNorm never saw an image: every running mean is 0 and every counter is 0.

    PyTorch starts there (mean 0, variance 1, counter 0) and leaves it with the first training batch, so such
    a network is freshly initialised, or was saved without its buffers. Files without counters (PyTorch before
    0.4.1) go by their means. False for raw pixels and for a network without running means.
    """
    return _untouched(_buffers(backbone))


def doubts(backbone: Backbone) -> list[str]:
    """What should make a user look again before judging this backbone, a sentence each; mostly none."""
    return doubts_of(_buffers(backbone))


def _untouched(buffers: Mapping[str, Tensor]) -> bool:
    means = [value for name, value in buffers.items() if name.endswith("running_mean")]
    counters = [value for name, value in buffers.items() if name.endswith(COUNTER)]
    return bool(means) and not any(bool(value.any()) for value in (*means, *counters))


def doubts_of(buffers: Mapping[str, Tensor]) -> list[str]:
    """The same by a state dict's buffers under timm's names; other keys are ignored."""
    found = []
    if _untouched(buffers):
        found.append(NEVER_TRAINED)
    variances = {
        name.removesuffix("running_var").rstrip("."): value
        for name, value in buffers.items()
        if name.endswith("running_var")
    }
    negative = [name for name, value in variances.items() if bool((value < 0).any())]
    if negative:
        swapped = all(bool((buffers[f"{name}.running_mean"] >= 0).all()) for name in negative)
        layers = f"{', '.join(negative[:3])}{' ...' if len(negative) > 3 else ''}"
        found.append(
            f"negative running variances in {len(negative)} of {len(variances)} BatchNorm layers ({layers}): "
            + (
                "running mean and running variance look swapped"
                if swapped
                else "no training gives these; the file is damaged or wrongly converted"
            )
        )
    elif variances and not any(bool(value.any()) for value in variances.values()):
        found.append("every running variance of BatchNorm is 0: the file is damaged or wrongly converted")
    return found


def _buffers(backbone: Backbone) -> dict[str, Tensor]:
    if backbone.model is None:
        return {}
    return {name: value.detach() for name, value in backbone.model.named_buffers() if torch.is_tensor(value)}
