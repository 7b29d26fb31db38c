"""Builders of a small checkpoint of every known format, laid out by hand as the writers do.

Nothing here reads `transfer.checkpoints.formats`: the layouts are written down a second time, so that reader
and writer do not share a mistake. Tensors of a state dict are windows on one random vector: each has
values of its own, and a file is a tenth of its usual size.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

State = dict[str, Tensor]
INDEX = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def backbone(seed: int = 0, *, arch: str = "resnet18", cifar: bool = False) -> State:
    """A backbone's state dict under timm's (and torchvision's) names."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in timm.create_model(arch, num_classes=0).state_dict().items()}
    if cifar:
        shapes["conv1.weight"] = (64, 3, 3, 3)
    longest = max(torch.Size(shape).numel() for shape in shapes.values())
    pool = torch.rand(longest + 4096, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.01
    state = {}
    for i, (key, shape) in enumerate(shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1000 * (seed + 1) + i)
        else:
            start = zlib.crc32(key.encode()) % 4096
            state[key] = pool[start : start + torch.Size(shape).numel()].view(shape)
    return state


def pre(prefix: str, state: State) -> State:
    """The state dict with `prefix` before every key."""
    return {prefix + key: value for key, value in state.items()}


def head(prefix: str, seed: int = 7) -> State:
    """A two-layer head with a BatchNorm."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}0.weight": torch.rand(8, 16, generator=draw),
        f"{prefix}1.running_var": torch.rand(8, generator=draw),
        f"{prefix}1.num_batches_tracked": torch.tensor(3),
        f"{prefix}3.weight": torch.rand(4, 8, generator=draw),
        f"{prefix}3.bias": torch.rand(4, generator=draw),
    }


def linear(prefix: str) -> State:
    """A linear layer."""
    return {f"{prefix}weight": torch.rand(4, 16), f"{prefix}bias": torch.rand(4)}


def indexed(state: State) -> State:
    """torchvision's names as nn.Sequential(*list(resnet.children())[:-1]) spells them."""
    return {".".join([INDEX[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()}


def numbered_without_pool(state: State) -> State:
    """The same where the writer leaves out the max-pool, so that the stages are 3 to 6."""
    index = {**INDEX, "layer1": "3", "layer2": "4", "layer3": "5", "layer4": "6"}
    return {".".join([index[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in state.items()}


def trainer(**more: Any) -> dict[str, Any]:
    """What training scripts write beside the weights."""
    return {
        "epoch": 99,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        **more,
    }


def lightning(state: State) -> dict[str, Any]:
    """The frame of a Lightning checkpoint."""
    return {
        "epoch": 9, "global_step": 90, "pytorch-lightning_version": "2.1.0", "state_dict": state, "loops": {},
        "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"batch_size": 256},
    }  # fmt: skip


Builder = Callable[[State, State], Any]

# format's name in the table -> (file as its writer lays it out, whether it has an EMA branch)
ZOO: dict[str, tuple[Builder, bool]] = {
    "this project, training run": (
        lambda a, b: {
            "format": "intl-bench/1",
            "step": 10,
            "epoch": 2,
            "scaler": {},
            "rng": {},
            "data": {},
            "config": {
                "arch": "resnet18",
                "stem": "imagenet",
                "view_sizes": [48, 48],
                "mean": [0.1, 0.2, 0.3],
                "std": [1.0, 1.0, 1.0],
                "eval_size": None,
                "dataset": "cifar10",
                "seed": 3,
                "epochs": 2,
            },
            "model": pre("backbone.", a) | head("projector."),
            "optimizer": {},
            "ema": pre("backbone.", b) | head("projector."),
        },
        True,
    ),
    "INTL": (
        lambda a, b: trainer(
            arch="resnet18",
            state_dict=pre("module.backbone.", a)
            | head("module.projection.")
            | pre("module.momentum_backbone.", b)
            | head("module.momentum_projection."),
        ),
        True,
    ),
    "MoCo v1, v2; PCL": (
        lambda a, b: trainer(
            arch="resnet18",
            state_dict=pre("module.encoder_q.", a)
            | head("module.encoder_q.fc.")
            | pre("module.encoder_k.", b)
            | head("module.encoder_k.fc.")
            | {"module.queue": torch.rand(8, 4), "module.queue_ptr": torch.tensor([3])},
        ),
        True,
    ),
    "MoCo v3": (
        lambda a, b: trainer(
            arch="resnet18",
            scaler={},
            state_dict=pre("module.base_encoder.", a)
            | head("module.base_encoder.fc.")
            | pre("module.momentum_encoder.", b)
            | head("module.momentum_encoder.fc.")
            | head("module.predictor."),
        ),
        True,
    ),
    "SimSiam": (
        lambda a, b: trainer(
            arch="resnet18",
            state_dict=pre("module.encoder.", a) | head("module.encoder.fc.") | head("module.predictor."),
        ),
        False,
    ),
    "Barlow Twins, VICReg": (
        lambda a, b: trainer(
            model=pre("module.backbone.", a)
            | head("module.projector.")
            | {
                "module.bn.running_mean": torch.rand(4),
                "module.bn.running_var": torch.rand(4),
                "module.bn.num_batches_tracked": torch.tensor(3),
            }
        ),
        False,
    ),
    "torchvision or timm": (lambda a, b: a | linear("fc."), False),
    "SwAV, DeepCluster-v2, SeLa-v2": (
        lambda a, b: pre("module.", a | head("projection_head.") | {"prototypes.weight": torch.rand(5, 4)}),
        False,
    ),
    "DINO": (
        lambda a, b: trainer(
            args=argparse.Namespace(arch="resnet18", lr=0.03),
            dino_loss={"center": torch.zeros(1, 4)},
            student=pre("module.backbone.", a)
            | head("module.head.mlp.")
            | {"module.head.last_layer.weight_g": torch.ones(4, 1)},
            teacher=pre("backbone.", b) | head("head.mlp."),
        ),
        True,
    ),
    "solo-learn": (
        lambda a, b: lightning(
            pre("backbone.", a)
            | pre("momentum_backbone.", b)
            | head("projector.")
            | head("momentum_projector.")
            | linear("classifier.")
            | linear("momentum_classifier.")
            | head("predictor.")
        ),
        True,
    ),
    "lightly benchmarks": (
        lambda a, b: lightning(
            pre("backbone.", a)
            | head("projection_head.layers.")
            | head("prediction_head.layers.")
            | pre("teacher_backbone.", b)
            | head("teacher_projection_head.layers.")
            | linear("online_classifier.linear.")
        ),
        True,
    ),
    "lightly benchmarks: DINO, older MoCo and TiCo": (
        lambda a, b: lightning(
            pre("student_backbone.", a)
            | pre("backbone.", b)
            | head("projection_head.layers.")
            | head("student_projection_head.layers.")
            | linear("online_classifier.linear.")
            | {"criterion.center": torch.zeros(1, 1, 4)}
        ),
        True,
    ),
    "lightly examples": (
        lambda a, b: lightning(pre("backbone.", indexed(a)) | head("projection_head.layers.")),
        False,
    ),
    "VISSL": (
        lambda a, b: {
            "phase_idx": 3,
            "iteration": 10,
            "loss": {},
            "type": "consolidated",
            "classy_state_dict": {
                "train": True,
                "base_model": {
                    "meters": {},
                    "model": {"trunk": pre("_feature_blocks.", a), "heads": head("0.clf.")},
                },
            },
        },
        False,
    ),
    "mmselfsup, mmpretrain": (
        lambda a, b: {
            "meta": {"epoch": 200},
            "state_dict": pre("backbone.", a)
            | head("neck.")
            | head("head.")
            | {"data_preprocessor.mean": torch.rand(3, 1, 1)},
        },
        False,
    ),
    "InfoMin, InsDis, PIRL (PyContrast)": (
        lambda a, b: trainer(
            opt=argparse.Namespace(method="InfoMin"),
            model=pre("module.encoder.", a) | head("module.head."),
            model_ema=pre("encoder.", b) | head("head."),
            contrast={"memory_1": torch.rand(3, 4)},
        ),
        True,
    ),
    "ReSSL": (
        lambda a, b: trainer(
            model=pre("module.encoder_q.net.", a)
            | head("module.encoder_q.head.")
            | pre("module.encoder_k.net.", b)
            | head("module.encoder_k.head.")
            | {"module.queue": torch.rand(4, 8), "module.queue_ptr": torch.tensor([0])}
        ),
        True,
    ),
    "stable-pretraining": (
        lambda a, b: lightning(
            pre("backbone.student.", a)
            | pre("backbone.teacher.", b)
            | {"backbone.ema_coefficient": torch.tensor(0.99)}
            | {"backbone.base_ema_coefficient": torch.tensor(0.99)}
            | {"backbone.final_ema_coefficient": torch.tensor(1.0)}
            | head("projector.student.")
            | head("projector.teacher.")
            | linear("callbacks_modules.linear_probe.")
        ),
        True,
    ),
    "mmselfsup, DenseCL and MoCo in training": (
        lambda a, b: {
            "meta": {"epoch": 200},
            "state_dict": pre("encoder_q.0.", a)
            | head("encoder_q.1.mlp.")
            | pre("encoder_k.0.", b)
            | head("encoder_k.1.mlp.")
            | {"queue": torch.rand(4, 8), "queue2": torch.rand(4, 8), "queue_ptr": torch.tensor([0])},
        },
        True,
    ),
    "ReSA": (
        lambda a, b: trainer(
            state_dict=pre("module.encoder.", a)
            | head("module.projector.")
            | pre("module.momentum_encoder.", b)
            | head("module.momentum_projector.")
        ),
        True,
    ),
    "PixPro": (
        lambda a, b: trainer(
            opt=argparse.Namespace(model="PixPro"),
            model=pre("module.encoder.", a)
            | pre("module.encoder_k.", b)
            | {
                "module.projector.linear1.weight": torch.rand(4, 8, 1, 1),
                "module.projector_k.linear1.weight": torch.rand(4, 8, 1, 1),
                "module.value_transform.weight": torch.rand(4, 4, 1, 1),
            },
        ),
        True,
    ),
    "VICRegL": (
        lambda a, b: trainer(
            model=pre("module.backbone.", a)
            | head("module.maps_projector.")
            | head("module.projector.")
            | linear("module.classifier.")
        ),
        False,
    ),
    "SupContrast": (
        lambda a, b: {
            "opt": argparse.Namespace(temp=0.1),
            "model": pre("encoder.module.", {k.replace("downsample", "shortcut"): v for k, v in a.items()})
            | head("head."),
            "optimizer": {},
            "epoch": 3,
        },
        False,
    ),
    "SimCLR (PyTorch), head in the place of fc": (
        lambda a, b: trainer(arch="resnet18", state_dict=pre("backbone.", a) | head("backbone.fc.")),
        False,
    ),
    "SimCLR (PyTorch), f and g": (lambda a, b: pre("f.", numbered_without_pool(a)) | head("g."), False),
    "BYOL (PyTorch)": (
        lambda a, b: (
            pre("online_encoder.net.", a)
            | head("online_encoder.projector.")
            | pre("target_encoder.net.", b)
            | head("target_encoder.projector.")
            | head("online_predictor.")
        ),
        True,
    ),
    "SeCo": (
        lambda a, b: lightning(
            pre("encoder_q.", indexed(a))
            | pre("encoder_k.", indexed(b))
            | head("heads_q.0.")
            | head("heads_k.0.")
            | {"queue": torch.rand(3, 4, 8)}
        ),
        True,
    ),
}

# The same writers' other layouts: (format, file, branch to ask for, which of `a` and `b` that is)
VARIANTS: dict[str, tuple[str, Builder, str, str]] = {
    "backbone file of Barlow Twins, VICReg, DINO": ("torchvision or timm", lambda a, b: a, "online", "a"),
    "MoCo's linear probe": (
        "torchvision or timm",
        lambda a, b: trainer(state_dict=pre("module.", a | linear("fc."))),
        "online",
        "a",
    ),
    "timm's train.py": (
        "torchvision or timm",
        lambda a, b: trainer(arch="resnet18", state_dict=a | linear("fc."), state_dict_ema=b | linear("fc.")),
        "ema",
        "b",
    ),
    "SwAV with container": (
        "SwAV, DeepCluster-v2, SeLa-v2",
        lambda a, b: trainer(
            state_dict=pre("module.", a | head("projection_head.") | {"prototypes.weight": torch.rand(5, 4)})
        ),
        "online",
        "a",
    ),
    "DINO's teacher, DDP": (
        "DINO",
        lambda a, b: trainer(
            student=pre("module.backbone.", a) | head("module.head."),
            teacher=pre("module.backbone.", b) | head("module.head."),
        ),
        "ema",
        "b",
    ),
    "solo-learn, old": (
        "solo-learn",
        lambda a, b: lightning(pre("encoder.", a) | head("projector.") | linear("classifier.")),
        "online",
        "a",
    ),
    "lightly MoCo, key encoder": (
        "lightly benchmarks",
        lambda a, b: lightning(
            pre("backbone.", a)
            | pre("key_backbone.", b)
            | head("projection_head.layers.")
            | head("key_projection_head.layers.")
            | linear("online_classifier.linear.")
        ),
        "ema",
        "b",
    ),
    "lightly TiCo": (
        "lightly benchmarks",
        lambda a, b: lightning(pre("backbone.", a) | pre("backbone_momentum.", b) | head("projection_head.")),
        "ema",
        "b",
    ),
    "lightly MoCo, older: backbone is the momentum branch": (
        "lightly benchmarks: DINO, older MoCo and TiCo",
        lambda a, b: lightning(
            pre("query_backbone.", a)
            | pre("backbone.", b)
            | head("projection_head.layers.")
            | head("query_projection_head.layers.")
        ),
        "online",
        "a",
    ),
    "VISSL, model_state_dict": (
        "VISSL",
        lambda a, b: {"model_state_dict": pre("_feature_blocks.", a)},
        "online",
        "a",
    ),
    "stable-pretraining, one network": (
        "stable-pretraining",
        lambda a, b: lightning(pre("backbone.", a) | head("projector.") | linear("callbacks_modules.probe.")),
        "online",
        "a",
    ),
    "flat, without its container": (
        "MoCo v1, v2; PCL",
        lambda a, b: pre("encoder_q.", a) | head("encoder_q.fc."),
        "online",
        "a",
    ),
    "compiled, then DDP": (
        "MoCo v3",
        lambda a, b: trainer(state_dict=pre("module._orig_mod.base_encoder.", a)),
        "online",
        "a",
    ),
    "DDP, then compiled": (
        "MoCo v3",
        lambda a, b: trainer(state_dict=pre("_orig_mod.module.base_encoder.", a)),
        "online",
        "a",
    ),
    "mmselfsup in training, whose backbone is encoder_q[0] once more": (
        "mmselfsup, DenseCL and MoCo in training",
        lambda a, b: {
            "meta": {"epoch": 200},
            "state_dict": pre("backbone.", a) | pre("encoder_q.0.", a) | pre("encoder_k.0.", b),
        },
        "online",
        "a",
    ),
    "BYOL whose network lies under net too": (
        "BYOL (PyTorch)",
        lambda a, b: pre("net.", a) | pre("online_encoder.net.", a) | pre("target_encoder.net.", b),
        "online",
        "a",
    ),
    "only the backbone compiled and wrapped": (
        "MoCo v3",
        lambda a, b: trainer(state_dict=pre("base_encoder._orig_mod.module.", a)),
        "online",
        "a",
    ),
}
