"""Metrics of several views of each image: whether they agree, and how many directions tell images apart.

Letters of shapes: N images, Q views of each, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from transfer.spectrum.rank_metrics import EPSILON, entropy_rank

MOST_FEATURES = 8192
"""LiDAR forms D x D matrices."""


def alignment(x_NQD: np.ndarray | Tensor) -> float:
    """Mean ‖x − x⁺‖² of the first two views of an image, features scaled to length 1; 0 to 4, less is closer.

    Wang and Isola, ICML 2020, https://arxiv.org/abs/2005.10242, with α = 2. x_NQD: Q >= 2 views.
    """
    first, second = (normalize(_views(x_NQD)[:, q], dim=-1) for q in (0, 1))
    return float((first - second).square().sum(-1).mean())


def uniformity(x_ND: np.ndarray | Tensor) -> float:
    """log of the mean of exp(−2 ‖x − y‖²) over pairs of images, features of length 1; −8 to 0, less is wider.

    Wang and Isola, ICML 2020, https://arxiv.org/abs/2005.10242, with t = 2. x_ND: two images or
    more.
    """
    x = normalize(torch.as_tensor(np.asarray(x_ND)).double(), dim=-1)
    n = len(x)
    kernel = (4 * (x @ x.T) - 4).exp()  # ‖x − y‖² = 2 − 2 ⟨x, y⟩
    return float(((kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))).log())


def lidar(x_NQD: np.ndarray | Tensor, *, delta: float = 1e-6) -> float:
    """LiDAR: exp-entropy of λ / Σ λ + 1e-7, λ the eigenvalues of Σ_w^−1/2 Σ_b Σ_w^−1/2, each image a class.

    Σ_b: covariance of the images' means over views; Σ_w: mean covariance of views around them, + delta·I.
    Thilak et al., "LiDAR", ICLR 2024, https://arxiv.org/abs/2312.04000. Between 1 and
    min(N − 1, D). The paper has N = 1,000 and Q = 50. Eigenvalues of Σ_w below what float64 tells from zero
    count as that.
    """
    x = _views(x_NQD)
    n, q, d = x.shape
    mean_ND = x.mean(1)
    within = (x - mean_ND[:, None]).reshape(-1, d)
    between_ND = mean_ND - mean_ND.mean(0)
    values_D, u_DD = torch.linalg.eigh(within.T @ within / (n * q))
    values_D = values_D.clamp_min(d * torch.finfo(x.dtype).eps * float(values_D[-1])) + delta
    white = (u_DD / values_D.sqrt()).T @ between_ND.T  # D x N
    gram = white.T @ white if n <= d else white @ white.T
    return entropy_rank(torch.linalg.eigvalsh(gram).clamp_min(0) / n, epsilon=EPSILON)


def _views(x_NQD: np.ndarray | Tensor) -> Tensor:
    x = torch.as_tensor(np.asarray(x_NQD)).double()
    if x.ndim != 3 or x.shape[1] < 2 or len(x) < 2:
        raise ValueError(f"views must be N x Q x D with N, Q >= 2, got shape {tuple(x.shape)}")
    return x
