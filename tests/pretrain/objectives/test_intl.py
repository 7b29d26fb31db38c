"""The INTL loss beside the formula that forms the whitened embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pretrain.objectives.intl import default_trade_off, intl_loss, loss_floor, trace_floor
from pretrain.objectives.spectral import iternorm, zca
from pretrain.objectives.whitening import spectral_loss


def plain_loss(views, *, iterations=4, trade_off, whitening="channel", momentum_target=False) -> Tensor:
    """Eq. 7 and 8 written down as they stand, all whitened embeddings and covariances formed."""

    def iternorm(z: Tensor) -> tuple[Tensor, Tensor]:
        x = z if whitening == "channel" else z.T
        x = x - x.mean(1, keepdim=True)
        s = x @ x.T / (x.shape[1] - 1)
        p = torch.eye(len(s), dtype=s.dtype)
        for _ in range(iterations):
            p = (3 * p - p @ p @ p @ (s / s.trace())) / 2
        y = p @ x / s.trace().sqrt()
        penalty = ((y @ y.T / (x.shape[1] - 1)).diagonal() - 1).square().sum()
        return (y if whitening == "channel" else y.T), penalty

    whitened = [iternorm(z.detach() if momentum_target and i == 0 else z) for i, z in enumerate(views)]
    (target, target_penalty), others = whitened[0], whitened[1:]
    if momentum_target:
        target_penalty = target_penalty * 0
    losses = [
        2 - 2 * cosine_similarity(y, target, dim=1).mean() + trade_off * (penalty + target_penalty)
        for y, penalty in others
    ]
    return torch.stack(losses).mean()


def views_of(n: int, d: int, v: int, *, rms: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, n, d, dtype=torch.float64, generator=generator) + 0.5
    stack = base + 0.4 * torch.randn(v, n, d, dtype=torch.float64, generator=generator)
    return [(rms * z / stack.square().mean().sqrt()).requires_grad_() for z in stack]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("momentum_target", [False, True])
@pytest.mark.parametrize("v", [2, 6])
@pytest.mark.parametrize(
    "whitening,n,d", [("channel", 24, 70), ("channel", 40, 20), ("batch", 24, 70), ("batch", 40, 20)]
)
def test_equals_the_formula(whitening, n, d, v, momentum_target) -> None:
    views = views_of(n, d, v)
    trade_off = 0.01 * (math.log2(n if whitening == "channel" else d) - 3)
    expected = plain_loss(views, trade_off=trade_off, whitening=whitening, momentum_target=momentum_target)
    expected_grads = torch.autograd.grad(expected, views, allow_unused=True)
    loss = intl_loss(views, whitening=whitening, momentum_target=momentum_target)
    grads = torch.autograd.grad(loss.total, views, allow_unused=True)
    assert relative(loss.total, expected) < 1e-12
    assert relative(loss.alignment + trade_off * loss.trace, expected) < 1e-12
    assert (grads[0] is None) == momentum_target
    for found, wanted in zip(grads[momentum_target:], expected_grads[momentum_target:]):
        assert relative(found, wanted) < 1e-11


def test_iterations_and_trade_off_are_used() -> None:
    views = views_of(16, 40, 3)
    for iterations in (1, 2, 7):
        expected = plain_loss(views, iterations=iterations, trade_off=0.3)
        assert relative(intl_loss(views, iterations=iterations, trade_off=0.3).total, expected) < 1e-12
    aligned = intl_loss(views, trade_off=0)
    assert torch.equal(aligned.total, aligned.alignment)


@pytest.mark.parametrize("momentum_target", [False, True])
@pytest.mark.parametrize("whitening,n,d", [("channel", 24, 70), ("batch", 40, 20)])
def test_without_penalty_any_transformation(whitening, n, d, momentum_target) -> None:
    views = views_of(n, d, 3)
    options = {"whitening": whitening, "momentum_target": momentum_target}
    expected = intl_loss(views, trade_off=0.0, **options).total
    found = spectral_loss(views, iternorm(4), **options)
    assert relative(found, expected.detach()) < 1e-10
    wanted = torch.autograd.grad(expected, views[1:])
    for mine, its in zip(torch.autograd.grad(found, views[1:]), wanted):
        assert relative(mine, its) < 1e-8
    assert float(spectral_loss([views[0]] * 2, zca(), **options)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 2 views"):
        spectral_loss(views[:1], zca())


@pytest.mark.parametrize("whitening", ["channel", "batch"])
@pytest.mark.parametrize(
    "dtype,value,gradient",
    [(torch.float32, 1e-5, 1e-4), (torch.float16, 1e-5, 2e-3), (torch.bfloat16, 1e-5, 1e-2)],
)
@pytest.mark.parametrize("rms", [1e-2, 1.0, 1e2])
def test_narrow_inputs_and_autocast(dtype, value, gradient, rms, whitening) -> None:
    """Narrow embeddings lose their own rounding and nothing else; the covariance does not overflow."""
    narrow = [z.detach().to(dtype).requires_grad_() for z in views_of(32, 96, 2, rms=rms)]
    exact = [z.detach().double().requires_grad_() for z in narrow]
    expected = intl_loss(exact, whitening=whitening, trade_off=0.02)
    expected_grads = torch.autograd.grad(expected.total, exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = intl_loss(narrow, whitening=whitening, trade_off=0.02)
        # A gradient of 1 / rms would leave float16's range: scaled as a GradScaler does, then scaled back.
        grads = torch.autograd.grad(loss.total * rms, narrow)
    assert loss.total.dtype == torch.float32
    assert relative(loss.total, expected.total.detach()) < value
    for found, wanted in zip(grads, expected_grads):
        assert found.dtype == dtype
        assert relative(found.double() / rms, wanted) < gradient


@pytest.mark.parametrize("whitening", ["channel", "batch"])
def test_invariances(whitening) -> None:
    """A permutation of images, a scale of all embeddings and a rotation of features change nothing."""
    views = [z.detach() for z in views_of(20, 30, 3)]
    loss = intl_loss(views, whitening=whitening, trade_off=0.05).total
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert (
        relative(intl_loss([z[order] for z in views], whitening=whitening, trade_off=0.05).total, loss)
        < 1e-12
    )
    assert (
        relative(intl_loss([300 * z for z in views], whitening=whitening, trade_off=0.05).total, loss) < 1e-12
    )
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    if whitening == "batch":  # the cosines; the penalty of single features does turn with them
        turned = intl_loss([z @ rotation for z in views], whitening=whitening, trade_off=0.05)
        assert relative(turned.alignment, intl_loss(views, whitening=whitening).alignment) < 1e-12
    else:  # a rotation that keeps the features' mean commutes with the centring
        ones = torch.ones(30, 1, dtype=torch.float64) / 30**0.5
        basis = torch.linalg.qr(torch.cat([ones, torch.randn(30, 29, dtype=torch.float64)], 1))[0]
        inner = torch.block_diag(torch.ones(1, 1).double(), torch.linalg.qr(torch.randn(29, 29).double())[0])
        keeping = basis @ inner @ basis.T
        assert relative(intl_loss([z @ keeping for z in views], trade_off=0.05).total, loss) < 1e-12


def test_floor() -> None:
    """x = 1/256, T = 4: h rises by x (3 − x)² / 4 four times: .0039, .0088, .0196, .0435, .0952."""
    h = 1 / 256
    for _ in range(4):
        h *= (3 - h) ** 2 / 4
    assert trace_floor(256, 8192) == pytest.approx(256 * (1 - h) ** 2)
    assert trace_floor(256, 8192) == pytest.approx(209.6, abs=0.05)
    assert loss_floor(256, 8192) == pytest.approx(20.96, abs=0.005)
    assert loss_floor(256, 8192, momentum_target=True) == pytest.approx(10.48, abs=0.005)
    # Reached: orthogonal rows of mean 0 and one length, both views the same.
    n, d = 16, 64
    ones = torch.ones(d, 1, dtype=torch.float64)
    z = torch.linalg.qr(torch.cat([ones, torch.randn(d, n, dtype=torch.float64)], 1))[0][:, 1:].T
    assert float(intl_loss([z, z]).total) == pytest.approx(loss_floor(n, d), rel=1e-10)
    for whitening, shape in (
        ("channel", (16, 64)),
        ("channel", (40, 12)),
        ("batch", (12, 40)),
        ("batch", (40, 12)),
    ):
        views = views_of(*shape, 2)
        loss = intl_loss(views, whitening=whitening)
        assert float(loss.trace) > 2 * trace_floor(*shape, whitening=whitening)


def test_default_trade_off() -> None:
    assert default_trade_off(256) == pytest.approx(0.05)
    assert default_trade_off(64) == pytest.approx(0.03)
    for n in (2, 8):
        with pytest.raises(ValueError, match=f"n = {n}"):
            default_trade_off(n)
    with pytest.raises(ValueError, match="trade-off"):
        intl_loss(views_of(8, 20, 2))
    with pytest.raises(ValueError, match="trade-off"):
        intl_loss(views_of(20, 8, 2), whitening="batch")
    assert torch.isfinite(intl_loss(views_of(8, 20, 2), trade_off=0.01).total)


def test_wrong_use_is_named() -> None:
    a, b = views_of(10, 20, 2)
    with pytest.raises(ValueError, match="at least 2 views, got 1"):
        intl_loss([a])
    with pytest.raises(ValueError, match=r"\(9, 20\)"):
        intl_loss([a, b[:9]])
    with pytest.raises(ValueError, match="'rows'"):
        intl_loss([a, b], whitening="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations"):
        intl_loss([a, b], iterations=0)
    with pytest.raises(ValueError, match="trade_off"):
        intl_loss([a, b], trade_off=-0.1)


def test_descends_towards_the_floor() -> None:
    """Gradient steps on the embeddings themselves bring the loss near its floor."""
    views = [z.detach().float().requires_grad_() for z in views_of(16, 48, 2)]
    optimiser = torch.optim.Adam(views, lr=0.05)
    start = None
    for _ in range(200):
        loss = intl_loss(views, trade_off=0.05)
        start = start or float(loss.total.detach())
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    floor = loss_floor(16, 48, trade_off=0.05)
    assert float(loss.total) - floor < 0.02 * (start - floor)
