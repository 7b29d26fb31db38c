"""Spectral transformation, INTL, and the training of a timm ResNet with it."""

from typing import TYPE_CHECKING

from pretrain.common.package import __version__ as __version__
from pretrain.common.package import lazily

if TYPE_CHECKING:
    from pretrain.diagnostics import diagnose
    from pretrain.loss import INTLLoss, intl_loss, spectral_loss
    from pretrain.spectral import iternorm, power, spectral_transform, whiten, zca

__all__ = [
    "INTLLoss", "diagnose", "intl_loss", "iternorm", "power", "spectral_loss", "spectral_transform", "whiten",
    "zca",
]  # fmt: skip

__getattr__, __dir__ = lazily(
    __name__,
    {
        "INTLLoss": "pretrain.loss",
        "diagnose": "pretrain.diagnostics",
        "intl_loss": "pretrain.loss",
        "iternorm": "pretrain.spectral",
        "power": "pretrain.spectral",
        "spectral_loss": "pretrain.loss",
        "spectral_transform": "pretrain.spectral",
        "whiten": "pretrain.spectral",
        "zca": "pretrain.spectral",
    },
)
