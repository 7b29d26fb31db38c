"""k-NN: beside a plain float64 reference, ties by hand, blocks and ranks that change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import transfer.evaluators.nearest
from pretrain.common.errors import UserError
from pretrain.common.process_group import rank
from tests.helpers.ranks import run_on_ranks
from transfer.evaluation import results
from transfer.evaluators.knn import main
from transfer.evaluators.knn_vote import knn_evaluate
from transfer.evaluators.nearest import nearest


def reference(bank, bank_labels, queries, query_labels, *, k, temperature, vote, metric):
    """One query at a time, sorted by (falling similarity, index), labels by (falling votes, label)."""
    hits = np.zeros(2)
    classes = max(bank_labels.max(), query_labels.max()) + 1
    for q, truth in zip(queries.astype(np.float64), query_labels):
        b = bank.astype(np.float64)
        if metric == "cosine":
            near = (b / np.linalg.norm(b, axis=1, keepdims=True)) @ (q / np.linalg.norm(q))
        else:
            near = b @ q if metric == "dot" else -np.linalg.norm(b - q, axis=1)
        order = np.argsort(-near, kind="stable")[:k]
        weight = near[order] / temperature
        weight = np.exp(weight - weight.max())
        if metric == "euclidean":
            weight = 1 / (-near[order] + 1e-5)
        if vote == "majority":
            weight = np.ones(k)
        votes = np.zeros(classes)
        np.add.at(votes, bank_labels[order], weight)
        ranking = np.argsort(-votes, kind="stable")
        ranking = ranking[np.isin(ranking, bank_labels[order])]  # a class without a vote has no place
        hits += truth == ranking[0], truth in ranking[:5]
    return 100 * hits / len(queries)


def data(n: int = 300, m: int = 90, d: int = 24, classes: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    bank_labels, query_labels = rng.integers(0, classes, n), rng.integers(0, classes, m)
    bank = (centres[bank_labels] + 1.5 * rng.normal(size=(n, d))).astype(np.float32)
    queries = (centres[query_labels] + 1.5 * rng.normal(size=(m, d))).astype(np.float32)
    return bank, bank_labels, queries, query_labels


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("vote", ["weighted", "majority"])
@pytest.mark.parametrize("block_bytes", [1 << 27, 4000])
def test_equals_the_reference(monkeypatch, metric, vote, block_bytes) -> None:
    monkeypatch.setattr(transfer.evaluators.nearest, "BLOCK_BYTES", block_bytes)
    parts = data()
    done: list[int] = []
    got = knn_evaluate(*parts, ks=(20, 1, 7), temperature=0.1, vote=vote, metric=metric, told=done.append)
    assert sum(done) == len(parts[0]) and (len(done) > 1) == (block_bytes == 4000)
    for k in (1, 7, 20):
        wanted = reference(*parts, k=k, temperature=0.1, vote=vote, metric=metric)
        assert [got[f"top1_k{k}"], got[f"top5_k{k}"]] == pytest.approx(wanted.tolist())
    assert 20 < got["top1_k20"] < 99


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_equally_near_images_by_their_index(monkeypatch, metric) -> None:
    # Whole numbers: every product is exact. 40 bank rows take 5 values, so each query has 8-fold ties.
    rng = np.random.default_rng(1)
    bank = torch.from_numpy(rng.integers(0, 5, (40, 1)).astype(np.float32))
    queries = torch.tensor([[1.0], [2.0]])
    for block in (1 << 27, 64):
        monkeypatch.setattr(transfer.evaluators.nearest, "BLOCK_BYTES", block)
        _, index = nearest(bank, queries, 11, metric=metric, device=torch.device("cpu"))
        far = [-bank if metric == "dot" else (bank - q).abs() for q in queries]
        wanted = [np.argsort(f[:, 0].numpy(), kind="stable")[:11].tolist() for f in far]
        assert index.tolist() == wanted


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("block_bytes", [1 << 27, 4000])
def test_distances_are_exact_whatever_the_offset(monkeypatch, offset, block_bytes) -> None:
    # At an offset of 100 the squares have 7 digits before the point where the distances have 2.
    monkeypatch.setattr(transfer.evaluators.nearest, "BLOCK_BYTES", block_bytes)
    bank, _, queries, _ = (torch.from_numpy(part) for part in data())
    bank, queries = bank + offset, torch.cat([queries + offset, bank[:30] + offset])
    near, index = nearest(bank, queries, 7, metric="euclidean", device=torch.device("cpu"))
    exact = (bank.double()[None] - queries.double()[:, None]).square().sum(2)
    wanted, order = exact.sort(dim=1, stable=True)
    assert torch.equal(index, order[:, :7])
    torch.testing.assert_close(-near.double(), wanted[:, :7], rtol=1e-5, atol=0)
    assert index[-30:, 0].tolist() == list(range(30)) and not near[-30:, 0].any()


def test_a_class_without_a_vote_has_no_place() -> None:
    # Labels 0 ... 9 at the positions 0 ... 9; a query at 7 has the neighbours 7, 6 and 8, then 5 and 9.
    bank = np.arange(10, dtype=np.float32)[:, None]
    query = np.full((10, 1), 7, np.float32)
    got = knn_evaluate(bank, np.arange(10), query, np.arange(10), ks=[1, 3, 5], metric="euclidean")
    assert [got[f"top1_k{k}"] for k in (1, 3, 5)] == [10, 10, 10]  # of ten true labels, one is 7
    assert [got[f"top5_k{k}"] for k in (1, 3, 5)] == [10, 30, 50]


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("exponent", [-83, -45, 45, 63])  # times 1e-25 to 9e18, exactly
def test_features_of_any_magnitude_are_ranked_alike(metric: str, exponent: int) -> None:
    bank, bank_labels, queries, query_labels = data()
    scale = np.float32(2.0) ** exponent
    options = {"ks": (1, 5, 20), "vote": "majority", "metric": metric}
    wanted = knn_evaluate(bank, bank_labels, queries, query_labels, **options)
    got = knn_evaluate(bank * scale, bank_labels, queries * scale, query_labels, **options)
    assert got == pytest.approx(wanted, abs=1e-9) and 20 < wanted["top1_k20"] < 99
    # One row of another magnitude: nothing is far from it or near to it that was not before.
    bank[0] *= scale
    mixed = knn_evaluate(bank, bank_labels, queries, query_labels, **options)
    exact = knn_evaluate(bank.astype(float), bank_labels, queries.astype(float), query_labels, **options)
    assert mixed == pytest.approx(exact, abs=1e-9)


def test_half_precision_is_ranked_in_float32() -> None:
    rng = np.random.default_rng(2)
    bank, queries = (rng.normal(size=(n, 64)).astype(np.float16) for n in (400, 100))
    labels, truth = rng.integers(0, 5, 400), rng.integers(0, 5, 100)
    for metric in ("cosine", "dot", "euclidean"):
        half = knn_evaluate(
            torch.from_numpy(bank), labels, torch.from_numpy(queries), truth, ks=[1, 9], metric=metric
        )
        assert half == knn_evaluate(
            bank.astype(np.float32), labels, queries.astype(np.float32), truth, ks=[1, 9], metric=metric
        )


def test_equal_votes_go_to_the_smallest_label() -> None:
    bank = np.array([[1.0], [1.0], [0.0], [0.0]], np.float32)
    query = np.array([[1.0]], np.float32)
    for labels, truth, hit in (([3, 1, 0, 0], 1, 100), ([3, 1, 0, 0], 3, 0), ([1, 3, 0, 0], 1, 100)):
        got = knn_evaluate(
            bank, np.array(labels), query, np.array([truth]), ks=[2], metric="dot", vote="majority"
        )
        assert got["top1_k2"] == hit


def test_a_bank_in_a_file(tmp_path: Path) -> None:
    bank, bank_labels, queries, query_labels = data()
    np.save(tmp_path / "bank.npy", bank)
    stored = np.load(tmp_path / "bank.npy", mmap_mode="r")
    assert knn_evaluate(stored, bank_labels, queries, query_labels, ks=[5]) == knn_evaluate(
        bank, bank_labels, queries, query_labels, ks=[5]
    )


def _judge_on_a_rank(folder: Path) -> None:
    torch.save(knn_evaluate(*data(), ks=[5, 20]), folder / f"{rank()}.pt")


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    run_on_ranks(2, _judge_on_a_rank, tmp_path)
    wanted = knn_evaluate(*data(), ks=[5, 20])
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, bl, q, ql: (b[:10], bl[:10], q, ql), "wanted 1 to 10"),
        (lambda b, bl, q, ql: (b, bl[:-1], q, ql), "as many labels"),
        (lambda b, bl, q, ql: (b, bl, q[:, :-1], ql), "columns"),
        (lambda b, bl, q, ql: (b * np.nan, bl, q, ql), "bank feature is not finite"),
    ],
)
def test_mistakes_are_named(change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        knn_evaluate(*change(*data()), ks=[20])


def test_the_command(cifar_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--weights", "raw-pixels", "--dataset", "cifar10", "--data-dir", str(cifar_folder),
        "--output", str(tmp_path / "out"), "--label", "raw pixels",
    ]  # fmt: skip
    assert main([*argv, "--protocol", "solo_knn@1"]) == 0
    (found,) = results.read(tmp_path / "out")
    assert (found.n, found.seed, found.image_size, found.label) == (160, None, 32, "raw pixels")
    assert found.metrics["top1_k20"] > 15  # chance is 10
    assert main([*argv, "--protocol", "solo_knn@1"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert len(results.read(tmp_path / "out")) == 1
    assert main([*argv, "--protocol", "dino_knn@1"]) == 0
    assert len(results.read(tmp_path / "out")[1].metrics) == 8
