"""MoCo's R50-C4 head: detectron2's Res5ROIHeads with a BatchNorm after res5.

Importing this module registers the class under its name, as `MODEL.ROI_HEADS.NAME` needs it. The extra norm
lets a self-supervised res5, whose scale no classifier has fixed, be fine-tuned (He et al., "Momentum
Contrast", appendix; https://arxiv.org/abs/1911.05722).
"""

from __future__ import annotations

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Res5ROIHeads whose res5 ends in the norm that MODEL.RESNETS.NORM names (`roi_heads.res5.norm`)."""

    @classmethod
    def _build_res5_block(cls, cfg: Any) -> tuple[nn.Sequential, int]:
        """res5's blocks 0, 1, 2 under their own names, then `norm`."""
        blocks, out_channels = super()._build_res5_block(cfg)
        blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, out_channels))
        return blocks, out_channels
