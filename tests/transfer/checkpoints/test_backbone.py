"""Every known checkpoint format loads completely or not at all."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightly.loss
import lightly.models.modules
import lightly.utils.benchmarking
import numpy as np
import pytest
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

import transfer.checkpoints.backbone
from pretrain.common.errors import UserError
from pretrain.network.model import build_backbone
from tests.helpers import checkpoint_zoo as zoo
from transfer.checkpoints.backbone import backbone_of_module, load_backbone
from transfer.checkpoints.families.resnet import ARCHS, SAME_SHAPES, arch_shapes
from transfer.checkpoints.formats import FORMATS
from transfer.checkpoints.safe_load import load_file

A, B = zoo.backbone(0), zoo.backbone(1)


def save(value: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Every tensor of the model, and no other, equals that of the state dict."""
    held = model.state_dict()
    return held.keys() == state.keys() and all(torch.equal(held[k], state[k]) for k in state)


def test_zoo_and_table_name_the_same_formats():
    own = {"this project, backbone file", "this project, EMA backbone file"}  # below, with their metadata
    of_resnets = {f.name for f in FORMATS if not f.families or "resnet" in f.families}
    assert of_resnets == set(zoo.ZOO) | own


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_format(name: str, tmp_path: Path):
    build, has_ema = zoo.ZOO[name]
    path = save(build(A, B), tmp_path / "model.pth.tar")
    found = load_backbone(path)
    assert (found.format, found.branch, found.arch, found.stem) == (name, "online", "resnet18", "imagenet")
    assert same(found.model, A) and not found.model.training
    assert sorted(found.used.values()) == sorted(A)
    assert all(found.dropped.values()) and not set(found.used) & set(found.dropped)
    if has_ema:
        found = load_backbone(path, branch="ema")
        assert (found.format, found.branch) == (name, "ema")
        assert same(found.model, B)
    else:
        with pytest.raises(UserError, match=r"no ema branch, but a complete online one.*--branch online"):
            load_backbone(path, branch="ema")


@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_other_layouts_of_the_same_writers(name: str, tmp_path: Path):
    wanted, build, branch, state = zoo.VARIANTS[name]
    found = load_backbone(save(build(A, B), tmp_path / "model.pth"), branch=branch)
    assert found.format == wanted
    assert same(found.model, A if state == "a" else B)


@pytest.mark.parametrize("name", ["MoCo v1, v2; PCL", "DINO", "lightly benchmarks", "torchvision or timm"])
def test_old_container_of_torch_save(name: str, tmp_path: Path):
    build, _ = zoo.ZOO[name]
    found = load_backbone(save(build(A, B), tmp_path / "model.pth", legacy=True))
    assert found.format == name and same(found.model, A)


# ------------------------------------------------------------------ broken kin of each format


def holder_of(value: Any, keys: set[str]) -> dict[str, Any]:
    """The dict inside `value` that has all these keys."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if keys <= set(item):
                return item
            pending += item.values()
    raise AssertionError("not found")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_broken_kin_is_refused(name: str, tmp_path: Path):
    path = tmp_path / "model.pth"
    build, _ = zoo.ZOO[name]
    whole = build(A, {})  # a complete EMA branch would be what the error proposes
    used = load_backbone(save(whole, path)).used
    key = {model_key: file_key for file_key, model_key in used.items()}

    def broken(change) -> str:
        value = copy.copy(whole) if whole.keys() >= set(used) else copy.deepcopy(whole)
        change(holder_of(value, set(used)))
        with pytest.raises(UserError) as error:
            load_backbone(save(value, path))
        return str(error.value)

    missing = broken(lambda state: state.pop(key["layer3.1.conv2.weight"]))
    assert f"Nearest known format: {name}, online branch, resnet18" in missing
    assert "missing: layer3.1.conv2.weight" in missing

    def reshape(state: dict[str, Tensor]) -> None:
        state[key["layer2.0.conv1.weight"]] = torch.zeros(128, 63, 3, 3)

    assert "layer2.0.conv1.weight is 128x63x3x3, resnet18 has 128x64x3x3" in broken(reshape)

    def shuffle(state: dict[str, Tensor]) -> None:
        for model_key in ("layer4.0.conv1.weight", "layer4.0.bn1.weight"):
            state["elsewhere." + model_key] = state.pop(key[model_key])

    shuffled = broken(shuffle)
    assert "missing: layer4.0.conv1.weight, layer4.0.bn1.weight" in shuffled
    assert "left over: " in shuffled and "elsewhere.layer4.0.conv1.weight" in shuffled

    def poison(state: dict[str, Tensor]) -> None:
        state[key["bn1.weight"]] = torch.full((64,), float("nan"))

    assert "bn1.weight" in broken(poison)


@pytest.mark.parametrize("name", [name for name, (_, has_ema) in zoo.ZOO.items() if has_ema])
def test_a_file_with_the_ema_branch_alone_asks_for_it(name: str, tmp_path: Path):
    value = zoo.ZOO[name][0]({}, B)
    path = save(value, tmp_path / "model.pth")
    if name.startswith(
        "lightly benchmarks: DINO"
    ):  # `backbone` alone is what other methods call the online branch
        assert same(load_backbone(path).model, B)
        return
    with pytest.raises(
        UserError, match=r"no online branch, but a complete ema one: take it with --branch ema"
    ):
        load_backbone(path)
    assert same(load_backbone(path, branch="ema").model, B)


def test_an_unknown_second_network_is_left_over(tmp_path: Path):
    value = {"state_dict": zoo.pre("module.encoder_q.", A) | zoo.pre("module.encoder_z.", B)}
    path = save(value, tmp_path / "m.pth")
    said = r"`encoder_q\.`; left over: `encoder_z\.` \(120\)\. Take it with --prefix encoder_q\. --drop enc"
    with pytest.raises(UserError, match=said):
        load_backbone(path)
    assert same(load_backbone(path, prefix="encoder_q.", drop="encoder_z.").model, A)


def test_two_keys_for_one_tensor(tmp_path: Path):
    value = A | {"module.conv1.weight": B["conv1.weight"]}
    with pytest.raises(UserError, match=r"module\.conv1\.weight \(a second conv1\.weight\)"):
        load_backbone(save(value, tmp_path / "m.pth"))


def test_two_places_are_ambiguous(tmp_path: Path):
    with pytest.raises(UserError, match=r"ambiguous.*--container state_dict.*--container model"):
        load_backbone(save({"state_dict": A, "model": B}, tmp_path / "m.pth"))
    assert same(load_backbone(tmp_path / "m.pth", container="model").model, B)
    assert same(load_backbone(save({"state_dict": A, "model": A}, tmp_path / "m.pth")).model, A)


# ------------------------------------------------------------------ architectures and stems


def test_no_two_architectures_have_the_same_shapes():
    shapes = {arch: tuple(sorted(arch_shapes(arch).items())) for arch in ARCHS}
    assert len(set(shapes.values())) == len(ARCHS)
    for arch, twins in SAME_SHAPES.items():
        assert all(arch_shapes(twin) == arch_shapes(arch) for twin in twins)


@pytest.mark.parametrize(
    "arch",
    ["resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "resnet34", "resnet50d", "resnet50c"],
)
def test_architecture_is_found_by_its_shapes(arch: str, tmp_path: Path):
    state = zoo.backbone(arch=arch)
    found = load_backbone(save({"state_dict": zoo.pre("module.", state)}, tmp_path / "m.pth"))
    assert found.arch == arch and same(found.model, state)
    if arch == "resnet50d":
        assert any("resnetaa50d, resnetblur50d have the same shapes; --arch" in note for note in found.notes)


def test_arch_tells_architectures_of_the_same_shapes_apart(tmp_path: Path):
    path = save(zoo.backbone(arch="resnet18"), tmp_path / "m.pth")
    found = load_backbone(path, arch="resnetblur18")
    assert found.arch == "resnetblur18"
    image = torch.rand(1, 3, 64, 64)
    assert not torch.equal(found.model(image), load_backbone(path).model(image))
    recorded = {
        "arch": "resnetblur18",
        "state_dict": zoo.backbone(arch="resnet18"),
    }  # as timm's train.py does
    assert load_backbone(save(recorded, path)).arch == "resnetblur18"
    with pytest.raises(UserError, match=r"a resnetblur18, not a resnet50: leave out --arch resnet50"):
        load_backbone(path, arch="resnet50")
    with pytest.raises(UserError, match=r"--arch resnet5O: timm has no such model; did you mean resnet50"):
        load_backbone(path, arch="resnet5O")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("INTL", 2), ("solo-learn", 2), ("MoCo v1, v2; PCL", 1), ("this project, training run", 2)],
)
def test_padding_of_a_cifar_stem_is_the_writers(name: str, wanted: int, tmp_path: Path):
    state = zoo.backbone(cifar=True)
    found = load_backbone(save(zoo.ZOO[name][0](state, B), tmp_path / "m.pth"))
    assert (found.stem, found.stem_padding) == ("cifar", wanted)
    size = found.model.layer1(
        found.model.act1(found.model.bn1(found.model.conv1(torch.rand(1, 3, 32, 32))))
    ).shape
    assert size[-1] == 30 + 2 * wanted  # 3x3, stride 1, no pooling
    for assumed in ("padding", "CIFAR's mean (0.4914, 0.4822, 0.4465)"):
        assert any(assumed in note for note in found.notes) != name.startswith("this project")


def test_other_widths_and_inputs_are_refused_with_the_reason(tmp_path: Path):
    wide = {k: torch.zeros(128, 3, 7, 7) if k == "conv1.weight" else v for k, v in A.items()}
    with pytest.raises(UserError, match="conv1 has 128 channels instead of 64: a ResNet 2 times as wide"):
        load_backbone(save({"state_dict": zoo.pre("module.", wide)}, tmp_path / "w2.pth"))
    luminance = {k: v[:, :1] if k == "conv1.weight" else v for k, v in A.items()}
    with pytest.raises(UserError, match=r"conv1 takes 1 channel\(s\) instead of RGB \(CMC"):
        value = {"model": zoo.pre("module.encoder1.", luminance) | zoo.pre("module.encoder2.", luminance)}
        load_backbone(save(value, tmp_path / "cmc.pth"))
    with pytest.raises(UserError, match="it is a vision transformer"):
        load_backbone(
            save({"state_dict": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}}, tmp_path / "vit.pth")
        )


def test_counters_are_the_only_thing_that_may_be_missing(tmp_path: Path):
    old = {k: v for k, v in A.items() if not k.endswith("num_batches_tracked")}
    found = load_backbone(save(old, tmp_path / "m.pth"))
    assert any("num_batches_tracked" in note for note in found.notes)
    assert all(torch.equal(v, A[k]) for k, v in found.model.state_dict().items() if k in old)
    some = A | {"bn1.num_batches_tracked": None}
    wide = {k: v.reshape(1) if k.endswith("num_batches_tracked") else v for k, v in A.items()}
    assert load_backbone(save(some, tmp_path / "m.pth")).model.bn1.num_batches_tracked == 0
    assert same(load_backbone(save(wide, tmp_path / "m.pth")).model, A)
    with pytest.raises(UserError, match=r"missing: bn1\.running_mean"):
        load_backbone(save({k: v for k, v in A.items() if k != "bn1.running_mean"}, tmp_path / "m.pth"))


def test_half_precision_and_quantised_weights(tmp_path: Path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in A.items()}
    found = load_backbone(save(half, tmp_path / "m.pth"))
    assert found.model.conv1.weight.dtype == torch.float32
    assert "stored as float16, used as float32" in found.notes
    with pytest.raises(UserError, match="quantised"):
        load_backbone(save(A | {"conv1.weight": A["conv1.weight"].to(torch.int8)}, tmp_path / "m.pth"))


# ------------------------------------------------------------------ files of this project and of libraries


@pytest.mark.parametrize("branch", ["online", "ema"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_own_backbone_file(branch: str, stem: str, tmp_path: Path):
    model = build_backbone("resnet18", stem=stem).eval()
    metadata = {
        "format": "intl-bench/1",
        "arch": "resnet18",
        "stem": stem,
        "branch": branch,
        "image_size": "48",
    }
    path = tmp_path / "backbone.safetensors"
    save_file(model.state_dict(), path, metadata)
    found = load_backbone(path, branch=branch)
    assert found.metadata == metadata and (found.branch, found.stem) == (branch, stem)
    image = torch.rand(2, 3, 48, 48)
    assert torch.equal(found.model(image), model(image))
    with pytest.raises(UserError, match=f"take it with --branch {branch}"):
        load_backbone(path, branch="ema" if branch == "online" else "online")


def test_own_training_run_says_what_its_images_are(tmp_path: Path):
    found = load_backbone(save(zoo.ZOO["this project, training run"][0](A, B), tmp_path / "checkpoint.pt"))
    assert found.metadata["image_size"] == "48" and found.metadata["mean"] == "0.1,0.2,0.3"
    assert found.metadata["source"] == "INTL pretraining"
    assert set(load_file(tmp_path / "checkpoint.pt").value) >= {"model", "ema", "config"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stem_padding", "two"), ("stem_padding", "-1"), ("image_size", "32.5"), ("image_size", "0"),
        ("mean", "0.5"), ("mean", "0.5,x,0.5"), ("std", "1,0,1"), ("std", "nan,1,1"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_gone_by_are_named(name: str, text: str, tmp_path: Path):
    metadata = {"format": "intl-bench/1", "arch": "resnet18", "stem": "cifar", "branch": "online"}
    state = build_backbone("resnet18", stem="cifar").state_dict()
    save_file(state, tmp_path / "b.safetensors", metadata | {name: text})
    with pytest.raises(
        UserError, match=rf"b\.safetensors: its metadata say {name}: '{text}'; wanted .* write"
    ):
        load_backbone(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "pt: its config is a list, wanted the run's settings"),
        ({"mean": 0.5}, "metadata say mean: '0.5'"),
    ],
)
def test_a_run_whose_config_is_odd_is_named(config: Any, message: str, tmp_path: Path):
    value = zoo.ZOO["this project, training run"][0](A, B) | {"config": config}
    with pytest.raises(UserError, match=message):
        load_backbone(save(value, tmp_path / "checkpoint.pt"))


@pytest.mark.filterwarnings("error")
def test_parameters_are_taken_as_tensors_are(tmp_path: Path):
    value = {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in A.items()}
    assert same(load_backbone(save(value, tmp_path / "m.pth")).model, A)


def stirred(model: nn.Module) -> nn.Module:
    """BatchNorm statistics other than 0 and 1, so that a buffer in a wrong place changes the output."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_files_that_timm_and_torchvision_write(tmp_path: Path):
    image = torch.rand(2, 3, 64, 64)
    model = stirred(timm.create_model("resnet18"))
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    found = load_backbone(tmp_path / "hub" / "model.safetensors")
    assert torch.equal(found.model(image), model.forward_head(model.forward_features(image), pre_logits=True))
    saver = timm.utils.CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), model_ema=timm.utils.ModelEmaV3(model),
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), args=None,
    )  # fmt: skip
    saver.save_checkpoint(0, metric=1.0)
    for branch in ("online", "ema"):
        found = load_backbone(tmp_path / "last.pth.tar", branch=branch)
        assert found.arch == "resnet18"
        assert torch.equal(found.model.conv1.weight, model.conv1.weight)
    vision = stirred(torchvision.models.resnet18())
    found = load_backbone(save(vision.state_dict(), tmp_path / "tv.pth"))
    vision.fc = nn.Identity()
    torch.testing.assert_close(found.model(image), vision(image))


class SimCLR(nn.Module):
    """As lightly's examples build it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(stirred(torchvision.models.resnet18()).children())[:-1])
        self.projection_head = lightly.models.modules.SimCLRProjectionHead(512, 512, 128)


def test_files_that_lightly_writes(tmp_path: Path):
    image = torch.rand(2, 3, 64, 64)
    simclr = SimCLR().eval()
    found = load_backbone(save({"state_dict": simclr.state_dict()}, tmp_path / "simclr.ckpt"))
    assert found.format == "lightly examples"
    torch.testing.assert_close(found.model(image), simclr.backbone(image).flatten(1))

    class DINO(nn.Module):  # as lightly's ImageNet benchmark builds it: backbone is the teacher
        def __init__(self) -> None:
            super().__init__()
            self.backbone = stirred(torchvision.models.resnet18())
            self.backbone.fc = nn.Identity()
            self.projection_head = lightly.models.modules.DINOProjectionHead(512, 64, 32, 128)
            self.student_backbone = stirred(copy.deepcopy(self.backbone))
            self.student_projection_head = lightly.models.modules.DINOProjectionHead(512, 64, 32, 128)
            self.criterion = lightly.loss.DINOLoss(output_dim=128)
            self.online_classifier = lightly.utils.benchmarking.OnlineLinearClassifier(512, 10)

    dino = DINO().eval()
    path = save({"state_dict": dino.state_dict(), "pytorch-lightning_version": "2.0"}, tmp_path / "dino.ckpt")
    torch.testing.assert_close(load_backbone(path).model(image), dino.student_backbone(image))
    torch.testing.assert_close(load_backbone(path, branch="ema").model(image), dino.backbone(image))


def test_a_file_that_lightning_writes(tmp_path: Path):
    """With an OmegaConf configuration and NumPy scalars among the hyperparameters, as solo-learn's hold."""
    pl = pytest.importorskip("pytorch_lightning")

    class Method(pl.LightningModule):
        def __init__(self, cfg: Any, best: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.backbone = stirred(torchvision.models.resnet18())
            self.backbone.fc = nn.Identity()
            self.projector = nn.Linear(512, 8)
            self.classifier = nn.Linear(512, 3)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.classifier(self.projector(self.backbone(batch[0])) @ torch.ones(8, 512)).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)

    method = Method(OmegaConf.create({"method": "vicreg", "sizes": [1, 2]}), np.float64(71.5))
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    images = torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32))
    trainer.fit(method, torch.utils.data.DataLoader(images, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    found = load_backbone(tmp_path / "last.ckpt")
    assert found.format == "solo-learn" and any("omegaconf" in note for note in found.notes)
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(found.model(image), method.eval().backbone(image))


def test_a_file_replaced_while_it_is_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(A, tmp_path / "m.pth")
    read = transfer.checkpoints.backbone.load_found

    def read_and_replace(*args: Any, **options: Any) -> Any:
        loaded = read(*args, **options)
        save(B, tmp_path / "new.pth").replace(path)
        return loaded

    monkeypatch.setattr(transfer.checkpoints.backbone, "load_found", read_and_replace)
    with pytest.raises(UserError, match="was replaced while it was read"):
        load_backbone(path)


def test_a_module_with_its_classifier_is_told() -> None:
    network = timm.create_model("resnet18")
    (note,) = backbone_of_module(network).notes
    assert "its last layer, fc, looks like a classifier" in note
    network.fc = torch.nn.Identity()
    assert backbone_of_module(network).notes == ()


def test_an_option_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load_backbone has no option branchh; there are"):
        load_backbone(tmp_path / "a.pth", branchh="ema")
