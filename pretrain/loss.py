"""The loss that a run's settings ask for: its objective, and the transformation of the spectrum."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.common.errors import RunFailed, UserError
from pretrain.objectives.expression import Expression
from pretrain.objectives.gaussian import sigreg_loss
from pretrain.objectives.intl import INTLLoss, intl_loss, loss_floor
from pretrain.objectives.redundancy import barlow_twins_loss, vicreg_loss
from pretrain.objectives.spectral import SpectralFunction, power
from pretrain.objectives.views import ObjectiveLoss
from pretrain.objectives.volume import coding_rate_loss, frossl_loss, mmcr_loss
from pretrain.objectives.whitening import spectral_loss, w_mse_loss
from pretrain.settings import Settings

Loss = Callable[[list[Tensor], int], INTLLoss | ObjectiveLoss]
"""Of the views' embeddings and the step they belong to."""

PLAIN: dict[str, Callable[..., ObjectiveLoss]] = {
    "vicreg": vicreg_loss, "barlow_twins": barlow_twins_loss, "w_mse": w_mse_loss, "frossl": frossl_loss,
    "mmcr": mmcr_loss, "coding_rate": coding_rate_loss,
}  # fmt: skip
"""Objectives that take nothing but the embeddings, at their published weights."""

CAPTURABLE = frozenset({"intl", "vicreg", "barlow_twins", "frossl"})
"""Objectives that a CUDA graph can replay: the others ask the GPU on the way, or draw anew at each step."""


def loss_of(settings: Settings) -> Loss:
    """What the settings train with, as a function. Raises UserError for a transformation that cannot be used.

    The function raises RunFailed where a loss cannot be computed, as of embeddings that are not finite.
    """
    loss = _loss_of(settings)

    def told(embeddings: list[Tensor], step: int) -> INTLLoss | ObjectiveLoss:
        try:
            return loss(embeddings, step)
        except ValueError as error:
            raise RunFailed(
                f"the loss cannot be computed at step {step}: {error}; what was saved before is kept"
            ) from error

    return told


def _loss_of(settings: Settings) -> Loss:
    name, constant = settings.loss_name, settings.ema
    if name == "intl":
        return lambda embeddings, _: intl_loss(
            embeddings, iterations=settings.iterations, trade_off=settings.trade_off,
            whitening=settings.whitening, momentum_target=constant,
        )  # fmt: skip
    if name == "power":
        g = transformation(settings)

        def of_powers(embeddings: list[Tensor], _: int) -> INTLLoss:
            alignment = spectral_loss(embeddings, g, whitening=settings.whitening, momentum_target=constant)
            return INTLLoss(alignment, alignment, torch.zeros_like(alignment))

        return of_powers
    if name == "sigreg":
        of_first_size = itertools.takewhile(lambda size: size == settings.view_sizes[0], settings.view_sizes)
        global_views = len(list(of_first_size))
        return lambda embeddings, step: sigreg_loss(
            embeddings, global_views=global_views, step=step, momentum_target=constant
        )
    plain = PLAIN[name]
    return lambda embeddings, _: plain(embeddings, momentum_target=constant)


def floor_of(settings: Settings) -> float | None:
    """What the loss cannot fall under, of INTL and of transformations; None where no such number is known."""
    if settings.loss_name == "power":
        return 0.0
    if settings.loss_name != "intl":
        return None
    return loss_floor(
        settings.batch_global, settings.projector_output, iterations=settings.iterations,
        trade_off=settings.trade_off, whitening=settings.whitening, momentum_target=settings.ema,
    )  # fmt: skip


def transformation(settings: Settings) -> SpectralFunction:
    """g(λ) of --power or --transform. Raises UserError where it is no finite number for each λ by itself."""
    if settings.power is not None:
        return power(settings.power)
    assert settings.transform is not None
    said = f"--transform {settings.transform}"
    g: SpectralFunction = Expression(settings.transform) if ":" not in settings.transform else _imported(said)
    x = torch.logspace(-8, 4, 49, dtype=torch.float64)
    try:
        values, every_other = g(x), g(x[::2])
    except Exception as error:
        raise UserError(f"{said}: fails with {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor) or values.shape != x.shape:
        raise UserError(f"{said}: wanted a tensor with g(λ) of each eigenvalue, of the shape it was given")
    bad = ~torch.isfinite(values)
    if bad.any():
        raise UserError(f"{said}: g({float(x[bad][0]):g}) is {float(values[bad][0])}; wanted a finite number")
    if not torch.allclose(values[::2], every_other):
        raise UserError(
            f"{said}: g of an eigenvalue depends on the others; wanted a function of each by itself"
        )
    return g


def _imported(said: str) -> SpectralFunction:
    module, _, function = said.partition(" ")[2].partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{said}: wanted an expression, or MODULE:FUNCTION to import ({error})") from error
