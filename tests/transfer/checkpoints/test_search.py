"""Networks are found wherever they lie; what cannot be explained is named with the words that take it."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from pretrain.common.errors import UserError
from tests.helpers import checkpoint_zoo as zoo
from transfer.checkpoints.backbone import Found, find
from transfer.checkpoints.safe_load import load_file
from transfer.options.weights import WeightsOptions

A, B = zoo.backbone(0), zoo.backbone(1)


def read(value: Any, tmp_path: Path, **options: Any) -> Found:
    path = tmp_path / "m.pth"
    torch.save(value, path)
    return find(load_file(path), path, WeightsOptions(**options))


def takes(found: Found, state: dict[str, Any]) -> bool:
    held = found.reading.tensors
    return held.keys() == state.keys() and all(torch.equal(held[k], torch.as_tensor(state[k])) for k in state)


def test_a_tensor_at_the_top_hides_nothing(tmp_path: Path):
    """MoCo's main_lincls.py writes best_acc1 as a tensor of the GPU."""
    value = {
        "epoch": 1,
        "arch": "resnet18",
        "best_acc1": torch.tensor([71.0]),
        "state_dict": zoo.pre("module.", A),
    }
    assert takes(read(value, tmp_path), A)


NESTS = {
    "deep": lambda a: {"run": {"parts": [None, {"net": zoo.pre("backbone.", a)}]}},
    "tuple": lambda a: ("v1", (3, a)),
    "ordered": lambda a: collections.OrderedDict(weights=collections.OrderedDict(a)),
    "arrays": lambda a: {"params": {k: v.numpy() for k, v in a.items()}},
    "a list": lambda a: [zoo.pre("encoder.", a)],
    "layer0": lambda a: {  # as fastai and many segmentation codes group the stem
        {"conv1": "layer0.0", "bn1": "layer0.1"}.get(k.split(".")[0], k.split(".")[0])
        + k[len(k.split(".")[0]) :]: v
        for k, v in a.items()
    },
    "shortcut": lambda a: {"net": {k.replace("downsample", "shortcut"): v for k, v in a.items()}},
    "Sequential, no pool": lambda a: {"state": zoo.pre("model.f.", zoo.numbered_without_pool(a))},
    "own classifier": lambda a: {"state": zoo.pre("net.", a) | zoo.head("net.fc.")},
}  # fmt: skip


@pytest.mark.parametrize("name", NESTS)
def test_found_at_any_depth_under_any_name(name: str, tmp_path: Path):
    assert takes(read(NESTS[name](A), tmp_path), A)


def test_a_whole_pickled_module_gives_its_tensors_and_runs_nothing(tmp_path: Path):
    model = torchvision.models.resnet18()
    for legacy in (False, True):
        path = tmp_path / "whole.pth"
        torch.save(nn.DataParallel(model), path, _use_new_zipfile_serialization=not legacy)
        found = find(load_file(path), path, WeightsOptions())
        assert takes(found, {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
        assert any("its code was not run" in note for note in found.notes)


def test_leftovers_are_named_with_the_words_that_take_the_rest(tmp_path: Path):
    value = {"state_dict": zoo.pre("model.resnet.", A) | zoo.linear("model.fc.")}
    with pytest.raises(UserError) as error:
        read(value, tmp_path)
    assert (
        "state_dict holds a complete resnet18 under `model.resnet.`; left over: `model.fc.` (2). "
        "Take it with --prefix model.resnet. --drop model.fc."
    ) in str(error.value)
    found = read(value, tmp_path, prefix="model.resnet.", drop="model.fc.")
    assert takes(found, A)
    assert found.weights["read_with"] == "--prefix model.resnet. --drop model.fc."
    assert found.reading.dropped == {"model.fc.weight": "--drop", "model.fc.bias": "--drop"}


def test_words_that_fit_nothing_say_what_there_is(tmp_path: Path):
    value = {"state_dict": zoo.pre("model.resnet.", A)}
    for options, said in (
        ({"prefix": "resnet."}, r"--prefix resnet\.: .* there are `model\.resnet\.`"),
        ({"container": "model"}, r"--container model: no tensors there; they are in `state_dict`"),
        ({"drop": "model.fc."}, r"--drop model\.fc\.: no key begins like this"),
    ):
        with pytest.raises(UserError, match=said):
            read(value, tmp_path, **options)


def test_branches_by_their_names_under_any_writer(tmp_path: Path):
    pairs = {
        "teacher": {"net": zoo.pre("student_net.", A) | zoo.pre("teacher_net.", B)},
        "plain and momentum": {"net": zoo.pre("trunk.", A) | zoo.pre("trunk_momentum.", B)},
        "student and plain": {"net": zoo.pre("trunk_student.", A) | zoo.pre("trunk.", B)},
        "in two containers": {"net": A, "net_ema": B},
        "torchvision's references": {"model": A | zoo.linear("fc."), "model_ema": zoo.pre("module.", B)
                                     | zoo.linear("module.fc.") | {"n_averaged": torch.tensor(7)}},
        "Lightning's weight averaging": zoo.lightning(zoo.pre("backbone.", B))
        | {"current_model_state": zoo.pre("backbone.", A), "averaging_state": {"n": torch.tensor(7)}},
    }  # fmt: skip
    for name, value in pairs.items():
        for branch, state in (("online", A), ("ema", B)):
            found = read(value, tmp_path, branch=branch)
            assert takes(found, state) and found.weights["branch"] == branch, (name, branch)


def test_weight_averaging_as_lightning_itself_writes_it(tmp_path: Path):
    pl = pytest.importorskip("pytorch_lightning")
    callback = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging").EMAWeightAveraging

    class Method(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torchvision.models.resnet18()
            self.backbone.fc = nn.Identity()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.backbone(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    method = Method()
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback(decay=0.5)],
    )  # fmt: skip
    images = torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32))
    trainer.fit(method, torch.utils.data.DataLoader(images, batch_size=2))
    path = tmp_path / "averaged.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["backbone.conv1.weight"] += 1  # however little two steps change
    torch.save(saved, path)
    weights = {
        branch: find(load_file(path), path, WeightsOptions(branch=branch)).reading.tensors["conv1.weight"]
        for branch in ("online", "ema")
    }
    assert torch.equal(weights["online"], saved["current_model_state"]["backbone.conv1.weight"])
    assert torch.equal(weights["ema"], saved["state_dict"]["backbone.conv1.weight"])


def test_a_layout_of_ones_own(tmp_path: Path):
    layout = tmp_path / "mine.yaml"
    layout.write_text(
        "name: my lab\nonline: [{container: net.w, prefix: trunk/}]\n"
        "ema: [{container: net.m, prefix: trunk/}]\n"
        "rename: {entry.: conv1., entry_norm.: bn1., s1.: layer1., s2.: layer2., s3.: layer3., "
        "s4.: layer4.}\n"
        "drop: {probe: probe}\ncifar_padding: 1\n"
    )
    names = {"conv1": "entry", "bn1": "entry_norm", **{f"layer{i}": f"s{i}" for i in (1, 2, 3, 4)}}

    def mine(state: dict[str, Any]) -> dict[str, Any]:
        renamed = {".".join([names[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()}
        return zoo.pre("trunk/", renamed) | {"probe.w": torch.ones(2)}

    value = {"net": {"w": mine(A), "m": mine(B)}}
    for branch, state in (("online", A), ("ema", B)):
        found = read(value, tmp_path, branch=branch, weights_format=str(layout))
        assert takes(found, state) and found.weights["format"] == "my lab"
        assert any("assumed, as the file cannot tell" in note for note in found.notes)
    plain = read({"state_dict": A}, tmp_path, weights_format=str(layout))  # of another writer
    assert takes(plain, A)
    assert any("does not fit it: no network lies at the places that it names" in n for n in plain.notes)
    assert "read_with" not in plain.weights
    renamed = layout.read_text().replace("entry.: conv1.", "entri.: conv1.")
    layout.write_text(renamed)
    with pytest.raises(UserError, match=r"mine.yaml does not fit it: \d+ keys are missing and \d+ left over"):
        read(value, tmp_path, weights_format=str(layout))
    for text, said in (
        ("onlin: []", "wanted a YAML mapping with `online`"),
        ("online: [{prefix: a.}]\nstrict: false", "unknown strict; there are name, online"),
        ("online: [a.]", "online: wanted a list of places"),
        ("online: [{prefix: a.}]\ncifar_padding: two", "cifar_padding 'two': wanted 0 to 8"),
        ("online: [{prefix: a.}]\ndrop: [a.]", "drop: wanted a mapping"),
        ("a: [", "cannot be read"),
    ):
        layout.write_text(text)
        with pytest.raises(UserError, match=said):
            read(value, tmp_path, weights_format=str(layout))


def test_what_is_no_resnet_is_told_with_a_way_on(tmp_path: Path):
    shapes = {
        "blocks.0.attn.qkv.weight": "vision transformer", "stages.0.0.gamma": "ConvNeXt",
        "visual.attnpool.k_proj.weight": "CLIP", "res2.0.conv1.weight": "convert --reverse",
        "trunk_output.block1.weight": "RegNet", "w.0.kernel": "--weights-format FILE.yaml",
    }  # fmt: skip
    for key, said in shapes.items():
        with pytest.raises(UserError, match=said):
            read({"state_dict": {key: torch.zeros(2, 2)}}, tmp_path)
    with pytest.raises(UserError, match="no tensors in it, only 'args'"):
        read({"args": 3}, tmp_path)
    quantised = torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.qint8)
    with pytest.raises(UserError, match="quantised; give the float"):
        read({"model": {"conv1.weight": quantised}}, tmp_path)
    for channels in (4, 12):
        bands = {k: torch.zeros(64, channels, 7, 7) if k == "conv1.weight" else v for k, v in A.items()}
        with pytest.raises(UserError, match=f"takes {channels} channels instead of RGB.*red, green and blue"):
            read(bands, tmp_path)


def test_squeeze_and_excitation_by_arch(tmp_path: Path):
    state = zoo.backbone(arch="seresnet18")
    with pytest.raises(UserError, match=r"`--arch seresnet18` works"):
        read({"state_dict": state}, tmp_path)
    assert takes(read({"state_dict": state}, tmp_path, arch="seresnet18"), state)


def test_numbers_of_numpy_files_are_read_bare(tmp_path: Path):
    import pickle

    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"model": {k: np.asarray(v) for k, v in A.items()}}))
    assert takes(find(load_file(path), path, WeightsOptions()), A)
