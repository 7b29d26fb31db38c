"""A fine-tuning: a whole classifier, backbone and head, and its optimizer step.

B images of this rank, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.common.collectives import sum_over_ranks
from pretrain.common.errors import UserError
from pretrain.common.process_group import is_on, world_size
from pretrain.network.data_parallel import parallel
from pretrain.network.small_maps import multiply_small_maps
from pretrain.network.sync_batchnorm import convert_sync_batchnorm
from pretrain.optim import Stepper

NORM_EPSILON = 1e-6
"""Of head_norm: of timm's ViTs and MAE's (models_vit.py)."""


class Classifier(nn.Module):
    """Backbone and one linear layer, a LayerNorm between them on request: B x 3 x H x W -> B x C."""

    def __init__(self, backbone: nn.Module, features: int, classes: int, *, norm: bool = False) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(features, classes)
        self.head_norm: nn.Module = nn.LayerNorm(features, eps=NORM_EPSILON) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W normalised -> logits B x C."""
        return self.head(self.head_norm(self.backbone(images)))


class FineTuning:
    """A classifier and its optimizer: all that learns and that a checkpoint holds.

    A learning rate for the backbone and one for the head; the other options are FineTuneProtocol's values.
    BatchNorm is in train mode, with this rank's statistics, or all ranks' with `sync_bn`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        classes: int,
        lr_backbone: float,
        lr_head: float,
        momentum: float,
        weight_decay: float,
        head_init: Literal["normal", "uniform", "tiny"],
        sync_bn: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        weight_decay_of: Literal["all", "matrices"] = "all",
        layer_decay: float = 1.0,
        drop_path: float = 0.0,
        head_norm: bool = False,
    ) -> None:
        if not hasattr(backbone, "num_features"):
            raise UserError(
                "fine-tuning wants to know a module's number of features: set module.num_features"
            )
        features = int(backbone.num_features)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = multiply_small_maps(Classifier(backbone, features, classes, norm=head_norm))
            if head_init != "uniform":
                nn.init.normal_(model.head.weight, std=0.01 if head_init == "normal" else 2e-5)
                nn.init.zeros_(model.head.bias)
        if drop_path:
            leave_blocks_out(_of_timm(backbone), drop_path)
        model = model.to(device, memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
        self.model: nn.Module = (
            convert_sync_batchnorm(model, device) if sync_bn and world_size() > 1 else model
        )
        for parameter in getattr(backbone, "unused", list)():
            parameter.requires_grad_(False)  # DDP waits for the gradient of every other one
        groups = parameter_groups(self.model, weight_decay, weight_decay_of, layer_decay)
        self.rates = [
            group.pop("scale") * (lr_head if group.pop("head") else lr_backbone) for group in groups
        ]
        if optimizer == "adamw":
            self.stepper = Stepper(torch.optim.AdamW(groups, lr=0.0), device, dtype)
        else:
            self.stepper = Stepper(torch.optim.SGD(groups, lr=0.0, momentum=momentum), device, dtype)
        self.dtype, self.device = dtype, device
        self._called = parallel(self.model, device, broadcast_buffers=not sync_bn)

    def step(self, images: Tensor, labels: Tensor, *, batch_global: int, factor: float) -> Tensor:
        """One step at `factor` times the rates; this rank's part of the mean loss over `batch_global` images.

        `labels`: the images' classes (B), or the share of each class (B x C).

        The gradient is that of the mean over all ranks' images, whether or not they hold equally many. All
        ranks must call, each with at least one image.
        """
        self._called.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self._called(images)
        loss = cross_entropy(logits.float(), labels, reduction="sum") / batch_global
        self.stepper.backward(loss * world_size())  # DDP takes the mean over ranks
        self.stepper.update(*(rate * factor for rate in self.rates))
        return loss.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """B x C float32 in eval mode."""
        self.model.eval()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(images).float()

    def share_buffers(self) -> None:
        """Give every rank rank 0's BatchNorm statistics, which are saved and evaluated. All ranks call."""
        if is_on():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint: model, optimizer and scaler."""
        return {"model": self.model.state_dict(), **self.stepper.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, in a checkpoint that may hold more."""
        self.model.load_state_dict(state["model"])
        self.stepper.restore(state)


def parameter_groups(
    model: nn.Module, weight_decay: float, of: Literal["all", "matrices"], layer_decay: float
) -> list[dict[str, Any]]:
    """Parameters of a classifier by learning rate and weight decay, for an optimizer, the head's last.

    Each group has `scale`, what its rate is multiplied by, and `head`, whether it is the head's. The head is
    a layer behind the network's last one, as in timm's networks with a classifier.

    Raises UserError for a layer decay of a network whose layers timm does not know.
    """
    backbone, groups = cast("nn.Module", model.backbone), []
    head = [(n, p) for n, p in model.named_parameters() if n.startswith("head")]
    if layer_decay == 1 and of == "all":
        for which, params in ((False, list(backbone.parameters())), (True, [p for _, p in head])):
            groups.append({"params": params, "weight_decay": weight_decay, "scale": 1.0, "head": which})
        return groups
    network = _of_timm(backbone)
    named: set[str] = getattr(network, "no_weight_decay", set)()
    for group in param_groups_layer_decay(
        network, weight_decay, no_weight_decay_list=named if of == "matrices" else (),
        weight_decay_exclude_1d=of == "matrices", layer_decay=layer_decay,
    ):  # fmt: skip
        groups.append({
            "params": group["params"], "weight_decay": group["weight_decay"],
            "scale": group["lr_scale"] * layer_decay, "head": False,
        })  # fmt: skip
    for one_d in (False, True):
        params = [p for _, p in head if (p.ndim <= 1) is one_d]
        decay = 0.0 if one_d and of == "matrices" else weight_decay
        groups.append({"params": params, "weight_decay": decay, "scale": 1.0, "head": True})
    return groups


def leave_blocks_out(network: nn.Module, share: float) -> None:
    """In training, leave out the first block of a ViT never and the last for this share of the images.

    Raises UserError for a network without such blocks.
    """
    blocks = list(getattr(network, "blocks", ()))
    if not blocks or not all(hasattr(b, "drop_path1") and hasattr(b, "drop_path2") for b in blocks):
        raise UserError(
            f"this protocol has drop_path, for the blocks of a ViT; {type(network).__name__} has none"
        )
    for block, rate in zip(blocks, torch.linspace(0, share, len(blocks), dtype=torch.float64).tolist()):
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


def _of_timm(backbone: nn.Module) -> nn.Module:
    """The network of timm's itself, which knows its layers. Raises UserError for another."""
    network = getattr(backbone, "backbone", backbone)
    if not hasattr(network, "group_matcher"):
        raise UserError(
            "this protocol treats a backbone's layers apart (layer_decay, weight_decay_of, drop_path), which "
            f"are known of timm's networks; {type(network).__name__} is none: take a protocol without"
        )
    return network


def joined(place_N: Tensor, device: torch.device) -> Tensor:
    """Places of all images from ranks that each know some (and have -1 elsewhere). All ranks must call.

    Raises AssertionError unless every image was evaluated exactly once.
    """
    known = sum_over_ranks((place_N >= 0).to(device, torch.int64)).cpu()
    assert bool((known == 1).all()), "an image was evaluated twice or not at all"
    return sum_over_ranks(place_N.clamp_min(0).to(device)).cpu()
