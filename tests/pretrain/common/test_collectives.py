"""Ranks against one process over the joined batch: the loss, every parameter's gradient after DDP, SyncBN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pretrain.common import collectives, process_group
from pretrain.network import sync_batchnorm
from pretrain.objectives.gaussian import sigreg_loss
from pretrain.objectives.intl import intl_loss
from pretrain.objectives.redundancy import barlow_twins_loss, vicreg_loss
from pretrain.objectives.spectral import power
from pretrain.objectives.volume import coding_rate_loss, frossl_loss, mmcr_loss
from pretrain.objectives.whitening import spectral_loss, w_mse_loss
from tests.helpers.ranks import run_on_ranks

IMAGES = 16


def _network(width: int) -> nn.Module:
    """A small convolutional encoder with BatchNorm, and a projector of `width` features."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 20, bias=False), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, width),
    ).double()  # fmt: skip


def _views() -> Tensor:
    torch.manual_seed(4)
    base = torch.randn(1, IMAGES, 3, 6, 6, dtype=torch.float64)
    return base + 0.5 * torch.randn(3, IMAGES, 3, 6, 6, dtype=torch.float64)


CASES = [  # width of the embedding, options; 30 and 9 do not divide by 4, 9 not by 2: these gather
    (32, {}),
    (32, {"momentum_target": True}),
    (30, {}),
    (9, {}),
    (32, {"whitening": "batch"}),
    (33, {"whitening": "batch"}),
    (10, {"whitening": "batch"}),
    (32, {"power": 0.5}),
    (8, {"power": 0.4, "whitening": "batch"}),
    (32, {"loss": vicreg_loss}),
    (9, {"loss": vicreg_loss}),
    (32, {"loss": barlow_twins_loss, "momentum_target": True}),
    (9, {"loss": barlow_twins_loss}),
    (8, {"loss": w_mse_loss}),
    (32, {"loss": frossl_loss}),
    (9, {"loss": frossl_loss, "momentum_target": True}),
    (32, {"loss": mmcr_loss, "local": 0.2}),
    (9, {"loss": mmcr_loss}),
    (33, {"loss": coding_rate_loss}),
    (32, {"loss": coding_rate_loss}),
    (9, {"loss": sigreg_loss, "directions": 32, "step": 5}),
]


def _outcome(model: nn.Module, bare: nn.Module, views: Tensor, options: dict) -> dict[str, Tensor]:
    options = dict(options)
    embeddings = [model(view) for view in views]
    if "power" in options:
        terms = {"total": spectral_loss(embeddings, power(options.pop("power")), **options)}
    else:
        terms = options.pop("loss", intl_loss)(embeddings, **options)._asdict()
    terms["total"].backward()
    found = {name: p.grad for name, p in bare.named_parameters()}
    found |= dict(bare.named_buffers())
    return {**found, **{name: value.detach() for name, value in terms.items()}}


def _on_each_rank(folder: Path) -> None:
    rank, world = process_group.rank(), process_group.world_size()
    own = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    found = []
    for width, options in CASES:
        bare = sync_batchnorm.convert_sync_batchnorm(_network(width), torch.device("cpu"))
        # Three forward passes a step: buffers must not be broadcast between them.
        model = nn.parallel.DistributedDataParallel(bare, broadcast_buffers=False)
        found.append(_outcome(model, bare, _views()[:, own], options))
    x = torch.full((2, 3), float(rank), requires_grad=True)
    y = collectives.gather_rows(x)
    (y * torch.arange(2 * world)[:, None]).sum().backward()
    helpers = {"gathered": y.detach(), "gather_grad": x.grad, "any": collectives.any_rank(rank == 0)}
    torch.save((found, helpers), folder / f"{rank}.pt")
    process_group.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int, tmp_path: Path) -> None:
    run_on_ranks(world, _on_each_rank, tmp_path)
    results = [torch.load(tmp_path / f"{r}.pt") for r in range(world)]
    for i, (width, options) in enumerate(CASES):
        model = _network(width)
        expected = _outcome(model, model, _views(), options)
        for found, _ in results:
            assert found[i].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[i][name], value, rtol=1e-9, atol=1e-10, msg=f"{CASES[i]} {name}"
                )
    for rank, (_, helpers) in enumerate(results):
        assert helpers["any"]
        assert helpers["gathered"][:, 0].tolist() == [r for r in range(world) for _ in (0, 1)]
        # every rank's sum holds row i with weight i: d(sum of all ranks' losses) / d row = world * i
        assert helpers["gather_grad"][:, 0].tolist() == [world * 2 * rank, world * (2 * rank + 1)]


def test_local_batchnorm_would_differ() -> None:
    """The control of the test above: halves normalised on their own give another loss."""
    whole = _network(32)
    halves = copy.deepcopy(whole)
    views = _views()
    joined = intl_loss([whole(v) for v in views]).total
    apart = intl_loss([torch.cat([halves(h) for h in v.chunk(2)]) for v in views]).total
    assert abs(joined - apart) > 1e-3


def test_one_process_answers() -> None:
    x = torch.randn(2, 3)
    assert process_group.world_size() == 1 and process_group.rank() == 0 and process_group.is_main()
    for helper in (collectives.all_reduce, collectives.gather_rows, collectives.split_features):
        assert helper(x) is x
    assert torch.equal(collectives.sum_over_ranks(x), x)


def test_conversion_keeps_parameters_and_names() -> None:
    model = _network(8)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = copy.deepcopy(model)(_views()[0])
    converted = sync_batchnorm.convert_sync_batchnorm(model, torch.device("cpu"))
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    assert sum(isinstance(m, sync_batchnorm.SyncBatchNorm) for m in converted.modules()) == 2
    assert torch.equal(converted(_views()[0]), expected)
    converted.eval()
    assert torch.isfinite(converted(_views()[0])).all()
