"""The dilated ResNet equals timm's, heads and losses are what their authors' are, windows cover the image."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.projects.deeplab.lr_scheduler import WarmupPolyLR
from torch import nn

from pretrain.common.errors import UserError
from transfer.conversion import layout
from transfer.detection.config import load_config
from transfer.detection.semantic import networks
from transfer.detection.semantic.learning_rate import build_schedule

TINY = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "8", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
LINEAR = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]


def timm_features(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    found = {}
    for number, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), 2):
        y = found[f"res{number}"] = layer(y)
    return found


@pytest.mark.parametrize(("arch", "stride"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 8)])
@torch.no_grad()
def test_the_dilated_resnet_equals_timms_through_converted_weights(arch: str, stride: int) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(arch, num_classes=0, output_stride=stride).eval()
    weights = layout.to_detectron2(theirs.state_dict())
    words = [w for k, v in layout.shape_of(weights).options().items() for w in (k, str(v))]
    words += ["MODEL.RESNETS.OUTPUT_STRIDE", str(stride), "MODEL.RESNETS.OUT_FEATURES"]
    words += ["('res2','res3','res4','res5')", *TINY]
    cfg = load_config("small_R18_FCN", words)
    ours = build_model(cfg).backbone.eval()
    ours.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()}, strict=True)
    x = torch.randn(2, 3, 48, 64)
    wanted, found = timm_features(theirs, x), ours(x)
    assert found["res5"].shape[-2:] == (48 // stride, 64 // stride)
    for name, y in wanted.items():
        torch.testing.assert_close(found[name], y, rtol=1e-5, atol=1e-5 * y.abs().max().item())
        assert ours.output_shape()[name].stride == 48 // y.shape[-2]
    if arch == "resnet50":
        return
    undilated = build_model(load_config("small_R18_FCN", [*words, "MODEL.RESNETS.OUTPUT_STRIDE", "32"]))
    undilated.backbone.eval().load_state_dict(ours.state_dict())
    other = F.interpolate(undilated.backbone(x)["res5"], size=wanted["res5"].shape[-2:])
    assert (other - wanted["res5"]).abs().max() > 0.1 * wanted["res5"].abs().max()  # the test can fail


def small(*words: str, file: str = "small_R18_FCN") -> tuple[CfgNode, Any]:
    torch.manual_seed(0)
    cfg = load_config(file, [*(TINY if "FCN" in file else LINEAR), *words])
    return cfg, build_model(cfg)


def test_heads_are_those_of_the_papers() -> None:
    fcn = small()[1].sem_seg_head
    kernels = [tuple(m.weight.shape) for m in fcn.modules() if isinstance(m, nn.Conv2d)]
    # two convolutions, one over both, the classifier; of the auxiliary head on res4 one and its classifier
    assert sorted(kernels) == sorted([
        (8, 512, 3, 3), (8, 8, 3, 3), (8, 520, 3, 3), (3, 8, 1, 1), (32, 256, 3, 3), (3, 32, 1, 1)
    ])  # fmt: skip
    moco = load_config("sem_seg_voc12_R50_FCN_513_30k", [])
    body = networks.build_fcn_head(moco, {"res5": networks.ShapeSpec(channels=2048, stride=16)}).body
    assert [(c.weight.shape[0], c.dilation, c.bias) for c in body.convs] == [(256, (6, 6), None)] * 2
    linear = small(file="small_R18_linear")[1]
    assert [type(m).__name__ for m in linear.sem_seg_head.children()] == [
        "NaiveSyncBatchNorm",
        "Dropout2d",
        "Conv2d",
    ]
    trained = {n for n, p in linear.named_parameters() if p.requires_grad}
    assert trained == {
        f"sem_seg_head.{n}" for n in ("body.weight", "body.bias", "predictor.weight", "predictor.bias")
    }
    before = {k: v.clone() for k, v in linear.backbone.state_dict().items()}
    linear.train()(
        [{"image": torch.randint(256, (3, 64, 64)), "sem_seg": torch.zeros(64, 64, dtype=torch.long)}]
    )
    assert all(torch.equal(v, before[k]) for k, v in linear.backbone.state_dict().items())  # statistics too


def test_the_loss_is_the_mean_over_all_pixels_of_crops_padded_to_their_size() -> None:
    cfg, model = small("MODEL.SEM_SEG_HEAD.DROPOUT", "0.0")
    for head in (model.sem_seg_head, model.sem_seg_head.auxiliary):
        nn.init.zeros_(head.predictor.weight)  # every class is equally likely: log 3 a pixel
    labels = torch.full((40, 50), 255)
    labels[:10] = 2
    batch = [{"image": torch.randint(256, (3, 40, 50)), "sem_seg": labels}] * 2
    losses = model.train()(batch)
    expected = torch.log(torch.tensor(3.0)) * 500 / (64 * 64)  # 500 labelled pixels of a crop of 64 x 64
    torch.testing.assert_close(losses["loss_sem_seg"], expected)
    torch.testing.assert_close(losses["loss_sem_seg_aux"], 0.4 * expected)
    assert cfg.INPUT.CROP.SIZE == [64, 64]


@torch.no_grad()
def test_windows_are_averaged_and_the_mirror_image_is() -> None:
    _, model = small("TEST.SLIDE.WINDOW", "32", "TEST.SLIDE.STRIDE", "20")
    model.eval()
    x = torch.randn(1, 3, 40, 60)
    total, count = torch.zeros(1, 3, 40, 60), torch.zeros(40, 60)
    for top in (0, 8):  # 40 - 32 = 8 < 20
        for left in (0, 20, 28):
            part = x[..., top : top + 32, left : left + 32]
            found = model.sem_seg_head(model.backbone(part))
            total[..., top : top + 32, left : left + 32] += F.interpolate(found, (32, 32), mode="bilinear")
            count[top : top + 32, left : left + 32] += 1
    torch.testing.assert_close(model.logits(x), total / count)
    for length in (1, 31, 32, 33, 52, 100):
        starts = networks._starts(length, 32, 20)
        covered = {i for s in starts for i in range(s, min(s + 32, length))}
        assert covered == set(range(length)) and max(starts) + 32 <= max(length, 32)
        # as mmsegmentation counts them: max(length - window + stride - 1, 0) // stride + 1
        assert len(starts) == max(length - 32 + 19, 0) // 20 + 1
    _, model = small("TEST.FLIP", "True")
    record = {"image": torch.randint(256, (3, 32, 48)), "height": 50, "width": 70}
    mirrored = {**record, "image": record["image"].flip(-1)}
    model.eval()
    one, other = (model([r])[0]["sem_seg"] for r in (record, mirrored))
    assert one.shape == (3, 50, 70)
    torch.testing.assert_close(one, other.flip(-1))  # the mean of both is the mirror image of itself
    model.flip = False
    assert not torch.allclose(model([record])[0]["sem_seg"], one)


def test_the_poly_rate_is_mmsegmentations() -> None:
    cfg, _ = small("SOLVER.MAX_ITER", "10", "SOLVER.BASE_LR", "0.5", "SOLVER.BASE_LR_END", "0.1")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule, rates = build_schedule(cfg, optimizer), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([(0.5 - 0.1) * (1 - i / 10) ** 0.9 + 0.1 for i in range(10)])
    cfg, _ = small("SOLVER.MAX_ITER", "10", "SOLVER.BASE_LR_END", "0.0", "SOLVER.WARMUP_ITERS", "0")
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01) for _ in range(2))
    mine, deeplab = build_schedule(cfg, ours), WarmupPolyLR(theirs, 10, warmup_iters=0)
    for _ in range(9):
        for thing in (ours, theirs, mine, deeplab):
            thing.step()
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["MODEL.MASK_ON", "True"], "MODEL.MASK_ON True would have no effect: it belongs to detectors"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], "MODEL.ROI_HEADS.NUM_CLASSES 5 would have no effect"),
        (["TEST.AUG.ENABLED", "True"], "TEST.FLIP and TEST.SLIDE are what semantic"),
        (["MODEL.RESNETS.OUTPUT_STRIDE", "4"], "can be 8 or 16 or 32 here"),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "have keys of their own; take a --config-file"),
        (["TEST.SLIDE.WINDOW", "32"], "wanted both 0, or steps of at most a window"),
        (["TEST.SLIDE.WINDOW", "32", "TEST.SLIDE.STRIDE", "40"], "wanted both 0, or steps"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "('res3',)"], "of MODEL.RESNETS.OUT_FEATURES"),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "2"], "is one of the 3 classes 0 to 2"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_cannot_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("small_R18_FCN", [*TINY, *words])


def test_a_linear_head_has_no_convolutions_to_set() -> None:
    with pytest.raises(
        UserError, match="NUM_CONVS 3 would have no effect: the linear head has no convolution"
    ):
        load_config("small_R18_linear", ["MODEL.SEM_SEG_HEAD.NUM_CONVS", "3"])
    with pytest.raises(UserError, match="DilatedSegmentor here; take a sem_seg config"):
        load_config("small_R18_FPN", ["MODEL.META_ARCHITECTURE", "SemanticSegmentor"])
