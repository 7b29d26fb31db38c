"""Metrics of a spectrum beside values derived by hand, plain formulas, and rotations that change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.objectives.diagnostics import diagnose
from transfer.spectrum.cluster_metrics import clid, intrinsic_dimension, neural_collapse
from transfer.spectrum.half_samples import intervals
from transfer.spectrum.rank_metrics import decay, rank_metrics, rankme, spectrum
from transfer.spectrum.view_metrics import alignment, lidar, uniformity


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def with_spectrum(eigenvalues: np.ndarray, n: int, *, mean: float = 0.0) -> np.ndarray:
    """N x D features whose covariance (divisor N) has exactly these D eigenvalues, N > D."""
    d = len(eigenvalues)
    x = generator().normal(size=(n, d))
    u = np.linalg.qr(np.concatenate([np.ones((n, 1)), x], 1))[0][:, 1:]  # columns of mean 0
    v = np.linalg.qr(generator(1).normal(size=(d, d)))[0]
    return u * np.sqrt(n * eigenvalues) @ v.T + mean


def test_an_isotropic_spectrum() -> None:
    found = rank_metrics(with_spectrum(np.full(40, 2.5), 200))
    assert found["rankme"] == pytest.approx(40, rel=1e-4)  # each share gains 1e-7
    assert found["entropy_rank"] == pytest.approx(40) and found["stable_rank"] == pytest.approx(40)
    assert found["condition_number"] == pytest.approx(1) and found["largest_share"] == pytest.approx(1 / 40)
    assert found["decay"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [300, 100])
def test_a_power_law(alpha: float, n: int) -> None:
    """i^−α has decay α whatever the weights; with fewer images than features 99 eigenvalues are left."""
    d = 150
    values = np.arange(1, d + 1) ** -alpha
    if n > d:
        x = with_spectrum(values, n)
        torch.testing.assert_close(spectrum(x), torch.from_numpy(values), rtol=1e-9, atol=1e-12)
        found = rank_metrics(x)
        assert found["decay"] == pytest.approx(alpha, rel=1e-9)
        share = values / values.sum()
        assert found["entropy_rank"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))
        assert found["stable_rank"] == pytest.approx(values.sum())
        assert found["condition_number"] == pytest.approx(d**alpha)
    else:
        x = with_spectrum(values, 200)[:n]
        assert len(spectrum(x)) == 99
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    own = diagnose(torch.from_numpy(x))
    assert own["rankme"] == pytest.approx(rankme(x), rel=1e-9)


def test_decay_is_the_weighted_fit() -> None:
    values = np.sort(generator().gamma(2, size=120))[::-1].copy()
    i = np.arange(11, 101)
    slope, _ = np.polyfit(np.log(i), np.log(values[10:100]), 1, w=np.sqrt(1 / i))  # polyfit weights residuals
    assert decay(torch.from_numpy(values)) == pytest.approx(-slope)
    assert math.isnan(decay(torch.from_numpy(values[:12].copy())))


def test_rank_one_and_zeros() -> None:
    line = np.outer(generator().normal(size=50), generator(1).normal(size=20))
    found = rank_metrics(line)
    assert found["entropy_rank"] == pytest.approx(1) and found["stable_rank"] == pytest.approx(1)
    assert found["condition_number"] > 1e14 and found["largest_share"] == pytest.approx(1)
    assert found["rankme"] == pytest.approx(1, abs=1e-4) and math.isnan(found["decay"])
    assert rank_metrics(np.zeros((5, 4)))["stable_rank"] == 1
    with pytest.raises(ValueError, match="N, D >= 2"):
        rankme(np.zeros((1, 4)))


def _plain_lidar(x: np.ndarray, delta: float) -> float:
    n, q, d = x.shape
    mean = x.mean(1)
    between = np.cov(mean.T, bias=True)
    within = sum(np.outer(v, v) for v in (x - mean[:, None]).reshape(-1, d)) / (n * q) + delta * np.eye(d)
    s, u = np.linalg.eigh(within)
    root = u / np.sqrt(s) @ u.T
    values = np.abs(np.linalg.eigvalsh(root @ between @ root))
    p = values / values.sum() + 1e-7
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize(("n", "d"), [(30, 12), (12, 20)])
def test_views(n: int, d: int) -> None:
    base = generator().normal(size=(n, 1, d)) * np.linspace(1, 3, d)
    x = base + 0.3 * generator(1).normal(size=(n, 4, d))
    assert lidar(x, delta=1e-3) == pytest.approx(_plain_lidar(x, 1e-3), rel=1e-3)
    assert lidar(x) < min(n, d) + 1e-3
    flat = x * (np.arange(d) < 5) * 1e6  # where delta is nothing beside rounding
    assert lidar(flat) == pytest.approx(lidar(flat[..., :5]), rel=1e-2)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert alignment(x) == pytest.approx(((unit[:, 0] - unit[:, 1]) ** 2).sum(-1).mean())
    assert alignment(np.stack([x[:, 0], -x[:, 0]], 1)) == pytest.approx(4)
    pairs = [math.exp(-2 * ((a - b) ** 2).sum()) for a in unit[:, 0] for b in unit[:, 0] if a is not b]
    expected = math.log((sum(pairs) - n) / (n * (n - 1)))
    assert uniformity(x[:, 0]) == pytest.approx(expected)
    assert uniformity(np.array([[1.0, 0], [-3, 0]])) == pytest.approx(-8)
    with pytest.raises(ValueError, match="Q >= 2"):
        lidar(x[:, :1])


def test_a_rotation_changes_nothing() -> None:
    x = generator().normal(size=(60, 16)) * np.linspace(1, 4, 16) + 2
    turn = np.linalg.qr(generator(1).normal(size=(16, 16)))[0]
    labels = np.arange(60) % 4
    views = np.stack([x, x + generator(2).normal(size=x.shape)], 1)
    for metrics in (
        lambda r: rank_metrics(x @ r, decay_range=(2, 14)),
        lambda r: neural_collapse(x @ r, labels),
        lambda r: {"a": alignment(views @ r), "u": uniformity(x @ r), "l": lidar(views @ r)},
        lambda r: {"id": intrinsic_dimension(x @ r)},
    ):
        assert metrics(turn) == pytest.approx(metrics(np.eye(16)), rel=1e-6)


def test_intrinsic_dimension_and_clusters() -> None:
    """Uniform in 3 of 20 dimensions; three far clusters are told from the other half without error."""
    flat = generator().uniform(size=(1500, 3)) @ generator(1).normal(size=(3, 20))
    assert intrinsic_dimension(flat) == pytest.approx(3, rel=0.12)
    assert intrinsic_dimension(np.concatenate([flat[:300], flat[:300]])) > 0  # copies are left out
    far = np.repeat(np.eye(3) * 100, 40, 0) + generator().normal(size=(120, 3))
    found = clid(far, clusters=3, neighbours=5)
    assert found["cluster_learnability"] == 1
    assert found["clid"] == pytest.approx(found["intrinsic_dimension"])
    noise = clid(generator().normal(size=(200, 30)), clusters=20, neighbours=5)
    assert noise["cluster_learnability"] < 0.6


def test_neural_collapse() -> None:
    simplex = np.eye(4) - 0.25
    labels = np.repeat(np.arange(4), 5)
    collapsed = simplex[labels] + 7.0
    found = neural_collapse(collapsed, labels)
    assert max(found.values()) < 1e-12
    noisy = collapsed + 0.1 * generator().normal(size=collapsed.shape)
    means = np.stack([noisy[labels == c].mean(0) for c in range(4)])
    within = np.mean([np.outer(v, v) for v in noisy - means[labels]], 0)
    centred = means - means.mean(0)
    between = centred.T @ centred / 4
    wanted = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4
    assert neural_collapse(noisy, labels)["nc1"] == pytest.approx(wanted)
    assert neural_collapse(collapsed, np.zeros(20, int)) == {} == neural_collapse(collapsed, np.arange(20))


def test_an_interval_is_that_of_the_mean() -> None:
    """Of a mean the standard error is known: s / √n; 400 halves meet it within 15 %, 4 standard errors."""
    x = generator().normal(size=500)
    whole, found = intervals(lambda at: {"mean": float(x[at].mean()), "odd": math.nan}, 500, repeats=400)
    assert whole["mean"] == x.mean() and set(found) == {"mean"}
    low, high = found["mean"]
    assert (low + high) / 2 == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 500**0.5, rel=0.15)


def test_an_interval_of_a_ratio_is_symmetric_in_its_logarithm_and_threads_stay_what_they_were() -> None:
    x, threads = np.exp(3 * generator().normal(size=500)), torch.get_num_threads()
    torch.set_num_threads(2)
    plain, log = (
        intervals(f, 500, repeats=20, ratios=("ratio",))
        for f in (
            lambda at: {"plain": float(np.log(x[at]).mean())},
            lambda at: {"ratio": math.exp(np.log(x[at]).mean()), "threads": torch.get_num_threads()},
        )
    )
    assert np.log(log[1]["ratio"]) == pytest.approx(plain[1]["plain"]) and log[1]["ratio"][0] > 0
    assert log[0]["threads"] == 1 and torch.get_num_threads() == 2
    torch.set_num_threads(threads)
