"""The config keys of semantic segmentation, and which of detectron2's have no effect there.

They are added to configs of this architecture alone: the hash of every other config stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from pretrain.common.errors import UserError

SEGMENTOR = "DilatedSegmentor"
"""MODEL.META_ARCHITECTURE of semantic segmentation."""
LINEAR = "build_linear_head"
DETECTORS = "it belongs to detectors, and this config is of semantic segmentation"
REFUSED = {
    "MODEL.MASK_ON": DETECTORS, "MODEL.KEYPOINT_ON": DETECTORS, "MODEL.RPN.": DETECTORS,
    "MODEL.PROPOSAL_GENERATOR.": DETECTORS, "MODEL.ANCHOR_GENERATOR.": DETECTORS,
    "MODEL.ROI_HEADS.": DETECTORS, "MODEL.ROI_BOX_HEAD.": DETECTORS,
    "MODEL.ROI_BOX_CASCADE_HEAD.": DETECTORS, "MODEL.ROI_MASK_HEAD.": DETECTORS,
    "MODEL.ROI_KEYPOINT_HEAD.": DETECTORS, "MODEL.RETINANET.": DETECTORS, "MODEL.FPN.": DETECTORS,
    "MODEL.PANOPTIC_FPN.": DETECTORS, "MODEL.LOAD_PROPOSALS": DETECTORS,
    "DATASETS.PROPOSAL_FILES_TRAIN": DETECTORS, "DATASETS.PROPOSAL_FILES_TEST": DETECTORS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": DETECTORS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": DETECTORS,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": DETECTORS, "DATALOADER.REPEAT_THRESHOLD": DETECTORS,
    "DATALOADER.REPEAT_SQRT": DETECTORS, "DATALOADER.SAMPLER_TRAIN": DETECTORS,
    "INPUT.MASK_FORMAT": DETECTORS, "TEST.DETECTIONS_PER_IMAGE": DETECTORS,
    "TEST.KEYPOINT_OKS_SIGMAS": DETECTORS, "VIS_PERIOD": DETECTORS,
    "TEST.AUG.": "TEST.FLIP and TEST.SLIDE are what semantic segmentation has",
    "MODEL.RESNETS.RES5_DILATION": "MODEL.RESNETS.OUTPUT_STRIDE says what is dilated",
    "MODEL.RESNETS.DEFORM_": "the dilated ResNet has plain convolutions",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": "MODEL.RESNETS.OUTPUT_STRIDE is the head's",
    "GLOBAL.HACK": "nothing reads it",
}  # fmt: skip
"""Keys without effect in semantic segmentation, or what they begin with, and why."""
OF_THE_FCN = dict.fromkeys(
    ("CONVS_DIM", "NUM_CONVS", "DILATION", "CONCAT_INPUT", "AUX_FEATURE", "AUX_DIM", "AUX_WEIGHT"),
    "the linear head has no convolution of neighbouring pixels",
)
CHOICES = {
    "MODEL.BACKBONE.NAME": ("build_dilated_resnet_backbone",),
    "MODEL.SEM_SEG_HEAD.NAME": ("build_fcn_head", LINEAR),
    "MODEL.RESNETS.OUTPUT_STRIDE": (8, 16, 32),
    "INPUT.CROP.TYPE": ("absolute",),
}
"""The values that semantic segmentation knows."""


def is_semantic(cfg: Mapping[str, Any]) -> bool:
    """Whether a config, or the content of its file, is of semantic segmentation."""
    return (cfg.get("MODEL") or {}).get("META_ARCHITECTURE") == SEGMENTOR


def add_keys(cfg: CfgNode) -> None:
    """Give detectron2's default config the keys of semantic segmentation, named as in its DeepLab and
    PointRend projects where those have them."""
    cfg.MODEL.META_ARCHITECTURE = SEGMENTOR
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    """Crops of which one class fills more are drawn anew, ten times at most."""
    cfg.INPUT.COLOR_AUG_SSD = False
    """Brightness, contrast, saturation and hue are changed at random."""
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.MODEL.RESNETS.OUTPUT_STRIDE = 8
    """Of the last feature map; stages beyond it are dilated instead of strided, as timm does it."""
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NUM_CONVS = 2
    head.DILATION = 1
    head.CONCAT_INPUT = False
    """One more convolution over the features and the head's own beside one another."""
    head.DROPOUT = 0.0
    """Share of the channels left out before the classifier."""
    head.ALIGN_CORNERS = False
    """How logits are resized."""
    head.AUX_FEATURE = "res4"
    head.AUX_DIM = 256
    head.AUX_WEIGHT = 0.0
    """Of the loss of a second head, used in training only; 0: there is none."""
    cfg.TEST.SLIDE = CfgNode({"WINDOW": 0, "STRIDE": 0})
    """Side and step of the windows whose logits are averaged, px of the resized image; 0: the whole image."""
    cfg.TEST.FLIP = False
    """Average with the prediction of the mirrored image."""


def check(cfg: CfgNode) -> None:
    """Raises UserError for a head, windows or crops that cannot be."""
    head, slide = cfg.MODEL.SEM_SEG_HEAD, cfg.TEST.SLIDE
    wanted = [*head.IN_FEATURES, *([head.AUX_FEATURE] if head.AUX_WEIGHT else [])]
    missing = [name for name in wanted if name not in cfg.MODEL.RESNETS.OUT_FEATURES]
    if len(head.IN_FEATURES) != 1 or missing:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES {tuple(head.IN_FEATURES)} AUX_FEATURE {head.AUX_FEATURE}: "
            "wanted one feature for each head, of MODEL.RESNETS.OUT_FEATURES "
            f"{tuple(cfg.MODEL.RESNETS.OUT_FEATURES)}"
        )
    if not 0 <= head.DROPOUT < 1 or head.NUM_CONVS < 1:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.DROPOUT {head.DROPOUT} NUM_CONVS {head.NUM_CONVS}: wanted a share below "
            f"1, and at least one convolution (NAME {LINEAR} has none)"
        )
    if bool(slide.WINDOW) != bool(slide.STRIDE) or not 0 <= slide.STRIDE <= max(slide.WINDOW, 0):
        raise UserError(
            f"TEST.SLIDE.WINDOW {slide.WINDOW} STRIDE {slide.STRIDE}: wanted both 0, or steps of at most a "
            "window"
        )
    if 0 <= head.IGNORE_VALUE < head.NUM_CLASSES:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE {head.IGNORE_VALUE} is one of the {head.NUM_CLASSES} classes 0 "
            f"to {head.NUM_CLASSES - 1}: wanted a label that no class has, 255 in most sets"
        )
