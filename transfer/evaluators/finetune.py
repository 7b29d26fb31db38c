"""A whole classifier, backbone and head, and its optimizer step.

B images of this rank, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pretrain.common.collectives import sum_over_ranks
from pretrain.common.errors import UserError
from pretrain.common.process_group import is_on, world_size
from pretrain.network.small_maps import multiply_small_maps
from pretrain.network.sync_batchnorm import convert_sync_batchnorm
from pretrain.optim import Stepper, parallel


class Classifier(nn.Module):
    """Backbone and one linear layer: B x 3 x H x W -> B x C."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """B x 3 x H x W normalised -> logits B x C."""
        return self.head(self.backbone(images))


class FineTuning:
    """A classifier and its optimizer: all that learns and that a checkpoint holds.

    SGD with a learning rate for the backbone and one for the head. Head: N(0, 0.01) and bias 0, or
    nn.Linear's own. BatchNorm is in train mode, with this rank's statistics, or all ranks' with `sync_bn`.
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
        head_init: Literal["normal", "uniform"],
        sync_bn: bool,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if not hasattr(backbone, "num_features"):
            raise UserError(
                "fine-tuning wants to know a module's number of features: set module.num_features"
            )
        features = int(backbone.num_features)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = multiply_small_maps(Classifier(backbone, features, classes))
            if head_init == "normal":
                nn.init.normal_(model.head.weight, std=0.01)
                nn.init.zeros_(model.head.bias)
        model = model.to(device, memory_format=torch.channels_last).requires_grad_(True)  # type: ignore[call-overload]
        self.model: nn.Module = (
            convert_sync_batchnorm(model, device) if sync_bn and world_size() > 1 else model
        )
        self.rates = (lr_backbone, lr_head)
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named if n.startswith("head.") is head]} for head in (False, True)
        ]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)
        self.stepper = Stepper(optimizer, device, dtype)
        self.dtype, self.device = dtype, device
        self._called = parallel(self.model, device, broadcast_buffers=not sync_bn)

    def step(self, images: Tensor, labels_B: Tensor, *, batch_global: int, factor: float) -> Tensor:
        """One step at `factor` times the rates; this rank's part of the mean loss over `batch_global` images.

        The gradient is that of the mean over all ranks' images, whether or not they hold equally many. All
        ranks must call, each with at least one image.
        """
        self._called.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self._called(images)
        loss = cross_entropy(logits.float(), labels_B, reduction="sum") / batch_global
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


def joined(place_N: Tensor, device: torch.device) -> Tensor:
    """Places of all images from ranks that each know some (and have -1 elsewhere). All ranks must call.

    Raises AssertionError unless every image was evaluated exactly once.
    """
    known = sum_over_ranks((place_N >= 0).to(device, torch.int64)).cpu()
    assert bool((known == 1).all()), "an image was evaluated twice or not at all"
    return sum_over_ranks(place_N.clamp_min(0).to(device)).cpu()
