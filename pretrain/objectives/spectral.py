"""Spectral transformations: a scalar function g acts on the eigenvalues of an embedding's covariance.

    channel whitening:  Zc = Z minus each row's mean,     S = Zc Zcᵀ / (D − 1)  (N x N),  Ẑ = Φ Zc
    batch whitening:    Zc = Z minus each column's mean,  S = Zcᵀ Zc / (N − 1)  (D x D),  Ẑ = Zc Φ
    Φ = U g(Λ) Uᵀ  for  S = U Λ Uᵀ

Section 3 of Weng et al., "Modulate Your Spectrum in Self-Supervised Learning", ICLR 2024,
https://arxiv.org/abs/2305.16789. Outside autocast, forward and backward. Embeddings are transformed to
float32, or float64 if given; eigenvalues are those of the covariance in float64, for float32 loses those
below 1e-7 of the largest, and a whitened loss would fall by losing directions. IterNorm, a polynomial, has
float32.

Letters of shapes: N images of the global batch, D features, M the covariance's size (N or D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Whitening = Literal["channel", "batch"]
SpectralFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Power:
    """g(λ) = λ^−p; p = 1/2 is ZCA whitening."""

    p: float

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """g(λ) of each eigenvalue (M), same shape and dtype."""
        return eigenvalues.pow(-self.p)


@dataclass(frozen=True, kw_only=True)
class IterNorm:
    """Whitening by Newton's iteration, g(λ) = g_T(λ / tr S) / √(tr S), a polynomial of the spectrum.

    Called with the eigenvalues it returns g of each; the transformation itself needs no eigenvalues (see
    `newton_inverse_root`). Huang et al., CVPR 2019, https://arxiv.org/abs/1904.03441, Eq. 6.
    """

    iterations: int = 4

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"IterNorm takes at least 1 iteration, got {self.iterations}")

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """g(λ) of each eigenvalue (M), same shape and dtype; it depends on their sum, the trace."""
        trace = eigenvalues.sum()
        x = eigenvalues / trace
        p = torch.ones_like(x)
        for _ in range(self.iterations):
            p = (3 * p - p**3 * x) / 2
        return p / trace.sqrt()


def zca() -> Power:
    """Whitening, g(λ) = λ^−1/2: the transformed covariance is the identity."""
    return Power(p=0.5)


def power(p: float) -> Power:
    """g(λ) = λ^−p for any real p."""
    return Power(p=p)


def iternorm(iterations: int = 4) -> IterNorm:
    """Newton's iteration towards λ^−1/2, stopped after so many steps."""
    return IterNorm(iterations=iterations)


def wide(z: Tensor) -> Tensor:
    """float64 stays, everything narrower becomes float32."""
    return z if z.dtype == torch.float64 else z.float()


def no_autocast(z: Tensor) -> torch.autocast:
    """A block in which matrix products keep the dtype of their factors."""
    return torch.autocast(device_type=z.device.type, enabled=False)


def require_finite(s: Tensor) -> None:
    """Raises ValueError unless a covariance or Gram matrix is finite."""
    if not torch.isfinite(s).all():
        raise ValueError("the embeddings' covariance is not finite: an embedding is NaN, infinite or huge")


def centred(z_ND: Tensor, whitening: Whitening) -> Tensor:
    """Z minus its mean over features (channel) or over the batch (batch)."""
    return z_ND - z_ND.mean(_axis(whitening), keepdim=True)


def covariance(zc_ND: Tensor, whitening: Whitening) -> Tensor:
    """The covariance of centred embeddings with the unbiased divisor: N x N (channel) or D x D (batch)."""
    rows_MK = zc_ND if whitening == "channel" else zc_ND.mT
    return product(rows_MK, rows_MK.mT) / (rows_MK.shape[-1] - 1)


class _Product(torch.autograd.Function):
    """A @ B of equal leading dimensions, forward and backward outside autocast."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with no_autocast(a):
            return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        with no_autocast(a):
            return grad @ b.mT if need_a else None, a.mT @ grad if need_b else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ B in the dtype of its factors, in backward too, whatever autocast is on around either."""
    return _Product.apply(a, b)


def _axis(whitening: str) -> int:
    axes = {"channel": -1, "batch": -2}
    if whitening not in axes:
        raise ValueError(f"whitening must be 'channel' or 'batch', got {whitening!r}")
    return axes[whitening]


def _apply(phi_MM: Tensor, zc_ND: Tensor, whitening: Whitening) -> Tensor:
    return product(phi_MM, zc_ND) if whitening == "channel" else product(zc_ND, phi_MM)


def spectral_transform(
    z_ND: Tensor, g: SpectralFunction, *, whitening: Whitening = "channel", rtol: float | None = None
) -> Tensor:
    """Ẑ = Φ Zc (channel) or Zc Φ (batch) with Φ = U g(Λ) Uᵀ (Section 3, Eq. 4).

    z_ND: N x D embeddings. g: a function of positive eigenvalues, each by itself, that autograd can
    differentiate, or `iternorm(T)`; it is called on other values than the eigenvalues too.
    Eigenvalues up to rtol·λ_max count as zero and map to 0; `rtol` is M times float64's epsilon unless given,
    and IterNorm, a polynomial, needs none. Repeated eigenvalues have finite, right gradients.
    Raises ValueError for a wrong shape, an unknown whitening or a non-finite covariance.
    """
    if z_ND.ndim != 2 or min(z_ND.shape) < 2:
        raise ValueError(f"embeddings must be N x D with N, D >= 2, got shape {tuple(z_ND.shape)}")
    with no_autocast(z_ND):
        zc_ND = centred(wide(z_ND) if isinstance(g, IterNorm) else z_ND.double(), whitening)
        out_ND = _apply(matrix_function(covariance(zc_ND, whitening), g, rtol=rtol), zc_ND, whitening)
        return out_ND.to(wide(z_ND.new_empty(0)).dtype)


def matrix_function(s_MM: Tensor, g: SpectralFunction, *, rtol: float | None = None) -> Tensor:
    """Φ = U g(Λ) Uᵀ of a symmetric positive semi-definite S."""
    if isinstance(g, IterNorm):
        return newton_inverse_root(s_MM, g.iterations)
    if rtol is None:
        rtol = s_MM.shape[-1] * torch.finfo(s_MM.dtype).eps
    return _MatrixFunction.apply(s_MM, g, rtol)


def newton_inverse_root(s_MM: Tensor, iterations: int) -> Tensor:
    """IterNorm's Φ: P_0 = I, P_{k+1} = (3 P_k − P_k³ S_N) / 2, Φ = P_T / √(tr S) with S_N = S / tr S.

    s_MM may carry leading dimensions; differentiable by autograd, also under autocast. A covariance of zeros
    has a finite Φ, which maps embeddings of zeros to zeros.

    Computed as P_{k+1} = P_k M_k with M_k = (3 I − Y_k) / 2, Y_k = P_k² S_N carried along as
    Y_{k+1} = M_k² Y_k: the same polynomial at the same three products a step. In the form above rounding
    grows from step to step without bound (Higham 2008, "Functions of Matrices", Chapter 6); here it does not.
    """
    with no_autocast(s_MM):
        trace = s_MM.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        trace = torch.where(trace > 0, trace, 1)
        eye = torch.eye(s_MM.shape[-1], dtype=s_MM.dtype, device=s_MM.device)
        y = s_MM / trace
        p = m = 1.5 * eye - 0.5 * y  # the step from P_0 = I
        for _ in range(iterations - 1):
            y = product(m, product(m, y))
            m = 1.5 * eye - 0.5 * y
            p = product(p, m)
        return p / trace.sqrt()


class _MatrixFunction(torch.autograd.Function):
    """U g(Λ) Uᵀ with the Daleckii-Krein derivative: dS = U (F ∘ Uᵀ dΦ U) Uᵀ, F the divided differences of g.

    autograd's own eigh divides by λ_i − λ_j, which is 0 for repeated eigenvalues; F is finite there.
    """

    @staticmethod
    def forward(ctx: Any, s_MM: Tensor, g: SpectralFunction, rtol: float) -> Tensor:
        require_finite(s_MM)
        eigenvalues_M, u_MM = torch.linalg.eigh(s_MM)
        kept_M = eigenvalues_M > rtol * eigenvalues_M[-1]
        values_M = torch.zeros_like(eigenvalues_M)
        values_M[kept_M] = g(eigenvalues_M[kept_M]).to(eigenvalues_M)
        ctx.g = g
        ctx.save_for_backward(eigenvalues_M, kept_M, u_MM)
        return (u_MM * values_M) @ u_MM.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MM: Tensor) -> tuple[Tensor, None, None]:
        eigenvalues_M, kept_M, u_MM = ctx.saved_tensors
        f_MM = _divided_differences(ctx.g, eigenvalues_M, kept_M)
        with no_autocast(grad_MM):
            return u_MM @ (f_MM * (u_MM.mT @ grad_MM @ u_MM)) @ u_MM.mT, None, None


# Nodes and weights of Gauss-Legendre quadrature on [0, 1].
_NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)
# Relative distance under which g' is integrated; at it the quotient, in float64, still has 11 digits, and the
# quadrature's error, of the sixth power of the distance, is nothing for any g that is smooth at that scale.
_NEAR = 1e-5


def _divided_differences(g: SpectralFunction, x_M: Tensor, kept_M: Tensor) -> Tensor:
    """F_ij = (g(λ_i) − g(λ_j)) / (λ_i − λ_j), near pairs by the mean of g', 0 in the null space.

    In float64 whatever the eigenvalues have: the quotient of close ones loses digits.
    """
    dtype, x_M = x_M.dtype, x_M.double()
    y_M = torch.zeros_like(x_M)
    y_M[kept_M] = g(x_M[kept_M]).to(x_M)
    a, b = x_M[:, None], x_M[None, :]
    both = kept_M[:, None] & kept_M[None, :]
    near = both & ((a - b).abs() < _NEAR * torch.maximum(a, b))
    f_MM = torch.zeros_like(a - b)
    far = ~near & (kept_M[:, None] | kept_M[None, :])
    f_MM[far] = ((y_M[:, None] - y_M[None, :])[far]) / (a - b)[far]
    low, high = a.expand_as(f_MM)[near], b.expand_as(f_MM)[near]
    f_MM[near] = sum(  # type: ignore[assignment]
        w * _derivative(g, low + t * (high - low)) for t, w in zip(_NODES, _WEIGHTS)
    )
    return f_MM.to(dtype)


def _derivative(g: SpectralFunction, x: Tensor) -> Tensor:
    """g'(x) of an elementwise g."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = g(x)
        if not y.requires_grad:  # a constant
            return torch.zeros_like(x)
        return torch.autograd.grad(y.sum(), x)[0]


def whiten(
    z_ND: Tensor,
    *,
    method: Literal["pca", "cholesky"],
    whitening: Whitening = "channel",
    rtol: float | None = None,
) -> Tensor:
    """Whitening that is no U g(Λ) Uᵀ: Φ = Λ^−1/2 Uᵀ (pca) or L⁻¹ with S = L Lᵀ (cholesky).

    Channel: Ẑ = Φ Zc; batch: Ẑ = Zc Φᵀ. The transformed covariance is the identity. The sign of each PCA
    axis is chosen so that its largest component is positive. Raises ValueError where the derivative does not
    exist: pca needs distinct positive eigenvalues (apart by rtol·λ_max), cholesky a positive definite S.
    """
    if z_ND.ndim != 2 or min(z_ND.shape) < 2:
        raise ValueError(f"embeddings must be N x D with N, D >= 2, got shape {tuple(z_ND.shape)}")
    with no_autocast(z_ND):
        zc_ND = centred(wide(z_ND), whitening)
        s_MM = covariance(zc_ND, whitening)
        if rtol is None:
            rtol = s_MM.shape[-1] * torch.finfo(s_MM.dtype).eps
        columns = zc_ND if whitening == "channel" else zc_ND.mT
        if method == "pca":
            out = product(_pca(s_MM, rtol).mT, columns)
        elif method == "cholesky":
            lower_MM, info = torch.linalg.cholesky_ex(s_MM)
            diagonal = lower_MM.diagonal()
            if info != 0 or not (diagonal.min() ** 2 > rtol * diagonal.max() ** 2):
                raise ValueError(_needs("a positive definite covariance", s_MM, whitening, z_ND))
            out = torch.linalg.solve_triangular(lower_MM, columns, upper=False)
        else:
            raise ValueError(f"method must be 'pca' or 'cholesky', got {method!r}")
        return out if whitening == "channel" else out.mT


def _needs(what: str, s_MM: Tensor, whitening: str, z_ND: Tensor) -> str:
    n, d = z_ND.shape
    enough = f"N < D, have N = {n}, D = {d}" if whitening == "channel" else f"N > D, have N = {n}, D = {d}"
    return f"this whitening needs {what}; the {s_MM.shape[-1]} x {s_MM.shape[-1]} one given is not ({enough})"


def _pca(s_MM: Tensor, rtol: float) -> Tensor:
    """U Λ^−1/2, each column's largest component positive."""
    require_finite(s_MM)
    eigenvalues_M, u_MM = torch.linalg.eigh(s_MM)
    gap = rtol * eigenvalues_M[-1]
    smallest, closest = eigenvalues_M[0], eigenvalues_M.diff().min()
    if not (smallest > gap and closest > gap):
        raise ValueError(
            "pca whitening needs distinct positive eigenvalues: the smallest is "
            f"{smallest.item():.3g} and the closest two are {closest.item():.3g} apart, at a largest of "
            f"{eigenvalues_M[-1].item():.3g} (more than {rtol:.1g} of it is wanted); use zca() instead"
        )
    peak_M = u_MM.gather(0, u_MM.abs().argmax(0, keepdim=True))
    return u_MM * peak_M.sign() / eigenvalues_M.sqrt()
