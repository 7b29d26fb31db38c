"""The learner: encoder, EMA target encoder and optimizer, saved as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.common.errors import RunFailed, UserError
from pretrain.common.machine import computes_bfloat16
from pretrain.common.process_group import world_size
from pretrain.network.data_parallel import parallel
from pretrain.network.model import Encoder, build_backbone, build_projector, ema_update, target_encoder_of
from pretrain.network.small_maps import multiply_small_maps
from pretrain.network.sync_batchnorm import convert_sync_batchnorm
from pretrain.optim import Stepper, build_optimizer
from pretrain.settings import Settings

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Learner:
    """Encoder, target encoder and optimizer: everything that learns, and so everything a checkpoint holds."""

    def __init__(
        self, encoder: Encoder, target: Encoder | None, optimizer: torch.optim.Optimizer,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """`dtype` is what the encoders compute in."""
        self.encoder, self.target, self.dtype, self.device = encoder, target, dtype, device
        self.stepper = Stepper(optimizer, device, dtype)
        self._called: nn.Module = encoder

    @staticmethod
    def build(
        settings: Settings, device: torch.device, dtype: torch.dtype, *, sync_bn: bool = True
    ) -> Learner:
        """The same weights from the same seed on every rank; the control, built on rank 0, has no SyncBN."""
        torch.manual_seed(settings.seed)
        backbone = build_backbone(settings.arch, stem=settings.stem, zero_init_last=settings.zero_init_last)
        projector = build_projector(
            backbone.num_features, hidden=settings.projector_hidden, output=settings.projector_output,
            layers=settings.projector_layers,
        )  # fmt: skip
        encoder = multiply_small_maps(Encoder(backbone, projector)).to(device)
        encoder.to(memory_format=torch.channels_last)
        if world_size() > 1 and sync_bn:
            encoder = cast(Encoder, convert_sync_batchnorm(encoder, device))
        optimizer = build_optimizer(
            encoder, momentum=settings.momentum,
            weight_decay=settings.weight_decay, decay_1d=settings.decay_1d,
        )  # fmt: skip
        return Learner(
            encoder, target_encoder_of(encoder) if settings.ema else None, optimizer, device, dtype
        )

    def start(self, *, compiled: bool = False) -> None:
        """Begin training: the encoder in DDP where there are several ranks. All ranks must call."""
        if compiled:
            self.encoder.use_compiler()
            if self.target is not None:
                self.target.use_compiler()
        self._called = parallel(self.encoder, self.device)
        self.encoder.train()

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """A block after which weights, statistics and momentum are, in place, what they were."""
        networks = [network for network in (self.encoder, self.target) if network is not None]
        tensors = [t for network in networks for t in network.state_dict().values()]
        tensors += [t for state in self.stepper.optimizer.state.values() for t in state.values()]
        kept = [t.clone() for t in tensors]
        yield
        with torch.no_grad():
            for tensor, value in zip(tensors, kept):
                tensor.copy_(value)

    def update_target(self, share: float | Tensor) -> None:
        """Move the target encoder, where there is one, by a share towards the encoder: 1 - momentum."""
        if self.target is not None:
            ema_update(self.target, self.encoder, share)

    def embed(self, views: list[Tensor]) -> list[Tensor]:
        """Embeddings of all views, the first by the target encoder where there is one."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            if self.target is None:
                return self._called(views)
            with torch.no_grad():
                target = self.target(views[:1])
            return target + self._called(views[1:])

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint: model, ema, optimizer and scaler."""
        ema = self.target.state_dict() if self.target is not None else None
        return {"model": self.encoder.state_dict(), "ema": ema, **self.stepper.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave, in a checkpoint that may hold more."""
        self.encoder.load_state_dict(state["model"])
        if self.target is not None:
            self.target.load_state_dict(state["ema"])
        self.stepper.restore(state)

    def check_weights(self, step: int) -> None:
        """Raises RunFailed before weights that are not finite replace a good checkpoint."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.encoder.parameters()]))
        if not torch.isfinite(norms).all():
            lr = self.stepper.optimizer.param_groups[0]["lr"]
            raise RunFailed(
                f"weights are not finite after step {step} (learning rate {lr:.4g}), though its loss was; "
                "the last good checkpoint is kept. Lower --lr or take --precision float32"
            )


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of backbone and projector; "auto" is bfloat16 where the device computes in it natively."""
    if precision == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise UserError("--precision float16 needs a GPU; take bfloat16 or float32 on a CPU")
    return DTYPES[precision]
