"""A tiny pretraining run, and what of it two runs must have alike."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from pretrain.checkpoint import load_checkpoint
from pretrain.settings import Settings
from tests.helpers.tiny_resnet import ARCH

CPU = torch.device("cpu")


TINY = {
    "dataset": "cifar10", "arch": ARCH, "view_sizes": [16, 12], "min_scales": [0.2],
    "projector_hidden": 32, "projector_output": 64, "projector_layers": 2,
    "epochs": 2, "batch_global": 160, "lr": 0.2,
    "warmup_epochs": 0.25, "workers": 0, "log_every": 2, "save_every": 100, "seed": 1, "precision": "float32",
}  # fmt: skip
"""Four steps an epoch of 640 images, eight in all."""


def tiny(data: Path, output: Path, **changes: object) -> Settings:
    return Settings(**{**TINY, "data_dir": str(data), "output": str(output), **changes})  # type: ignore[arg-type]


def slower(data: Path, output: Path, **changes: object) -> Settings:
    """The same with a ResNet-18: there is time to strike, and a process without the tests knows it."""
    return tiny(data, output, arch="resnet18", view_sizes=[24, 16], **changes)


def stop_after_epoch_one(*_: object) -> dict[str, float]:
    """A hook that does what a scheduler does: a signal in the middle of the run."""
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


def weights(output: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(output / "checkpoint.pt")
    flat = {f"model.{k}": v for k, v in state["model"].items()}
    flat |= {f"ema.{k}": v for k, v in (state["ema"] or {}).items()}
    for i, slots in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{i}.{k}": v for k, v in slots.items() if isinstance(v, torch.Tensor)}
    return flat


def differing(a: Path, b: Path) -> list[str]:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return [k for k in one if not torch.equal(one[k], two[k])]
