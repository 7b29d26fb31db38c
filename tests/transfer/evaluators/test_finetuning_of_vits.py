"""Fine-tuning with layer-wise rates, drop path and mixed images, beside a plain loop of timm and torch."""

from __future__ import annotations

import copy
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import nn

from pretrain.checkpoint import load_checkpoint
from pretrain.common.errors import UserError
from pretrain.common.signals import Stopped
from transfer.checkpoints.backbone import backbone_of_module
from transfer.evaluation import results
from transfer.evaluation.augment import Mixing, drawn_from, rand_augment
from transfer.evaluation.pooled_features import network_of, stages_of
from transfer.evaluation.protocol import load_protocol
from transfer.evaluators import semisup
from transfer.evaluators.finetune import FineTuning
from transfer.evaluators.finetune_protocol import FineTuneProtocol
from transfer.evaluators.heads import rate_factor
from transfer.options.commands import parse

CPU = torch.device("cpu")


def vit(**more: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 0, "img_size": 32, "depth": 3, **more}
    return timm.create_model("vit_tiny_patch16_224", **options)


def learner_of(backbone: nn.Module, **other: object) -> FineTuning:
    options = {
        "classes": 5, "lr_backbone": 0.002, "lr_head": 0.002, "momentum": 0.9, "weight_decay": 0.05,
        "head_init": "tiny", "sync_bn": False, "seed": 3, "dtype": torch.float32, "device": CPU,
        "optimizer": "adamw", "weight_decay_of": "matrices", "layer_decay": 0.65, "head_norm": True,
    }  # fmt: skip
    return FineTuning(backbone, **(options | other))  # type: ignore[arg-type]


def test_steps_are_those_of_timms_own_network_groups_and_mixup() -> None:
    """timm's ViT with a norm behind the mean of its patches is MAE's; dropped blocks are drawn alike."""
    learner = learner_of(network_of(vit(), stages_of(["patches.unnormed"])), drop_path=0.3)
    learner.model.double()
    reference = vit(num_classes=5, global_pool="avg", drop_path_rate=0.3).double()
    state = {k.removeprefix("backbone.backbone."): v for k, v in learner.model.state_dict().items()}
    state = {k.replace("head_norm.", "fc_norm."): v for k, v in state.items() if not k.startswith("norm.")}
    state = copy.deepcopy(state)  # where both begin
    reference.load_state_dict(state)
    groups = param_groups_layer_decay(
        reference, 0.05, layer_decay=0.65, no_weight_decay_list=reference.no_weight_decay()
    )
    # MAE's util/lr_decay.py by hand: 0.65 ** (4 - layer), embeddings layer 0, block i layer i + 1, the rest 4
    scales = {group["lr_scale"] for group in groups}
    assert sorted(scales) == pytest.approx([0.65**n for n in (4, 3, 2, 1, 0)])
    adamw = torch.optim.AdamW(groups)
    mixing = Mixing(5, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.0, device=CPU)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    data = torch.Generator().manual_seed(1)
    for step in range(4):
        x = torch.randn(6, 3, 32, 32, generator=data, dtype=torch.float64)
        y = torch.randint(0, 5, (6,), generator=data)
        with drawn_from(7, step):
            images, labels = mixing(x.clone(), y)
            loss = learner.step(images, labels, batch_global=6, factor=0.5)
        with drawn_from(7, step):
            images, labels = theirs(x.clone(), y)
            wanted = SoftTargetCrossEntropy()(reference.train()(images), labels)
        for group in adamw.param_groups:
            group["lr"] = 0.5 * 0.002 * group["lr_scale"]
        adamw.zero_grad()
        wanted.backward()
        adamw.step()
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-6)  # float32 inside
    # AdamW's first steps are of the rate's size whatever the gradient: a wrong scale or decay would show
    mine = dict(learner.model.named_parameters())
    for name, parameter in reference.named_parameters():
        key = name.replace("fc_norm.", "head_norm.")
        found = mine[key if key.startswith("head") else f"backbone.backbone.{key}"].detach()
        moved = float((parameter.detach() - state[name]).norm())
        assert moved > 0 and float((found - parameter.detach()).norm()) <= 0.01 * moved, name


def test_blocks_are_left_out_in_training_alone_and_more_of_the_last() -> None:
    learner = learner_of(vit(), drop_path=0.4, head_norm=False)
    blocks = learner.model.backbone.blocks
    assert [b.drop_path2.drop_prob for b in blocks] == pytest.approx([0, 0.2, 0.4])
    images = torch.randn(4, 3, 32, 32)
    plain = learner_of(vit(), head_norm=False)
    assert torch.equal(learner.logits(images), plain.logits(images))
    with pytest.raises(UserError, match="for the blocks of a ViT; ResNet has none"):
        learner_of(timm.create_model("test_resnet", num_classes=0), drop_path=0.1, head_norm=False)
    own = nn.Flatten()
    own.num_features = 48  # type: ignore[assignment]
    with pytest.raises(UserError, match="known of timm's networks; Flatten is none"):
        learner_of(own)


def test_a_norm_that_no_token_hangs_on_is_not_trained() -> None:
    """DDP would wait for its gradient for ever."""
    for features, used in (("patches.unnormed", False), ("patches", True)):
        learner = learner_of(network_of(vit(), stages_of([features])))
        norm = learner.model.backbone.backbone.norm
        assert norm.weight.requires_grad is used
        labels = torch.tensor([0, 1])
        learner.step(torch.randn(2, 3, 32, 32), labels, batch_global=2, factor=1.0)
        trained = {n for n, p in learner.model.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in learner.model.named_parameters() if p.grad is not None}


def test_images_are_changed_as_by_timms_own_transform_and_nothing_else_is_drawn() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = create_transform(
        32, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", separate=True,
        mean=mean, std=std, re_prob=1.0, re_mode="pixel",
    )  # fmt: skip
    ours = rand_augment("rand-m9-mstd0.5-inc1", 32, mean, "bicubic")
    erase = Mixing(5, mixup=0, cutmix=0, smoothing=0.1, erasing=1.0, device=CPU)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for index in range(8):
        with drawn_from(0, 1, index):
            wanted = theirs[1](image)
        with drawn_from(0, 1, index):
            assert ours(image).tobytes() == wanted.tobytes()
        with drawn_from(2, index):
            erased = theirs[2](wanted)
        plain = torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]
        plain = plain / torch.tensor(std)[:, None, None]
        with drawn_from(2, index):
            found, labels = erase(plain[None].clone(), torch.tensor([2]))
        torch.testing.assert_close(found[0], erased)
        assert not torch.allclose(found[0], plain)
        torch.testing.assert_close(labels, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02]]))
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


def test_published_values() -> None:
    values = load_protocol("mae_finetune@1").settings(FineTuneProtocol)
    assert values.rates(100) == pytest.approx((0.002, 0.002))  # 5e-4 * 1024 / 256

    def factor(epoch: float) -> float:
        return rate_factor(
            values.schedule, step=int(1251 * epoch), steps_per_epoch=1251, epochs=100, final=values.final,
            warmup_epochs=values.warmup_epochs,
        )  # fmt: skip

    # util/lr_sched.py: up from 0 in 5 epochs, half way of the cosine at 52.5, and 1e-6 of 2e-3 at the end
    assert [factor(e) for e in (0, 2, 5, 100)] == pytest.approx([0, 0.4, 1, 0.0005])
    assert factor(52.5) == pytest.approx((1 + 0.0005) / 2, abs=1e-4)
    rates = {"lr_backbone": {"100": 0.1}, "lr_head": {"100": 0.1}}
    for wrong in (
        {"mixup": 0.8}, {"mixup": 0.8, "drop_last": True, "batch": 5}, {"drop_path": 1.0},
        {"layer_decay": 0.0}, {"auto_augment": "rand-m9-what"}, {"auto_augment": "v0"}, {"warmup_epochs": 20},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FineTuneProtocol(**rates, **wrong)


def test_stopped_and_gone_on_is_the_same_to_the_bit(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    def tune(folder: Path) -> list[results.Result]:
        module = vit(embed_dim=48, depth=2)
        words = ["--weights", "vit", "--protocol", str(tmp_path / "mine@1.yaml"), "--label-percent", "10"]
        words += ["--workers", "0", "--dataset", "cifar10", "--data-dir", str(cifar_folder)]
        settings = parse("semisup", [*words, "--output", str(folder)])
        return semisup.evaluate(settings, backbone_of_module(module))

    (tmp_path / "mine@1.yaml").write_text(
        "task: semisup\ntitle: t\nsource: s\n"
        "values: {features: [patches.unnormed], head_norm: true, epochs: 2, image_size: 32, batch: 16, "
        "lr_backbone: {'10': 0.0005}, lr_head: {'10': 0.0005}, optimizer: adamw, layer_decay: 0.7, "
        "drop_last: true, drop_path: 0.5, mixup: 0.8, cutmix: 1.0, label_smoothing: 0.1, "
        "random_erasing: 0.5, auto_augment: rand-m9-mstd0.5-inc1, schedule: cosine, warmup_epochs: 1}\n"
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert len(tune(whole)) == 2
    real, taken = FineTuning.step, []

    def signalled(self: FineTuning, *args: object, **options: object) -> torch.Tensor:
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(FineTuning, "step", signalled)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # is sent again once everything is saved
    try:
        with pytest.raises(Stopped):
            tune(parts)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert load_checkpoint(parts / "checkpoint.pt")["step"] == 2
    torch.manual_seed(99)  # what is left behind elsewhere does not matter
    np.random.seed(99)
    random.seed(99)
    assert len(tune(parts)) == 2
    assert len(taken) == 6  # 60 images: 3 whole batches of 16, twice
    one, other = (load_checkpoint(folder / "checkpoint.pt")["model"] for folder in (whole, parts))
    assert all(torch.equal(one[k], other[k]) for k in one)
    figures = [[(r.selection, r.metrics, r.settings) for r in results.read(f)] for f in (whole, parts)]
    assert figures[0] == figures[1]
    assert {r.evaluated_under["world_size"] for r in results.read(whole)} == {1}
