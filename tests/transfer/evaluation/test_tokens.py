"""A ViT's tokens as features, and its positions for other sizes, against plain references in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from pretrain.common.errors import UserError
from tests.helpers import plain_networks
from transfer.evaluation import results
from transfer.evaluation.features import Extractor
from transfer.evaluation.pooled_features import columns, network_of, stages_of
from transfer.evaluation.protocol import load_protocol
from transfer.evaluation.tokens import at_size, resampled
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators import knn, linear, semisup


def vit(**more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 0, "img_size": 32, "depth": 3, **more}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


@pytest.mark.parametrize("registers", [0, 4])
def test_every_set_of_tokens_equals_a_plain_forward_pass(registers: int):
    model = vit(reg_tokens=registers, no_embed_class=registers > 0)
    state: dict[str, Tensor] = {
        key.replace("reg_token", "register_tokens"): value for key, value in model.state_dict().items()
    }
    if registers:  # positions of the patches alone: here one of zeros for the class token
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 192), state["pos_embed"]], 1)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    normed = plain_networks.vit(state, images, heads=3, last=3)
    raw = plain_networks.vit(state, images, heads=3, last=3, norm=False)
    first = 1 + registers
    patches = normed[-1][:, first:].mean(1)
    wanted = {
        "cls": normed[-1][:, 0],
        "patches": patches,
        "cls+patches": torch.cat([normed[-1][:, 0], patches], 1),
        "last3.cls": torch.cat([block[:, 0] for block in normed], 1),
        "last2.cls+patches": torch.cat([normed[-2][:, 0], normed[-1][:, 0], patches], 1),
        "cls.unnormed": raw[-1][:, 0],
        "patches.unnormed": raw[-1][:, first:].mean(1),
    }
    stages = stages_of(list(wanted))
    widths = dict.fromkeys(stages, 192)
    with torch.no_grad():
        together = network_of(model, stages)(images)
        own = model(images)
    for name, features in wanted.items():
        torch.testing.assert_close(together[:, columns(name, widths)], features, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own, wanted["cls"], rtol=1e-9, atol=1e-9)


def cubic(t: float, a: float = -0.75) -> float:
    """Keys' kernel with PyTorch's a (https://doi.org/10.1109/TASSP.1981.1163711, eq. 4)."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def by_hand(row: list[float], side: int, scale: float) -> list[float]:
    """A line of values at (i + 1/2) / scale - 1/2, edges repeated."""
    out = []
    for i in range(side):
        x = (i + 0.5) / scale - 0.5
        near = range(math.floor(x) - 1, math.floor(x) + 3)
        out.append(sum(cubic(x - j) * row[min(max(j, 0), len(row) - 1)] for j in near))
    return out


@pytest.mark.parametrize(("how", "scale"), [("bicubic", 7 / 4), ("bicubic offset", 7.1 / 4)])
def test_positions_are_resampled_as_their_authors_do(how, scale: float):
    """DINO adds 0.1 to the number of patches before it takes the scale."""
    row = [0.3, -1.0, 2.0, 0.5]
    grid = torch.tensor(row, dtype=torch.float64).repeat(4, 1)  # equal lines: one direction alone counts
    others = torch.full((1, 2, 1), 9.0, dtype=torch.float64)
    got = resampled(torch.cat([others, grid.reshape(1, 16, 1)], 1), 7, before=2, how=how)
    assert got.shape == (1, 2 + 49, 1) and torch.equal(got[:, :2], others)
    wanted = torch.tensor(by_hand(row, 7, scale), dtype=torch.float64)
    torch.testing.assert_close(got[0, 2:, 0].view(7, 7), wanted.repeat(7, 1), rtol=1e-6, atol=1e-6)


def test_antialiased_positions_are_timms():
    model, wanted = vit(img_size=112), vit(img_size=112)
    wanted.set_input_size(img_size=(48, 48))
    images = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        timms = wanted(images)
        ways = ("bicubic antialias", "bicubic", "bicubic offset")
        like, *others = [at_size(model, 48, how)(images) for how in ways]
    torch.testing.assert_close(like, timms, rtol=1e-5, atol=1e-6)  # timm resamples in float32
    assert not any(torch.allclose(other, timms, rtol=1e-3) for other in others)
    assert model.patch_embed.img_size == (112, 112)  # a copy was changed
    with pytest.raises(UserError, match="patches of 16 px: say --image-size 48"):
        at_size(model, 50, "bicubic")


def test_what_has_no_such_tokens_is_told():
    for model, features, words in (
        (timm.create_model("test_resnet", num_classes=0).double(), "cls", "reads the tokens of a ViT"),
        (vit(class_token=False, global_pool="avg", fc_norm=False), "cls", "has none; take one of patches"),
        (vit(global_pool="avg"), "patches", "normalises none"),
        (vit(), "last4.cls", "reads the last 4 blocks, and the ViT given has 3"),
    ):
        with pytest.raises(UserError, match=words):
            network_of(model, stages_of([features]))(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="a ViT's tokens alone"):
        stages_of(["layer3+cls"])


def test_large_images_go_in_several_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transfer.evaluation.features.PIXELS", 2 * 32**2)
    look = EvalTransform(size=32)
    extractor = Extractor(vit().float(), look, torch.device("cpu"), "float32", stages=stages_of(["cls"]))
    sizes: list[int] = []
    assert extractor.module is not None
    extractor.module.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert extractor(pixels).shape == (5, 192) and sizes == [2, 2, 1]


def test_patches_of_a_vit_without_other_tokens_as_i_jepas():
    model = vit(class_token=False, global_pool="avg", fc_norm=False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    blocks: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: blocks.append(out))
    with torch.no_grad():
        model(images)
        wanted = torch.cat([model.norm(out).mean(1) for out in blocks[-2:]], 1)
        found = network_of(model, stages_of(["last2.patches"]))(images)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(network_of(model, stages_of(["patches"]))(images), model(images))


def test_the_evaluators_judge_a_vit(tmp_path: Path):
    """k-NN, a linear sweep over sets of tokens and fine-tuning, at another size than the file's."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "m.pth")
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for name in ("dark", "light"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 128, (40, 36, 3)) + 127 * (name == "light")
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"data/{part}/{name}/{i}.png")
    look = "resize: 36, crop: 32"
    mine = {
        "mine_knn": f"knn\nvalues: {{ks: [5], features: [cls+patches], positions: bicubic, {look}}}",
        "mine_linear": "linear\nvalues: {augmentation: false, features: [cls, last4.cls], epochs: 1, "
        f"learning_rates: [0.1], batch: 8, choose_on: reported, choose_epoch: last, {look}}}",
        "mine_tune": "semisup\nvalues: {lr_backbone: {'100': 0.001}, lr_head: {'100': 0.01}, epochs: 1, "
        f"batch: 8, features: [patches], {look}}}",
    }
    for name, text in mine.items():
        (tmp_path / f"{name}@1.yaml").write_text(f"title: t\nsource: s\ntask: {text}\n")
    common = ["--weights", str(tmp_path / "m.pth"), "--branch", "ema", "--dataset", "imagefolder"]
    common += ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--workers", "0"]
    for task, name in ((knn, "mine_knn"), (linear, "mine_linear"), (semisup, "mine_tune")):
        more = ["--label-percent", "100"] if task is semisup else []
        assert task.main([*common, *more, "--protocol", str(tmp_path / f"{name}@1.yaml")]) == 0
    found = {r.protocol["name"]: r for r in results.read(tmp_path / "out")}
    assert found["mine_knn"].evaluated_under["positions"] == "bicubic"
    assert found["mine_linear"].evaluated_under["positions"] == "bicubic offset"  # as DINO's file says
    assert {head["features"] for head in found["mine_linear"].settings["sweep"]} == {"cls", "last4.cls"}
    assert found["mine_tune"].arch == "vit_tiny_patch16_224"
    assert "3 heads" in found["mine_knn"].weights["network"]
    # of frozen features and of a fine-tuned copy alike: what is counted is the network that was read
    counted = {(r.settings["parameters"], r.settings["multiply_adds"]) for r in found.values()}
    assert len(counted) == 1


def test_protocols_of_vits_have_their_authors_grids():
    sweep = load_protocol("dinov2_vit_linear@1").settings(linear.LinearProtocol)
    assert sweep.grid_size == 13 * 2 * 2 and len(stages_of(sweep.features)) == 5
    small = load_protocol("dino_vit_linear@1").settings(linear.LinearProtocol)
    assert len(stages_of(small.features)) == 4 and small.rates == [0.004]
    assert load_protocol("mocov3_vit_linear@1").settings(linear.LinearProtocol).rates == [12.0]
