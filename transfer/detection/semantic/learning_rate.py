"""Learning rate schedules: detectron2's, and the polynomial one of semantic segmentation."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler, build_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

POLY = "WarmupPolyLR"
"""The name that detectron2's DeepLab project has for it."""


class Poly(ParamScheduler):
    """(1 - end)·(1 - t)^power + end of the base rate at the share t of training.

    mmsegmentation's `poly` with min_lr (https://github.com/open-mmlab/mmcv/blob/v1.7.1/mmcv/runner/hooks/lr_updater.py);
    DeepLab's with `end` 0. detectron2's DeepLab scheduler holds the last rate constant instead.
    """

    def __init__(self, power: float, end: float) -> None:
        self.power, self.end = power, end

    def __call__(self, where: float) -> float:
        """The multiplier at the share `where` of training, 0 to 1."""
        return (1 - self.end) * (1 - where) ** self.power + self.end


def build_schedule(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """SOLVER.LR_SCHEDULER_NAME of the config; WarmupPolyLR falls to SOLVER.BASE_LR_END."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != POLY:
        return build_lr_scheduler(cfg, optimizer)
    warm = WarmupParamScheduler(
        Poly(solver.POLY_LR_POWER, solver.BASE_LR_END / solver.BASE_LR), solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0), solver.WARMUP_METHOD, solver.RESCALE_INTERVAL,
    )  # fmt: skip
    return LRMultiplier(optimizer, multiplier=warm, max_iter=solver.MAX_ITER)
