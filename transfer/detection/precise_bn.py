"""PreciseBN: BatchNorm's running statistics computed anew over batches of their own before evaluation."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from pretrain.common.collectives import sum_over_ranks
from transfer.detection.batches import seed_of, train_loader

STREAM = 1_000_003  # added to the seed: PreciseBN sees images in another order than training


def precise_statistics(cfg: CfgNode, model: Any, *, seed: int) -> None:
    """Recompute BatchNorm's running statistics over TEST.PRECISE_BN.NUM_ITER batches, alike on all ranks.

    fvcore leaves every rank with its own (detectron2 issues 5398, 5409): means and mean squares are averaged.
    All ranks must call.
    """
    if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(model):
        return
    rank, world_size = comm.get_rank(), comm.get_world_size()
    torch.manual_seed(seed_of(seed + STREAM, 0, rank))
    batches = train_loader(cfg, seed=seed + STREAM, rank=rank, world_size=world_size, num_workers=0)
    with EventStorage():  # what the model notes on these batches is no training metric
        update_bn_stats(model, batches, cfg.TEST.PRECISE_BN.NUM_ITER)
    average_statistics(model)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give every rank the statistics of all ranks' batches together. All ranks must call."""
    world_size = comm.get_world_size()
    for norm in get_bn_modules(model):
        square = sum_over_ranks(norm.running_var + norm.running_mean**2) / world_size
        norm.running_mean.copy_(sum_over_ranks(norm.running_mean) / world_size)
        norm.running_var.copy_(square - norm.running_mean**2)
