"""Spectral transformation, INTL and objectives beside it, and the training of a timm ResNet with them."""

from typing import TYPE_CHECKING

from pretrain.common.package import __version__ as __version__
from pretrain.common.package import lazily

if TYPE_CHECKING:
    from pretrain.objectives.diagnostics import diagnose
    from pretrain.objectives.expression import expression
    from pretrain.objectives.gaussian import sigreg_loss
    from pretrain.objectives.intl import INTLLoss, intl_loss
    from pretrain.objectives.redundancy import barlow_twins_loss, vicreg_loss
    from pretrain.objectives.spectral import iternorm, power, spectral_transform, whiten, zca
    from pretrain.objectives.views import ObjectiveLoss
    from pretrain.objectives.volume import coding_rate_loss, frossl_loss, mmcr_loss
    from pretrain.objectives.whitening import spectral_loss, w_mse_loss

__all__ = [
    "INTLLoss", "ObjectiveLoss", "barlow_twins_loss", "coding_rate_loss", "diagnose", "expression",
    "frossl_loss", "intl_loss", "iternorm", "mmcr_loss", "power", "sigreg_loss", "spectral_loss",
    "spectral_transform", "vicreg_loss", "w_mse_loss", "whiten", "zca",
]  # fmt: skip

__getattr__, __dir__ = lazily(
    __name__,
    {
        "INTLLoss": "pretrain.objectives.intl",
        "ObjectiveLoss": "pretrain.objectives.views",
        "barlow_twins_loss": "pretrain.objectives.redundancy",
        "coding_rate_loss": "pretrain.objectives.volume",
        "diagnose": "pretrain.objectives.diagnostics",
        "expression": "pretrain.objectives.expression",
        "frossl_loss": "pretrain.objectives.volume",
        "intl_loss": "pretrain.objectives.intl",
        "iternorm": "pretrain.objectives.spectral",
        "mmcr_loss": "pretrain.objectives.volume",
        "power": "pretrain.objectives.spectral",
        "sigreg_loss": "pretrain.objectives.gaussian",
        "spectral_loss": "pretrain.objectives.whitening",
        "spectral_transform": "pretrain.objectives.spectral",
        "vicreg_loss": "pretrain.objectives.redundancy",
        "w_mse_loss": "pretrain.objectives.whitening",
        "whiten": "pretrain.objectives.spectral",
        "zca": "pretrain.objectives.spectral",
    },
)
