"""Schedules and optimizers: figures worked out by hand, and a reference of torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pretrain.optim import Stepper, build_optimizer, parameter_groups
from pretrain.schedules import lr_at


def test_learning_rate_by_hand() -> None:
    at = lambda step: lr_at(step, base=2.0, warmup=4, total=14, final_ratio=0.1)  # noqa: E731
    assert [at(s) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]  # (step + 1) / 4 of 2
    # After it, step s has q = (1 + cos(pi (s - 3) / 10)) / 2 and the rate 2 q + 0.2 (1 - q).
    assert at(8) == pytest.approx(2 * 0.5 + 0.2 * 0.5)  # half-way: q = 1/2
    assert at(13) == pytest.approx(0.2)  # the last step: q = 0
    assert all(at(s) > at(s + 1) for s in range(3, 13))


def test_no_warm_up_and_all_warm_up() -> None:
    assert lr_at(0, base=1.0, warmup=0, total=1, final_ratio=0.001) == pytest.approx(0.001)
    assert lr_at(2, base=1.0, warmup=3, total=3) == 1.0


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, bias=False)
    )


def test_only_matrices_decay_unless_asked() -> None:
    weights, others = parameter_groups(_model(), weight_decay=0.1)
    assert [p.ndim for p in weights["params"]] == [2, 2] and weights["weight_decay"] == 0.1
    assert [p.ndim for p in others["params"]] == [1, 1, 1] and others["weight_decay"] == 0
    assert parameter_groups(_model(), weight_decay=0.1, decay_1d=True)[1]["weight_decay"] == 0.1


def test_sgd_equals_torchs_plain_loop() -> None:
    ours, theirs = _model(), _model()
    a = build_optimizer(ours, momentum=0.9, weight_decay=0.01)
    groups = parameter_groups(theirs, weight_decay=0.01)
    b = torch.optim.SGD(groups, lr=0.0, momentum=0.9, foreach=False)
    x = torch.randn(8, 3)
    for _ in range(3):
        for model, optimizer in ((ours, a), (theirs, b)):
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.fixture
def memory_as_found_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_first_step_that_float16_skips_leaves_no_momentum(memory_as_found_is_nan: None) -> None:
    """Beside torch's plain loop, which makes its momentum at the first step that it takes."""
    ours, theirs = _model(), _model()
    a = Stepper(build_optimizer(ours, momentum=0.9, weight_decay=0.0), torch.device("cpu"), torch.float16)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, foreach=False)
    x = torch.randn(8, 3)
    for factor in (torch.inf, 1.0, 1.0):
        a.backward(ours(x).square().sum() * factor)
        a.update(0.1)
        if factor == 1:
            b.zero_grad()
            theirs(x).square().sum().backward()
            b.step()
        else:
            theirs(x)  # BatchNorm's statistics
    for p, q in zip(ours.state_dict().values(), theirs.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
