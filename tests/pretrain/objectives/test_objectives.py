"""The family of objectives beside lightly's implementations, or plain formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, FroSSLLoss, VICRegLoss
from lightly.loss.emp_ssl_loss import invariance_loss, tcr_loss
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from lightly.loss.mmcr_loss import MMCRLoss
from lightly.loss.wmse_loss import WMSELoss
from torch import Tensor
from torch.nn.functional import normalize

from pretrain.objectives.gaussian import random_directions, sigreg_loss
from pretrain.objectives.redundancy import barlow_twins_loss, vicreg_loss
from pretrain.objectives.volume import coding_rate_loss, frossl_loss, mmcr_loss
from pretrain.objectives.whitening import w_mse_loss
from tests.pretrain.objectives.test_intl import relative, views_of


class _SIGReg(SIGReg):
    """lightly's with the directions that ours draws for step 3, its grid computed in float64."""

    def __init__(self) -> None:
        super().__init__(num_vectors=64)
        t = torch.linspace(0, 3, 17, dtype=torch.float64)
        weights = torch.full((17,), 2 * 3 / 16, dtype=torch.float64)
        weights[[0, -1]] /= 2
        phi = (-t.square() / 2).exp()
        self.t, self.phi, self.weights = t, phi, weights * phi

    def _generate_unit_vectors(self, device, dtype, num_features) -> Tensor:
        return random_directions(num_features, 64, step=3, like=torch.empty(0, dtype=dtype))


def _w_mse(views: list[Tensor]) -> Tensor:
    """lightly's, whose shuffled whole batch is whitened; its identity matrix wants the default dtype."""
    n, d = views[0].shape
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        loss = WMSELoss(embedding_dim=d, w_size=n, num_samples=len(views), track_running_stats=False)
        return loss(torch.cat(views))
    finally:
        torch.set_default_dtype(before)


def _mean_with_first(loss, views: list[Tensor]) -> Tensor:
    return torch.stack([loss(views[0], z) for z in views[1:]]).mean()


def _lejepa(views: list[Tensor]) -> Tensor:
    stack = torch.stack(views)
    distance = lejepa_invariance_loss(all_proj=stack, global_proj=stack[:2])
    return 0.05 * _SIGReg()(stack) + 0.95 * distance


def _rate(views: list[Tensor]) -> Tensor:
    """lightly's terms with the authors' sign: their criterion is minus the coding rate, lightly's plus."""
    z = normalize(torch.stack(views), dim=-1)
    return -tcr_loss(z, eps=0.2) + 200 * invariance_loss(z)


def _mmcr(views: list[Tensor]) -> Tensor:
    first, second = (normalize(z, dim=-1)[:, None] for z in views[:2])  # it takes as many of each network
    return MMCRLoss(lmda=0.3)(first, second)


REFERENCES = {
    "vicreg": (vicreg_loss, lambda v: _mean_with_first(VICRegLoss(), v)),
    "barlow_twins": (barlow_twins_loss, lambda v: _mean_with_first(BarlowTwinsLoss(lambda_param=0.0051), v)),
    "w_mse": (lambda v, **k: w_mse_loss(v, sub_batch=len(v[0]), **k), _w_mse),
    "frossl": (frossl_loss, lambda v: FroSSLLoss()([z - z.mean(0) for z in v])),
    "mmcr": (lambda v, **k: mmcr_loss(v[:2], local=0.3, **k), _mmcr),
    "coding_rate": (coding_rate_loss, _rate),
    "sigreg": (lambda v, **k: sigreg_loss(v, directions=64, step=3, global_views=2, **k), _lejepa),
}
"""Each objective, and lightly's loss of the same views."""
SHAPES = [(24, 70), (40, 12)]


def _cases(shapes=SHAPES):
    """w_mse takes more images than features."""
    return [(name, n, d) for name in REFERENCES for n, d in shapes if name != "w_mse" or n > d]


@pytest.mark.parametrize("name,n,d", _cases())
def test_equals_the_reference_with_its_gradient(name: str, n: int, d: int) -> None:
    ours, reference = REFERENCES[name]
    views = views_of(n, d, 3)
    loss, expected = ours(views), reference(views)
    assert relative(loss.total, expected.detach()) < 1e-11
    assert relative(loss.alignment + loss.penalty, expected.detach()) < 1e-11
    wanted = torch.autograd.grad(expected, views, allow_unused=True)
    for found, its in zip(torch.autograd.grad(loss.total, views, allow_unused=True), wanted):
        assert (found is None) == (its is None)
        if found is not None:
            assert relative(found, its) < 1e-9


def _public():
    """Each objective as it trains, with what it takes here: w_mse more images than features."""
    return {**{name: ours for name, (ours, _) in REFERENCES.items()}, "w_mse": w_mse_loss, "mmcr": mmcr_loss}


@pytest.mark.parametrize("name", REFERENCES)
def test_invariances_and_a_momentum_target(name: str) -> None:
    """The order of images is nothing to the loss; a momentum target has no gradient, the others the same."""
    views = views_of(24, 12, 3)
    loss = _public()[name]
    plain = loss(views)
    if name != "w_mse":  # whose sub-batches are consecutive images
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        assert relative(loss([z[order] for z in views]).total, plain.total.detach()) < 1e-12
    constant = loss(views, momentum_target=True)
    target, *others = torch.autograd.grad(constant.total, views, allow_unused=True, retain_graph=True)
    assert target is None and all(torch.isfinite(z).all() for z in others)
    if name != "mmcr":  # which has no alignment of its own
        alone, whole = (torch.autograd.grad(x.alignment, views[1:]) for x in (constant, plain))
        torch.testing.assert_close(alone, whole)


@pytest.mark.parametrize("name,n,d", _cases([(24, 12), (24, 70)]))
@pytest.mark.parametrize(
    "dtype,gradient", [(torch.float32, 2e-4), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_narrow_inputs_and_autocast(name: str, n: int, d: int, dtype: torch.dtype, gradient: float) -> None:
    """Narrow embeddings lose their own rounding and nothing else."""
    loss = _public()[name]
    narrow = [z.detach().to(dtype).requires_grad_() for z in views_of(n, d, 2)]
    exact = [z.detach().double().requires_grad_() for z in narrow]
    expected = loss(exact).total
    wanted = torch.autograd.grad(expected, exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(narrow).total
        grads = torch.autograd.grad(found, narrow)
    assert found.dtype == torch.float32
    assert relative(found, expected.detach()) < 1e-5
    for mine, its in zip(grads, wanted):
        assert mine.dtype == dtype and relative(mine, its) < gradient


@pytest.mark.parametrize("name", REFERENCES)
def test_wrong_use_is_named(name: str) -> None:
    loss = _public()[name]
    a, b = views_of(24, 12, 2)
    for views, said in (
        ([], "at least 2 views, got 0"), ([a], "at least 2 views, got 1"), ([a, b[:9]], r"\(9, 12\)"),
        ([a, b.float()], "one dtype"), ([a[:1], b[:1]], "N, D >= 2, got N = 1"), ([a[0], b[0]], "N x D"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            loss(views)


def test_w_mse_whitens_sub_batches_by_themselves() -> None:
    views = views_of(48, 12, 2)
    halves = [w_mse_loss([z[i : i + 24] for z in views], sub_batch=24).total for i in (0, 24)]
    assert relative(w_mse_loss(views).total, torch.stack(halves).mean()) < 1e-12
    assert relative(w_mse_loss(views, sub_batch=48).total, torch.stack(halves).mean()) > 1e-3
    for size in (12, 20):
        with pytest.raises(
            ValueError, match=f"more than D = 12 images whose size divides N = 48, got {size}"
        ):
            w_mse_loss(views, sub_batch=size)
    flat = [z.detach() * (torch.arange(12) > 0) for z in views]
    with pytest.raises(ValueError, match="positive definite"):
        w_mse_loss(flat)


def test_by_hand() -> None:
    """Four images on ±1 in two features: covariance 4/3 of the identity, unit rows after scaling by 1/√2."""
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    views = [z, z]
    assert float(vicreg_loss(views).total) == 0  # √(4/3) > 1, nothing off the diagonal
    assert float(vicreg_loss([z / 2, z / 2]).total) == pytest.approx(25 * (1 - (1 / 3 + 1e-4) ** 0.5))
    c = 1 / (1 + 1e-5)
    assert float(barlow_twins_loss(views).total) == pytest.approx(2 * (1 - c) ** 2)
    assert float(w_mse_loss([z, -z]).total) == pytest.approx(4)
    assert float(frossl_loss(views).total) == pytest.approx(-2 * torch.log(torch.tensor(2.0)).item())
    assert float(mmcr_loss(views).total) == pytest.approx(-2 * 2**0.5)  # two singular values of √2
    rate = torch.log(torch.tensor(1 + 2 / (4 * 0.2) * 2)).item()  # α = 2.5, λ = 2 twice
    assert float(coding_rate_loss(views).total) == pytest.approx(-rate - 200)
    assert float(mmcr_loss([torch.ones(4, 2), torch.ones(4, 2)]).total) == pytest.approx(-2)  # one, of 2


@pytest.mark.parametrize("loss", [mmcr_loss, coding_rate_loss])
def test_embeddings_that_are_not_finite_are_named(loss) -> None:
    views = [z.detach().clone() for z in views_of(10, 20, 2)]
    views[0][3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        loss(views)
