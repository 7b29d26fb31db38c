"""Layouts of public repositories, rebuilt: each is read right, or by the words that it answers with.

Each name is that of the repository whose code says which keys such a file has.
"""

from __future__ import annotations

import pickle
import re
import shlex
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.common.errors import UserError
from tests.helpers import checkpoint_zoo as zoo
from tests.helpers.checkpoint_zoo import head, indexed, linear, pre
from transfer.checkpoints.backbone import Found, find
from transfer.checkpoints.safe_load import load_file
from transfer.options.weights import WeightsOptions

A, B = zoo.backbone(0), zoo.backbone(1)
A3 = A | {"conv1.weight": torch.rand(64, 3, 3, 3)}
BARE = {k: v for k, v in A.items() if "num_batches" not in k}
"""As FrozenBatchNorm writes it, without counters."""


def one(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.rand(shape or (4,))}


def renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {".".join([names[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()}


OBOW = {"conv1": "0.Conv", "bn1": "0.bn", "layer1": "1", "layer2": "2", "layer3": "3", "layer4": "4"}
PADDLE = {k.replace("running_mean", "_mean").replace("running_var", "_variance"): v.numpy()
          for k, v in BARE.items()}  # fmt: skip

TAKEN: dict[str, Any] = {
    "valeoai/obow": {"network": pre("_feature_blocks.", renamed(A, OBOW))},
    "fundamentalvision/UniGrad": zoo.trainer(
        model=pre("module.encoder.", indexed(A)) | pre("module.momentum_encoder.", indexed(B))
        | head("module.projector.0.") | head("module.momentum_projector.0.")
    ),
    "facebookresearch/directclr, final": {"backbone": A, "head": linear("")},
    "maple-research-lab/CaCo": zoo.trainer(
        state_dict=pre("module.encoder_q.", A) | head("module.encoder_q.fc.")
        | pre("module.encoder_k.", B) | head("module.encoder_k.fc."),
        Memory_Bank={"W": torch.rand(4, 9)},
    ),
    "mosaicml/composer": {"state": {"model": pre("module.", A | linear("fc.")), "optimizers": {}}, "rng": []},
    "huggingface/transformers, TimmWrapper": pre("timm_model.", A | linear("fc.")),
    "PaddlePaddle/PASSL": PADDLE,
}  # fmt: skip
ASKED: dict[str, Any] = {
    "winci-ai/CW-RGP": zoo.trainer(state_dict=pre("module.model.", A) | head("module.head.")),
    "htdt/self-supervised, CIFAR": pre("model.module.", A3) | head("head."),
    "UMBCvision/MSF": zoo.trainer(
        state_dict=pre("encoder_q.module.", A) | head("encoder_q.module.fc.") | pre("encoder_t.module.", B)
        | head("encoder_t.module.fc.") | head("predict_q.module.") | one("queue") | one("labels")
    ),
    "facebookresearch/directclr": zoo.trainer(model=pre("module.backbone.", A) | head("module.online_head.")),
    "facebookresearch/suncet": zoo.trainer(
        encoder=pre("module.", A) | one("module.fc.fc1.weight") | one("module.pred.fc1.weight")
    ),
    "sthalles/PyTorch-BYOL": {
        "online_network_state_dict": pre("encoder.", indexed(A)) | head("projetion.net."),
        "target_network_state_dict": pre("encoder.", indexed(B)) | head("projetion.net."),
    },
    "hologerry/SoCo": zoo.trainer(
        model=pre("module.encoder.", A) | pre("module.encoder_k.", B) | head("module.projector.linear1.")
        | head("module.projector_k.linear1.") | one("module.queue")
    ),
    "PatrickHua/SimSiam": zoo.trainer(
        state_dict=pre("module.encoder.", indexed(A)) | one("module.encoder.9.layer1.0.weight")
        | one("module.encoder.9.layer2.0.weight") | one("module.predictor.layer1.0.weight")
    ),
    "PatrickHua/SimSiam, the backbone twice": zoo.trainer(
        state_dict=pre("module.backbone.", A) | pre("module.encoder.0.", A)
        | one("module.projector.layer1.0.weight") | one("module.encoder.1.layer1.0.weight")
    ),
    "MadryLab/robustness": {
        "model": one("module.normalizer.new_mean", 3, 1, 1) | pre("module.model.", A | linear("fc."))
        | one("module.attacker.normalize.new_mean", 3, 1, 1)
        | pre("module.attacker.model.", A | linear("fc.")),
    },
    "fastai/fastai": {"model": pre("0.", indexed(A)) | one("1.2.weight") | one("1.8.weight", 10, 512)},
    "Lightning-Universe/lightning-bolts": zoo.lightning(
        pre("encoder.", A | linear("fc.")) | head("projection.model.")
    ),
    "JDAI-CV/fast-reid": {
        "model": pre("backbone.", A) | one("heads.weight", 4, 4) | one("pixel_mean", 1, 3, 1, 1),
    },
    "layumi/Person_reID_baseline_pytorch": pre("model.", A | linear("fc.")) | head("classifier.add_block."),
    "pytorch/vision, Faster R-CNN": pre("backbone.body.", BARE)
    | one("backbone.fpn.inner_blocks.0.0.weight", 4, 4, 1, 1) | one("rpn.head.conv.0.0.weight", 4, 4, 3, 3),
    "pytorch/vision, DeepLabV3": pre("backbone.", A) | one("classifier.0.convs.0.0.weight", 4, 512, 1, 1)
    | one("aux_classifier.0.weight", 4, 256, 3, 3),
    "facebookresearch/detr": zoo.trainer(
        model=pre("backbone.0.body.", BARE) | one("transformer.encoder.layers.0.linear1.weight")
    ),
    "qubvel-org/segmentation_models.pytorch": zoo.lightning(
        pre("model.encoder.", A) | one("model.decoder.blocks.0.conv1.0.weight", 4, 4, 3, 3)
    ),
    "lightly-ai/lightly-train": zoo.lightning(
        pre("student_embedding_model.wrapped_model._model.", A) | head("student_projection_head.")
        | pre("teacher_embedding_model.wrapped_model._model.", B) | head("teacher_projection_head.")
    ),
    "KaiyangZhou/deep-person-reid": zoo.trainer(state_dict=pre("module.", A | linear("classifier."))),
}  # fmt: skip


def conv3d(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v[..., None] if v.dim() == 4 else v for k, v in state.items()}


OTHERS: dict[str, tuple[Any, str]] = {
    "akamaster/pytorch_resnet_cifar10": (
        one("conv1.weight", 16, 3, 3, 3) | one("layer1.0.conv1.weight", 16, 16, 3, 3)
        | one("layer3.0.conv1.weight", 64, 32, 3, 3), "a CIFAR ResNet of three stages",
    ),
    "deepinsight/insightface": (A3 | one("layer1.0.prelu.weight", 64), "an iresnet of face recognition"),
    "kenshohara/3D-ResNets-PyTorch": ({"state_dict": conv3d(A)}, "its convolutions are 3D"),
    "pytorch/vision, r3d_18": (
        one("stem.0.weight", 64, 3, 3, 7, 7) | one("layer1.0.conv1.0.weight", 64, 64, 3, 3, 3),
        "its convolutions are 3D",
    ),
    "XingangPan/IBN-Net": (A | one("layer1.0.bn1.IN.weight", 32), "an IBN-Net"),
    "kjunelee/MetaOptNet": (
        one("e.layer1.0.conv1.weight", 64, 3, 3, 3) | one("e.layer1.0.conv3.weight", 64, 64, 3, 3),
        "a ResNet-12 of few-shot learning",
    ),
    "Separius/SimCLRv2-Pytorch": (
        {"resnet": one("net.0.0.weight", 64, 3, 7, 7) | one("net.1.blocks.0.net.0.weight", 64, 64, 1, 1)},
        "none named as a ResNet's blocks",
    ),
}  # fmt: skip


def read(value: Any, tmp_path: Path, **options: Any) -> Found:
    file = tmp_path / "m.pth"
    torch.save(value, file)
    return find(load_file(file), file, WeightsOptions(**options))


def numbers(state: dict[str, torch.Tensor]) -> float:
    """Another number for other tensors, and for the same ones under other names; counters are all alike."""
    weights = {k: zlib.crc32(k.encode()) % 997 for k in state if "batches" not in k}
    return sum(n * state[k].double().sum().item() for k, n in weights.items())


RIGHT = [pytest.approx(numbers(s), rel=1e-12) for s in (A, B, A3)]


@pytest.mark.parametrize("name", TAKEN)
def test_taken_as_it_is(name: str, tmp_path: Path) -> None:
    if name == "PaddlePaddle/PASSL":
        file = tmp_path / "m.pdparams"
        file.write_bytes(pickle.dumps(PADDLE, protocol=4))
        found = find(load_file(file), file, WeightsOptions())
    else:
        found = read(TAKEN[name], tmp_path)
    assert numbers(found.reading.tensors) == RIGHT[0]


@pytest.mark.parametrize("name", ASKED)
def test_every_way_that_is_named_leads_to_a_network_of_the_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        read(ASKED[name], tmp_path)
    ways = re.findall(r"Take it with ((?:--[\w-]+ \S+ ?)+)", str(told.value))
    assert ways
    found = []
    for way in ways:
        words = shlex.split(way)
        options = {o[2:].replace("-", "_"): v for o, v in zip(words[::2], words[1::2])}
        found.append(numbers(read(ASKED[name], tmp_path, **options).reading.tensors))
    there = RIGHT[2:] if "CIFAR" in name else RIGHT[:2]
    assert there[0] in found and all(n in there for n in found)


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_named_with_the_way_on(name: str, tmp_path: Path) -> None:
    value, said = OTHERS[name]
    with pytest.raises(UserError) as told:
        read(value, tmp_path)
    assert said in str(told.value) and "transfer.evaluate(module, ...) (docs/python.md)" in str(told.value)
