"""Scaled features: the plain formulas' numbers, without a second matrix in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from transfer.evaluation import feature_scaling
from transfer.evaluation.feature_scaling import mean_and_std, standardise, to_unit_length
from transfer.evaluators.svm import unit_length


def features(n: int = 500, d: int = 24) -> np.ndarray:
    x = np.random.default_rng(0).normal(100, 3, (n, d)).astype(np.float32)
    x[:, 7] = 2.5  # never changes
    return x


@pytest.mark.parametrize("block_bytes", [1 << 24, 8 * 24 * 7, 1])
def test_the_numbers_are_the_plain_formulas(monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(feature_scaling, "BLOCK_BYTES", block_bytes)
    x = features()
    exact = x.astype(np.float64)
    mean, std = mean_and_std(x)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std(0), rtol=1e-12, atol=1e-12)
    other = features(90)
    wanted = np.delete((other - exact.mean(0)) / np.maximum(exact.std(0), 1e-9), 7, axis=1)
    standardise(other, mean, std)
    assert other.dtype == np.float32 and not other[:, 7].any()
    np.testing.assert_allclose(np.delete(other, 7, axis=1), wanted, rtol=1e-6)


@pytest.mark.parametrize("block_bytes", [1 << 24, 8 * 24 * 7])
def test_rows_of_unit_length(monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(feature_scaling, "BLOCK_BYTES", block_bytes)
    x = features()
    x[3] = 0
    lengths = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    plus = unit_length(x)  # VISSL's
    assert plus.dtype == np.float64 and plus is not x
    np.testing.assert_allclose(plus, x / (lengths + 1e-5), rtol=1e-12)
    wanted = x / np.maximum(lengths, 1e-12)
    to_unit_length(x)
    np.testing.assert_allclose(x, wanted, rtol=1e-6)
    assert not x[3].any()


@pytest.mark.parametrize("exponent", [-83, -40, 40, 63])  # 1e-25 to 9e18
def test_features_of_any_magnitude_are_scaled_alike(exponent: int) -> None:
    x = features()
    scaled = x * np.float32(2.0) ** exponent  # exact
    for work in (to_unit_length, lambda y: standardise(y, *mean_and_std(y))):
        got, wanted = scaled.copy(), x.copy()
        work(got)
        work(wanted)
        assert wanted.std() > 0.01
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "work",
    [lambda x: standardise(x, *mean_and_std(x)), to_unit_length],
    ids=["standardise", "to_unit_length"],
)
def test_memory_beside_the_matrix_is_a_few_blocks(monkeypatch, work: Callable[[np.ndarray], None]) -> None:
    monkeypatch.setattr(feature_scaling, "BLOCK_BYTES", 1 << 16)
    x = features(20_000, 64)
    tracemalloc.start()
    work(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * (1 << 16) < x.nbytes / 10  # a float64 copy would be twice the matrix
