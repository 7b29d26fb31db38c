"""Spectral transformations: derived numbers, invariants, gradients at repeated eigenvalues; diagnoses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.objectives.diagnostics import collapse, diagnose
from pretrain.objectives.spectral import (
    centred,
    covariance,
    iternorm,
    matrix_function,
    power,
    spectral_transform,
    whiten,
    zca,
)

SHAPES = [((8, 20), "channel"), ((9, 6), "channel"), ((20, 8), "batch"), ((6, 9), "batch")]


def embedding(n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_spectrum(eigenvalues: list[float], d: int, *, seed: int = 0) -> Tensor:
    """N x D with row-centred covariance of exactly these eigenvalues, N = their number."""
    n = len(eigenvalues)
    ones = torch.ones(d, 1, dtype=torch.float64)
    v = torch.linalg.qr(torch.cat([ones, embedding(d, n, seed=seed)], 1))[0][:, 1:]
    u = torch.linalg.qr(embedding(n, n, seed=seed + 1))[0]
    return u @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64).mul(d - 1).sqrt()) @ v.T


@pytest.mark.parametrize("shape,whitening", SHAPES)
def test_zca_whitens_what_has_rank(shape, whitening) -> None:
    """The transformed covariance has eigenvalue 1 as often as Zc has rank, else 0."""
    z = spectral_transform(embedding(*shape), zca(), whitening=whitening)
    m, k = shape if whitening == "channel" else shape[::-1]
    rank = min(m, k - 1)
    eigenvalues = torch.linalg.eigvalsh(covariance(z, whitening))
    expected = torch.cat([torch.zeros(m - rank), torch.ones(rank)]).double()
    torch.testing.assert_close(eigenvalues, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [-0.5, 0.0, 0.3, 0.5, 1.0])
def test_power_maps_each_eigenvalue(p) -> None:
    """λ becomes λ g(λ)² = λ^(1 − 2p)."""
    z = with_spectrum([0.1, 0.5, 2.0, 2.0, 7.0], 12)
    found = torch.linalg.eigvalsh(covariance(spectral_transform(z, power(p)), "channel"))
    expected = torch.tensor([0.1, 0.5, 2.0, 2.0, 7.0], dtype=torch.float64).pow(1 - 2 * p).sort().values
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("iterations", [1, 4, 9])
def test_newton_equals_its_eigenvalue_map(iterations) -> None:
    s = covariance(centred(embedding(10, 30), "channel"), "channel")
    eigenvalues, u = torch.linalg.eigh(s)
    g = iternorm(iterations)
    torch.testing.assert_close(matrix_function(s, g), (u * g(eigenvalues)) @ u.T)
    # T = 1: g = (3 − x) / 2 / √tr, by hand for the spectrum 1, 3 of trace 4: 1.375 / 2 and 1.125 / 2
    two = iternorm(1)(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(two, torch.tensor([0.6875, 0.5625], dtype=torch.float64))


def test_iternorm_tends_to_zca() -> None:
    z = embedding(10, 60)
    torch.testing.assert_close(spectral_transform(z, iternorm(14)), spectral_transform(z, zca()))


@pytest.mark.parametrize("iterations", [4, 12, 20, 40])
def test_newton_does_not_gather_rounding(iterations) -> None:
    """In float32, at a condition number of 100, where P_k³ S_N as it is written reaches NaN by T = 20."""
    z = with_spectrum(torch.linspace(0.01, 1, 16).tolist(), 200)
    exact = spectral_transform(z, iternorm(iterations))
    found = spectral_transform(z.float(), iternorm(iterations))
    assert (found - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("g", [zca(), iternorm(4)])
def test_a_constant_embedding_stays_finite(g) -> None:
    z = torch.ones(6, 9, dtype=torch.float64).requires_grad_()
    found = spectral_transform(z, g)
    found.sum().backward()
    assert not found.any() and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("g", [zca(), power(0.3), power(-1.5), iternorm(3), torch.log1p, torch.ones_like])
@pytest.mark.parametrize("shape,whitening", [((5, 9), "channel"), ((5, 4), "channel"), ((4, 5), "batch")])
def test_gradcheck(g, shape, whitening) -> None:
    z = embedding(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectral_transform(z, g, whitening=whitening), z)


@pytest.mark.parametrize("g", [zca(), power(0.3), power(1.0), torch.log1p])
@pytest.mark.parametrize(
    "eigenvalues", [[1.0] * 4, [0.5, 2.0, 2.0, 2.0], [1, 1 + 1e-9, 1 + 1e-4, 1.02], [1e-3, 1e-3, 1.0, 1.0]]
)
def test_gradcheck_at_repeated_eigenvalues(g, eigenvalues) -> None:
    z = with_spectrum(eigenvalues, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectral_transform(z, g), z, eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "g,eigenvalues",
    [
        (lambda x: torch.sin(100 * x), [5.0, 5.1, 7.0]),
        (lambda x: x.clamp(min=1).rsqrt(), [0.995, 1.012, 3.0]),
        (lambda x: torch.where(x > 1, x.rsqrt(), 2 - x), [0.995, 1.012, 3.0]),
    ],
)
def test_gradcheck_where_g_changes_between_close_eigenvalues(g, eigenvalues) -> None:
    z = with_spectrum(eigenvalues, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectral_transform(z, g), z, eps=1e-7, atol=1e-4, rtol=1e-4)


def test_plain_eigh_fails_there() -> None:
    """The control: autograd's own eigh has no finite gradient for two equal eigenvalues."""
    s = torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)).requires_grad_()
    weights = embedding(3, 3)
    eigenvalues, u = torch.linalg.eigh(s)
    (((u * eigenvalues.rsqrt()) @ u.T) * weights).sum().backward()
    assert not torch.isfinite(s.grad).all()
    t = s.detach().clone().requires_grad_()
    (matrix_function(t, zca()) * weights).sum().backward()
    # g'(1) = −1/2 on the equal pair; (1/√2 − 1) / (2 − 1) across; g'(2) = −1/2 · 2^−1.5
    across, own = 2**-0.5 - 1, -0.5 * 2**-1.5
    f = torch.tensor([[-0.5, -0.5, across], [-0.5, -0.5, across], [across, across, own]], dtype=torch.float64)
    torch.testing.assert_close(t.grad, f * weights)


def test_eigenvalues_under_rtol_map_to_zero() -> None:
    z = with_spectrum([1e-8, 1.0, 2.0], 7)
    ranks = [
        int((torch.linalg.eigvalsh(covariance(spectral_transform(z, zca(), rtol=r), "channel")) > 0.5).sum())
        for r in (1e-10, 1e-6, 0.7)
    ]
    assert ranks == [3, 2, 1]


@pytest.mark.parametrize("rms", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("g", [zca(), power(0.4), iternorm(4)])
def test_float32_under_autocast_at_any_scale(g, rms) -> None:
    exact = rms * embedding(24, 200)
    z = exact.float().requires_grad_()
    reference = exact.float().double().requires_grad_()
    expected = spectral_transform(reference, g)
    weights = embedding(24, 200, seed=5)
    (expected * weights).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = spectral_transform(z, g)
        (found * weights.float()).sum().backward()
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert (z.grad - reference.grad).norm() / reference.grad.norm() < 1e-3


@pytest.mark.parametrize("g", [zca(), power(0.2), iternorm(5)])
def test_equivariances(g) -> None:
    """Batch whitening turns with the features, channel whitening permutes with the images."""
    z = embedding(12, 7)
    rotation = torch.linalg.qr(embedding(7, 7, seed=2))[0]
    torch.testing.assert_close(
        spectral_transform(z @ rotation, g, whitening="batch"),
        spectral_transform(z, g, whitening="batch") @ rotation,
    )
    order = torch.randperm(12)
    torch.testing.assert_close(spectral_transform(z[order], g), spectral_transform(z, g)[order])
    if g != power(0.2):
        torch.testing.assert_close(spectral_transform(50 * z, g), spectral_transform(z, g))


@pytest.mark.parametrize("method", ["pca", "cholesky"])
@pytest.mark.parametrize("shape,whitening", [((6, 15), "channel"), ((15, 6), "batch")])
def test_pca_and_cholesky_whiten(method, shape, whitening) -> None:
    z = embedding(*shape).requires_grad_()
    out = whiten(z, method=method, whitening=whitening)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(covariance(centred(out, whitening), whitening), identity)
    if method == "cholesky":  # L⁻¹ is triangular: the first image (feature) is only scaled
        zc = centred(z, whitening)
        first = (zc[0], out[0]) if whitening == "channel" else (zc[:, 0], out[:, 0])
        torch.testing.assert_close(first[1], first[0] / first[0].var().sqrt())
    assert torch.autograd.gradcheck(lambda z: whiten(z, method=method, whitening=whitening), z)


def test_pca_and_cholesky_refuse_what_they_cannot() -> None:
    with pytest.raises(ValueError, match="distinct positive eigenvalues"):
        whiten(with_spectrum([1.0, 1.0, 2.0], 9), method="pca")
    with pytest.raises(ValueError, match="distinct positive eigenvalues"):
        whiten(embedding(9, 5), method="pca")
    with pytest.raises(ValueError, match="positive definite"):
        whiten(embedding(9, 5), method="cholesky")
    with pytest.raises(ValueError, match="'svd'"):
        whiten(embedding(5, 9), method="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        spectral_transform(torch.full((4, 9), math.nan), zca())
    with pytest.raises(ValueError, match="'rows'"):
        spectral_transform(embedding(4, 9), zca(), whitening="rows")  # type: ignore[arg-type]


def test_diagnosis_of_a_known_spectrum() -> None:
    """Rows' eigenvalues 1, 1, 2: condition number 2, entropy rank exp(−2·¼ ln ¼ − ½ ln ½) = 2^1.5."""
    found = diagnose(with_spectrum([1.0, 1.0, 2.0], 9))
    assert found["row_condition_number"] == pytest.approx(2)
    assert found["row_entropy_rank"] == pytest.approx(2**1.5)
    # Columns of mean 0 with variances 4 : 1 : 1 -> share 4/6, stable rank 1.5; σ 2 : 1 : 1 -> 2^1.5 again
    base = torch.linalg.qr(torch.cat([torch.ones(8, 1).double(), embedding(8, 3)], 1))[0][:, 1:]
    found = diagnose(base * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))
    assert found["condition_number"] == pytest.approx(4)
    assert found["largest_share"] == pytest.approx(4 / 6)
    assert found["stable_rank"] == pytest.approx(1.5)
    assert found["rankme"] == pytest.approx(2**1.5, rel=1e-4)
    assert found["spread"] > 0.5


def test_collapse_is_told() -> None:
    healthy = diagnose(embedding(64, 128))
    assert collapse(healthy, n=64, d=128) is None
    same = torch.ones(64, 128) + 1e-3 * embedding(64, 128)
    assert "full collapse" in collapse(diagnose(same), n=64, d=128)
    line = embedding(64, 1) @ embedding(1, 128)
    assert "dimensional collapse" in collapse(diagnose(line), n=64, d=128)
    zeros = diagnose(torch.zeros(6, 9))
    assert all(math.isfinite(v) for v in zeros.values()) and "full" in collapse(zeros, n=6, d=9)
    assert "not finite" in collapse(diagnose(torch.full((6, 9), math.nan)), n=6, d=9)


def test_small_eigenvalues_of_float32_embeddings_are_kept() -> None:
    """Eigenvalues down to 1e-9 of the largest: below float32's epsilon, where they counted as zero."""
    spectrum = torch.logspace(0, -9, 12, dtype=torch.float64).tolist()
    z = with_spectrum(spectrum, 64).float()
    expected = spectral_transform(z.double(), zca())
    found = spectral_transform(z, zca())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    of_float32 = 12 * torch.finfo(torch.float32).eps
    narrow = spectral_transform(z, zca(), rtol=of_float32)
    assert torch.linalg.matrix_rank(covariance(expected, "channel"), rtol=0.5) == 12
    assert torch.linalg.matrix_rank(covariance(narrow.double(), "channel"), rtol=0.5) < 10
