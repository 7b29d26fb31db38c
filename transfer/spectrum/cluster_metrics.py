"""Metrics of groups of images: k-means clusters where there are no labels, classes where there are.

Letters of shapes: N images, D features, K clusters or classes.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from transfer.evaluators.knn_vote import knn_evaluate
from transfer.spectrum.rank_metrics import as_matrix


def clid(x_ND: np.ndarray | Tensor, *, clusters: int, neighbours: int, seed: int = 0) -> dict[str, float]:
    """CLID, as cluster_learnability, intrinsic_dimension and their product clid.

    cluster_learnability: the share of images whose k-means cluster a majority of their k nearest neighbours
    in the other half of the images tells. Lu et al., "Using Representation Expressiveness and Learnability
    to Evaluate Self-Supervised Learning Methods", https://arxiv.org/abs/2206.01251, who take the
    classifier's performance while it is given one image after the other.
    """
    x = as_matrix(x_ND).float()
    found = KMeans(min(clusters, len(x) // 2), n_init=1, random_state=seed).fit_predict(x.numpy())
    order = np.random.default_rng(seed).permutation(len(x))
    bank, queries = order[: len(x) // 2], order[len(x) // 2 :]
    k = min(neighbours, len(bank))
    hits = knn_evaluate(
        x[bank], found[bank], x[queries], found[queries], ks=k, vote="majority", metric="euclidean",
        over_ranks=False,
    )  # fmt: skip
    learnt, dimension = hits[f"top1_k{k}"] / 100, intrinsic_dimension(x)
    return {
        "cluster_learnability": learnt,
        "intrinsic_dimension": dimension,
        "clid": learnt * dimension,
    }


def intrinsic_dimension(x_ND: np.ndarray | Tensor) -> float:
    """TwoNN: N / Σ log(r₂ / r₁), r₁ and r₂ the distances to the nearest and second nearest other image.

    The maximum likelihood of Facco et al. 2017, https://www.nature.com/articles/s41598-017-11873-y. Images
    that have a copy (r₁ = 0) say nothing and are left out; NaN where fewer than 3 are left.
    """
    x = as_matrix(x_ND)
    squares = torch.cdist(x, x).fill_diagonal_(torch.inf)
    first, second = squares.topk(2, dim=1, largest=False).values.T
    kept = first > 0
    logs = (second[kept] / first[kept]).log()
    return float(len(logs) / logs.sum()) if len(logs) >= 3 and logs.sum() > 0 else float("nan")


def neural_collapse(x_ND: np.ndarray | Tensor, labels_N: np.ndarray) -> dict[str, float]:
    """Neural-collapse ratios of K >= 2 classes, all 0 where features have collapsed to a simplex of K points.

    nc1: tr(Σ_W Σ_B⁺) / K, Σ_W the covariance within classes, Σ_B that of the K class means. nc2_norms: the
    standard deviation of ‖μ_c − μ‖ over their mean. nc2_angles: the mean over pairs of classes of |cos + 1
    / (K − 1)|. Papyan et al., PNAS 2020, https://arxiv.org/abs/2008.08186, and for nc1
    https://arxiv.org/abs/2105.02375. Nothing with fewer than two classes, or where each image is its
    own.
    """
    x = as_matrix(x_ND)
    classes, index_N = np.unique(labels_N, return_inverse=True)
    k = len(classes)
    if k < 2 or k >= len(x):
        return {}
    index = torch.as_tensor(index_N)
    means_KD = torch.zeros(k, x.shape[1], dtype=x.dtype).index_add_(0, index, x)
    means_KD = means_KD / torch.bincount(index)[:, None]
    centred_KD = means_KD - means_KD.mean(0)
    _, s, v = torch.linalg.svd(centred_KD / k**0.5, full_matrices=False)
    if not s[0] > 0:  # all classes at one point: no ratio
        return {}
    kept = s > s[0] * max(centred_KD.shape) * torch.finfo(x.dtype).eps
    within = (x - means_KD[index]) @ v[kept].T  # Σ_B⁺ = V S⁻² Vᵀ: no D x D matrix
    norms = centred_KD.norm(dim=1)
    unit = torch.nn.functional.normalize(centred_KD, dim=1)
    pairs = ~torch.eye(k, dtype=torch.bool)
    return {
        "nc1": float((within.square().mean(0) / s[kept] ** 2).sum() / k),
        "nc2_norms": float(norms.std(correction=0) / norms.mean()),
        "nc2_angles": float(((unit @ unit.T)[pairs] + 1 / (k - 1)).abs().mean()),
    }
