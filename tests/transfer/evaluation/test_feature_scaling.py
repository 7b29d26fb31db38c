"""Scaled features: the plain formulas' numbers, without a second matrix in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from transfer.evaluation import feature_scaling
from transfer.evaluation.feature_scaling import ScaledRows, Scaling, mean_and_std, scaling
from transfer.evaluators.svm import unit_length

KINDS: tuple[Scaling, ...] = ("none", "standardise", "l2", "centred l2")


def features(n: int = 500, d: int = 24) -> np.ndarray:
    x = np.random.default_rng(0).normal(100, 3, (n, d)).astype(np.float32)
    x[:, 7] = 2.5  # never changes in rows that are fitted on
    x[10] = 0  # none of those
    return x


def plain(kind: Scaling, x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """The formulas, in float64."""
    exact = x.astype(np.float64)
    if kind == "standardise":
        std = exact[fit].std(0)
        return np.where(std > 1e-9, (exact - exact[fit].mean(0)) / np.maximum(std, 1e-9), 0)
    if kind == "centred l2":
        exact = exact - exact.mean(1, keepdims=True)
    return (
        exact if kind == "none" else exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    )


def scaled_rows(kind: Scaling, x: np.ndarray, fit: np.ndarray, rows: np.ndarray | None = None) -> ScaledRows:
    rows = fit if rows is None else rows
    return ScaledRows(x_ND=x, rows_N=rows, scaled=scaling(kind, x, fit))


@pytest.mark.parametrize("block_bytes", [1 << 24, 8 * 24 * 7, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_the_plain_formulas(monkeypatch, kind: Scaling, block_bytes: int) -> None:
    monkeypatch.setattr(feature_scaling, "BLOCK_BYTES", block_bytes)
    x = features()
    fit = np.flatnonzero(np.arange(500) % 10 > 1)
    aside = np.setdiff1d(np.arange(500), fit)
    for rows in (fit, aside):
        found, wanted = scaled_rows(kind, x, fit, rows), plain(kind, x, fit)[rows]
        assert len(found) == len(rows) and found[:9].dtype == np.float32
        np.testing.assert_allclose(found.on(torch.device("cpu")).numpy(), wanted, rtol=1e-6, atol=1e-9)
        picks = np.array([5, 2, 40])
        np.testing.assert_allclose(found[picks], wanted[picks], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(x, features())


@pytest.mark.parametrize("block_bytes", [1 << 24, 8 * 24 * 7])
def test_mean_and_deviation_are_exact(monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(feature_scaling, "BLOCK_BYTES", block_bytes)
    x, rows = features(), np.arange(4, 400)
    mean, std = mean_and_std(x, rows)
    np.testing.assert_allclose(mean, x[rows].astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, x[rows].astype(np.float64).std(0), rtol=1e-12, atol=1e-12)


def test_centred_features_have_length_one() -> None:
    x = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], np.float32)  # less 3 and 1: (-2, -1, 3), (-1, -1, 2)
    wanted = [[-2 / 14**0.5, -1 / 14**0.5, 3 / 14**0.5], [-1 / 6**0.5, -1 / 6**0.5, 2 / 6**0.5]]
    np.testing.assert_allclose(scaled_rows("centred l2", x, np.arange(2))[:], wanted, rtol=1e-6)


def test_lengths_of_voc_are_vissls() -> None:
    x = features()
    lengths = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    plus = unit_length(x)
    assert plus.dtype == np.float64 and plus is not x and not plus[10].any()
    np.testing.assert_allclose(plus, x / (lengths + 1e-5), rtol=1e-12)


@pytest.mark.parametrize("exponent", [-83, -40, 40, 63])  # 1e-25 to 9e18
@pytest.mark.parametrize("kind", KINDS[1:])
def test_features_of_any_magnitude_are_scaled_alike(kind: Scaling, exponent: int) -> None:
    x, rows = features(), np.arange(500)
    got, wanted = (scaled_rows(kind, y, rows)[:] for y in (x * np.float32(2.0) ** exponent, x))
    assert wanted.std() > 0.01
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_matrix_is_never_held(monkeypatch, tmp_path: Path, kind: Scaling) -> None:
    monkeypatch.setattr(feature_scaling, "BLOCK_BYTES", 1 << 16)
    np.save(tmp_path / "x.npy", features(20_000, 64))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    fit = np.arange(0, 20_000, 2)
    tracemalloc.start()
    found = scaled_rows(kind, x, fit)
    for start in range(0, len(found), 128):
        assert np.isfinite(found[start : start + 128]).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * (1 << 16) < x.nbytes / 10  # a float64 copy would be twice the matrix
