"""What is said of BatchNorm statistics that no training leaves."""

from __future__ import annotations

import timm
import torch
from torch import nn

from transfer.checkpoints.backbone import Backbone, raw_pixels
from transfer.checkpoints.sanity import doubts, never_trained


def wrap(model: nn.Module) -> Backbone:
    weights = {"path": "m.pth", "sha256": "0" * 64, "format": "torchvision or timm", "branch": "online"}
    return Backbone(model=model.eval(), arch="test_resnet", weights=weights)


def trained() -> nn.Module:
    """One training batch has moved every running mean and counter."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).train()
    model(torch.randn(4, 3, 64, 64))
    return model


def test_a_fresh_network_was_never_trained_and_one_batch_changes_that():
    fresh = wrap(timm.create_model("test_resnet", num_classes=0))
    assert never_trained(fresh)
    assert doubts(fresh)[0].startswith("never trained")
    assert not never_trained(wrap(trained())) and doubts(wrap(trained())) == []


def test_one_counter_or_one_mean_is_enough_to_be_trained():
    counted, moved = (timm.create_model("test_resnet", num_classes=0) for _ in range(2))
    counted.bn1.num_batches_tracked.fill_(1)
    moved.bn1.running_mean[3] = 1e-30
    assert not never_trained(wrap(counted)) and not never_trained(wrap(moved))


def test_no_batchnorm_no_verdict():
    assert not never_trained(raw_pixels()) and doubts(raw_pixels()) == []
    assert not never_trained(wrap(nn.Sequential(nn.Conv2d(3, 4, 3))))


def test_swapped_and_negative_variances_are_told_apart():
    swapped = trained()
    for module in swapped.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = module.running_var, module.running_mean
    assert "look swapped" in doubts(wrap(swapped))[0]
    damaged = trained()
    damaged.bn1.running_mean[0] = -1
    damaged.bn1.running_var[5] = -0.25
    [said] = doubts(wrap(damaged))
    assert "in 1 of " in said and "(bn1)" in said and "damaged" in said
    for module in damaged.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.zero_()
    assert "variance of BatchNorm is 0" in doubts(wrap(damaged))[0]
