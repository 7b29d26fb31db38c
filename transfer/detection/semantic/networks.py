"""Networks that label every pixel: a dilated ResNet, FCN and linear heads, whole images and windows.

Importing this module registers them under the names that configs have. N images, C channels, K classes, H and
W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_backbone,
    build_resnet_backbone,
    build_sem_seg_head,
)
from torch import Tensor, nn


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """detectron2's ResNet whose last feature map has MODEL.RESNETS.OUTPUT_STRIDE."""
    return dilate(build_resnet_backbone(cfg, input_shape), cfg.MODEL.RESNETS.OUTPUT_STRIDE)


def dilate(resnet: Any, output_stride: int) -> nn.Module:
    """Let the stages beyond `output_stride` keep their resolution, their 3x3 convolutions dilated instead.

    As timm's ResNets and mmsegmentation's with contract_dilation: the first convolution of such a stage still
    has the dilation of the stage before (https://arxiv.org/abs/1705.09914, and
    https://github.com/huggingface/pytorch-image-models/blob/v1.0.9/timm/models/resnet.py, make_blocks).
    detectron2's own DeepLab ResNet dilates it as the others, and knows no BasicBlock.
    """
    stride, dilation = resnet.stem.stride, 1
    for name, stage in zip(resnet.stage_names, resnet.stages):
        before = dilation
        if stage[0].stride > 1 and stride >= output_stride:
            dilation *= stage[0].stride
            stage[0].stride = 1
            for conv in (m for m in stage[0].modules() if isinstance(m, nn.Conv2d)):
                conv.stride = (1, 1)
        stride *= stage[0].stride
        wide = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        for number, conv in enumerate(wide):
            by = dilation if number else before
            conv.dilation = conv.padding = (by, by)
        resnet._out_feature_strides[name] = stride
    return resnet


class FCN(nn.Module):
    """3x3 convolutions with norm and ReLU; `concat`: one more, over input and output together."""

    def __init__(
        self, channels: int, dim: int, *, convs: int, dilation: int, concat: bool, norm: str
    ) -> None:
        super().__init__()

        def conv(before: int, dilation: int = 1) -> nn.Module:
            layer = Conv2d(
                before, dim, kernel_size=3, padding=dilation, dilation=dilation, bias=not norm,
                norm=get_norm(norm, dim), activation=F.relu,
            )  # fmt: skip
            weight_init.c2_msra_fill(layer)
            return layer

        self.convs = nn.Sequential(*(conv(dim if i else channels, dilation) for i in range(convs)))
        self.joined = conv(channels + dim) if concat else None

    def forward(self, x: Tensor) -> Tensor:
        """N x channels x h x w to N x dim x h x w."""
        y = self.convs(x)
        return y if self.joined is None else self.joined(torch.cat([x, y], dim=1))


class PixelHead(nn.Module):
    """`body` on one feature map, dropout of whole channels, and a 1x1 convolution as classifier."""

    def __init__(
        self,
        feature: str,
        body: nn.Module,
        channels: int,
        cfg: CfgNode,
        *,
        auxiliary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.feature, self.body, self.auxiliary = feature, body, auxiliary
        self.dropout = nn.Dropout2d(cfg.MODEL.SEM_SEG_HEAD.DROPOUT)
        self.predictor = Conv2d(channels, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits, N x K x h x w of the feature map."""
        return self.predictor(self.dropout(self.body(features[self.feature])))


@SEM_SEG_HEADS_REGISTRY.register()
def build_fcn_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> PixelHead:
    """MODEL.SEM_SEG_HEAD.NUM_CONVS convolutions of CONVS_DIM; with AUX_WEIGHT one of one on AUX_FEATURE."""
    head = cfg.MODEL.SEM_SEG_HEAD
    (feature,) = head.IN_FEATURES
    auxiliary = None
    if head.AUX_WEIGHT:
        channels = input_shape[head.AUX_FEATURE].channels
        body = FCN(channels, head.AUX_DIM, convs=1, dilation=1, concat=False, norm=head.NORM)
        auxiliary = PixelHead(head.AUX_FEATURE, body, head.AUX_DIM, cfg)
    body = FCN(
        input_shape[feature].channels, head.CONVS_DIM, convs=head.NUM_CONVS, dilation=head.DILATION,
        concat=head.CONCAT_INPUT, norm=head.NORM,
    )  # fmt: skip
    return PixelHead(feature, body, head.CONVS_DIM, cfg, auxiliary=auxiliary)


@SEM_SEG_HEADS_REGISTRY.register()
def build_linear_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> PixelHead:
    """BatchNorm and the classifier: what features hold that a linear map can read."""
    (feature,) = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES
    channels = input_shape[feature].channels
    return PixelHead(feature, get_norm(cfg.MODEL.SEM_SEG_HEAD.NORM, channels), channels, cfg)


@META_ARCH_REGISTRY.register()
class DilatedSegmentor(nn.Module):
    """Backbone and head; detectron2's SemanticSegmentor with an auxiliary head, padding to the crop's size,
    windows and mirrored images.

    The loss is the mean over all pixels, those without a label counted as 0, as mmsegmentation's
    (https://github.com/open-mmlab/mmsegmentation/blob/v1.2.2/mmseg/models/losses/cross_entropy_loss.py).
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.sem_seg_head = build_sem_seg_head(cfg, self.backbone.output_shape())
        for name, values in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        head = cfg.MODEL.SEM_SEG_HEAD
        self.ignored, self.align_corners = head.IGNORE_VALUE, head.ALIGN_CORNERS
        self.weights = {"": head.LOSS_WEIGHT, "_aux": head.AUX_WEIGHT}
        self.crop = tuple(map(int, cfg.INPUT.CROP.SIZE)) if cfg.INPUT.CROP.ENABLED else (0, 0)
        self.window, self.stride, self.flip = cfg.TEST.SLIDE.WINDOW, cfg.TEST.SLIDE.STRIDE, cfg.TEST.FLIP

    def forward(self, batch: Sequence[Mapping[str, Any]]) -> Any:
        """In training the losses of "image" (C x h x w) and "sem_seg" (h x w); otherwise for each image
        {"sem_seg": scores, K x height x width}."""
        if self.training:
            return self.losses(batch)
        return [{"sem_seg": self.scores(record)} for record in batch]

    def losses(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Cross-entropy of the head and, where there is one, of the auxiliary head."""
        images = [self._normalized(record) for record in batch]
        labels = [record["sem_seg"].to(images[0].device) for record in batch]
        height = max(self.crop[0], *(x.shape[-2] for x in images))
        width = max(self.crop[1], *(x.shape[-1] for x in images))

        def joined(tensors: Sequence[Tensor], value: float) -> Tensor:
            return torch.stack([
                F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors
            ])  # fmt: skip

        features, target = self.backbone(joined(images, 0)), joined(labels, self.ignored)
        heads = {"": self.sem_seg_head, "_aux": self.sem_seg_head.auxiliary}
        return {
            f"loss_sem_seg{name}": self.weights[name] * F.cross_entropy(
                self._resized(head(features).float(), (height, width)), target,
                ignore_index=self.ignored, reduction="none",
            ).mean()
            for name, head in heads.items() if head is not None
        }  # fmt: skip

    def scores(self, record: Mapping[str, Any]) -> Tensor:
        """K x height x width of the image file, whatever size the network is given it in: logits, or with
        TEST.FLIP the mean of both images' probabilities."""
        x = self._normalized(record)[None]
        size = (record.get("height", x.shape[-2]), record.get("width", x.shape[-1]))

        def of(x: Tensor) -> Tensor:
            return self._resized(self.logits(x), size)

        if not self.flip:
            return of(x)[0]
        return ((of(x).softmax(dim=1) + of(x.flip(-1)).flip(-1).softmax(dim=1)) / 2)[0]

    def logits(self, x: Tensor) -> Tensor:
        """N x K x H x W of normalized images; with windows their mean where these overlap.

        The last window of a row or column reaches back as far as it takes to be whole.
        """
        height, width = x.shape[-2:]
        if not self.window:
            return self._resized(self.sem_seg_head(self.backbone(x)).float(), (height, width))
        total: Tensor | None = None
        count = x.new_zeros(1, 1, height, width)
        for top in _starts(height, self.window, self.stride):
            for left in _starts(width, self.window, self.stride):
                place = (..., slice(top, top + self.window), slice(left, left + self.window))
                part = x[place]
                found = self._resized(self.sem_seg_head(self.backbone(part)).float(), part.shape[-2:])
                if total is None:
                    total = found.new_zeros(*found.shape[:2], height, width)
                total[place] += found
                count[place] += 1
        assert total is not None
        return total / count

    def _normalized(self, record: Mapping[str, Any]) -> Tensor:
        return (record["image"].to(self.pixel_mean.device) - self.pixel_mean) / self.pixel_std

    def _resized(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=self.align_corners)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover `length`."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
