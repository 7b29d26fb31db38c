"""Heads on several stages' features: each as it would be alone, from one pass through the backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import transfer.evaluators.linear
from pretrain.common.errors import UserError
from pretrain.data.datasets import open_dataset
from pretrain.network.model import build_backbone
from transfer.checkpoints.backbone import Backbone
from transfer.evaluation import results
from transfer.evaluation.accuracy import accuracy
from transfer.evaluation.features import Extractor, extract, make_extractor
from transfer.evaluation.pooled_features import WINDOWS, Stages, columns, stages_of, widths_of
from transfer.evaluation.transforms import EvalTransform
from transfer.evaluators import linear
from transfer.evaluators.heads import HeadGrid, HeadGrids
from transfer.evaluators.linear_features import Labelled
from transfer.evaluators.linear_protocol import LinearProtocol

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(size=32)
BOTH = ("layer3", "layer4")


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_backbone("resnet18", zero_init_last=False).train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "cifar"), ("resnet50", "imagenet")])
def test_stages_are_the_backbones_own(arch: str, stem: str) -> None:
    torch.manual_seed(1)
    model = build_backbone(arch, stem=stem).eval()
    seen: dict[str, torch.Tensor] = {}
    for stage in BOTH:
        getattr(model, stage).register_forward_hook(lambda _, __, out, stage=stage: seen.update({stage: out}))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(x)
        got = Stages(model, BOTH)(x)
        widths = widths_of(model, BOTH, 64)
    assert torch.equal(got[:, columns("layer4", widths)], wanted)
    assert torch.equal(got[:, columns("layer3", widths)], seen["layer3"].mean((2, 3)))
    assert got.shape[1] == sum(widths.values()) and list(widths) == list(BOTH)


def test_sets_of_features_by_name() -> None:
    assert stages_of(["layer4"]) == ("layer4",)
    assert stages_of(["layer4", "layer2+layer4"]) == ("layer2", "layer4")
    # layer1 has columns 0 1, layer2 column 2, layer4 columns 3 4 5
    widths = {"layer1": 2, "layer2": 1, "layer4": 3}
    assert columns("layer1+layer4", widths).tolist() == [0, 1, 3, 4, 5]
    for wrong in (["layer5"], ["layer4+layer3"], ["layer4", "layer4"], [""], []):
        with pytest.raises(ValueError, match="wanted"):
            stages_of(wrong)


def test_windows_of_the_last_map_are_vissls_features() -> None:
    # A 7 x 7 map averaged by AvgPool2d(6, stride 1) is 2 x 2: of ResNet-18's 512 channels 2,048 numbers, and
    # of ResNet-50's 2,048 the 8,192 of VISSL, channel by channel as flatten leaves them.
    backbone = build_backbone("resnet18", stem="imagenet").eval()
    pixels = torch.randint(
        0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    extractor = Extractor(backbone, EvalTransform(size=224), torch.device("cpu"), "float32", stages=WINDOWS)
    map_NC77 = backbone.forward_features(EvalTransform(size=224).normalise(pixels)).detach()
    assert map_NC77.shape[2:] == (7, 7) and extractor.width == 2048
    windows = [map_NC77[:, :, y : y + 6, x : x + 6].mean((2, 3)) for y in (0, 1) for x in (0, 1)]
    wanted = torch.stack(windows, 2).flatten(1)
    torch.testing.assert_close(extractor(pixels), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"windows of 6 x 6 do not fit the last map, 2 x 2"):
        Extractor(backbone, EvalTransform(size=64), CPU, "float32", stages=WINDOWS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"features": ("layer4+layer3",)}, "in order"),
        ({"features": ("layer4", "layer3"), "choose_on": "held-out"}, "held_out_percent"),
        ({"features": ("layer4", "layer3"), "scaling": "l2", "choose_on": "reported"}, "single set"),
        ({"features": ("layer3",), "method": "svm", "costs": (1.0,)}, "svm takes layer4 alone"),
        ({"features": ("layer4", "layer3"), "method": "logreg", "costs": (1.0,)}, "logreg one set"),
        ({"scaling": "l2"}, "scaling l2 is of features that are computed once: set augmentation: false"),
        ({"method": "logreg", "costs": (1.0,)}, "logreg is of features .* set augmentation: false"),
    ],
)
def test_a_protocol_that_makes_no_sense_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearProtocol(learning_rates=(0.1,), **values)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_each_head_of_rates_decays_and_features_trains_as_it_would_alone(optimizer: str) -> None:
    g = torch.Generator().manual_seed(3)
    data = [(torch.randn(16, 9, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(12)]
    sets = {"few": torch.arange(5, 9), "all": torch.arange(9), "apart": torch.tensor([0, 1, 7])}
    options = {"optimizer": optimizer, "seed": 5}
    grids = HeadGrids(sets, 3, rates=[0.3, 0.01], decays=[0.0, 0.1], **options)
    losses = torch.stack([grids.step(x, y, factor=1 / (i + 1)) for i, (x, y) in enumerate(data)])
    assert len(grids) == len(grids.grid) == 12 and losses.shape == (12, 12)
    x, _ = data[0]
    for h, (rate, decay, name) in enumerate(grids.grid):
        alone = HeadGrid(len(sets[name]), 3, rates=[rate], decays=[decay], **options)
        for i, (batch, labels) in enumerate(data):
            loss = alone.step(batch[:, sets[name]], labels, factor=1 / (i + 1))
            torch.testing.assert_close(losses[i, h], loss[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            grids.logits(x)[:, h], alone.logits(x[:, sets[name]])[:, 0], rtol=1e-4, atol=1e-5
        )
    # the control: heads on other features are other heads
    assert not torch.allclose(grids.logits(x)[:, 0], grids.logits(x)[:, 4], atol=1e-3)
    again = HeadGrids(sets, 3, rates=[0.3, 0.01], decays=[0.0, 0.1], **options)
    again.load(grids.state())
    assert torch.equal(again.logits(x), grids.logits(x))
    with pytest.raises(ValueError, match="heads on few, all, apart, wanted few"):
        HeadGrids({"few": sets["few"]}, 3, rates=[0.3], decays=[0.0]).load(grids.state())


@pytest.mark.parametrize("width", [6, 2])  # the features take more memory than the logits, and less
def test_judging_block_by_block_is_judging_at_once(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(3)
    part = Labelled(features_ND=torch.randn(50, width, generator=g), labels_N=torch.arange(50) % 4)
    heads = HeadGrids({"all": torch.arange(width)}, 4, rates=[0.1, 1.0], decays=[0.0], seed=1)
    heads.step(part.features_ND, part.labels_N, factor=1.0)
    heads.grids["all"].parameters[0][:, 1] = float("nan")  # a head that has diverged
    asked: list[int] = []
    logits = HeadGrids.logits

    def noted(self: HeadGrids, x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return logits(self, x)

    monkeypatch.setattr(HeadGrids, "logits", noted)
    monkeypatch.setattr(transfer.evaluators.linear, "BLOCK_BYTES", max(8 * width, 4 * 4 * 2) * 16)
    found = linear.judge_heads(heads, 4, None, part)
    assert asked == [16, 16, 16, 2] and list(found) == ["test"]
    assert found["test"][0] == accuracy(logits(heads, part.features_ND)[:, 0], part.labels_N)
    assert found["test"][1]["top1"] == 26.0  # all equal: the smallest label, which 13 of 50 images have


def test_other_stages_are_other_features_in_the_cache(backbone, cifar_folder: Path, tmp_path: Path) -> None:
    images = open_dataset("cifar10", cifar_folder, "test")
    weights = {"path": "w", "sha256": "s", "format": "f", "branch": "online"}
    loaded = Backbone(model=backbone, arch="resnet18", weights=weights)
    last, both = (
        extract(
            make_extractor(loaded, images, TRANSFORM, CPU, "float32", stages),
            loaded,
            images,
            cache=tmp_path,
        )
        for stages in (("layer4",), BOTH)
    )
    assert last.shape == (160, 512) and both.shape == (160, 256 + 512) and (both[:, 256:] == last).all()
    assert len(list(tmp_path.glob("*/features.npy"))) == 2
    fast = Extractor(backbone, TRANSFORM, CPU, "bfloat16", stages=BOTH)
    pixels = TRANSFORM.square([TRANSFORM.decode(images.image(i)) for i in range(40)])
    assert torch.cosine_similarity(fast(pixels), torch.tensor(both[:40])).min() > 0.99
    assert not any("bn" in name for name, _ in fast.module.named_modules())  # folded through the wrapper


def test_by_command_each_set_scores_as_alone_from_one_pass(
    backbone, cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    passed: list[int] = []
    call = Extractor.__call__

    def noted(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        passed.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", noted)

    def judged(name: str, features: list[str]) -> tuple[results.Result, int]:
        values = {
            "learning_rates": [0.1, 0.01], "weight_decays": [0, 0.001], "batch": 160, "epochs": 2,
            "steps_per_epoch": 2, "held_out_percent": 10, "features": features,
        }  # fmt: skip
        path = tmp_path / f"{name}@1.yaml"
        path.write_text(yaml.safe_dump({"task": "linear", "title": "t", "source": "s", "values": values}))
        words = [
            "--weights",
            str(tmp_path / "w.pth"),
            "--dataset",
            "cifar10",
            "--data-dir",
            str(cifar_folder),
        ]
        words += ["--protocol", str(path), "--precision", "float32", "--output", str(tmp_path / name)]
        passed.clear()
        assert linear.main(words) == 0
        return results.read(tmp_path / name)[0], sum(passed)

    both, images = judged("both", ["layer4", "layer3+layer4"])
    sweep = both.settings["sweep"]
    assert both.settings["heads"] == 8 and both.settings["features"] in ("layer4", "layer3+layer4")
    for name in ("layer4", "layer3+layer4"):
        alone, images_alone = judged(name.replace("+", "_"), [name])
        own = [{k: v for k, v in h.items() if k != "features"} for h in sweep if h["features"] == name]
        theirs = [{k: v for k, v in h.items() if k != "features"} for h in alone.settings["sweep"]]
        assert own == theirs and len(own) == 4
        assert images == images_alone == 160 + 60 + 4 * 160  # test, held out, four steps
    best = max(sweep, key=lambda h: h["top1"])
    assert (both.settings["features"], both.settings["learning_rate"]) == (best["features"], best["lr"])


def test_pixels_have_no_stages(cifar_folder: Path, tmp_path: Path) -> None:
    values = {"learning_rates": [0.1], "augmentation": False, "features": ["layer3"]}
    path = tmp_path / "mine@1.yaml"
    path.write_text(yaml.safe_dump({"task": "linear", "title": "t", "source": "s", "values": values}))
    words = ["--weights", "raw-pixels", "--dataset", "cifar10", "--data-dir", str(cifar_folder)]
    with pytest.raises(UserError, match="reads layers of a backbone"):
        linear.main([*words, "--protocol", str(path), "--output", str(tmp_path / "out")])
