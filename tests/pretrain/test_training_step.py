"""How a step runs: what is chosen, and that a compiled step is the eager one's (test_gpu has graphs)."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.learner import Learner
from pretrain.loss import loss_of
from pretrain.settings import Settings
from pretrain.training_step import COMPILING_PAYS, TrainingStep, how_to_step, still_possible
from tests.helpers.training import CPU, tiny

GPU = torch.device("cuda")


def settings(**changes: object) -> Settings:
    return tiny(Path("d"), Path("o"), **changes)


@pytest.mark.parametrize(
    ("changes", "dtype", "steps", "how", "why"),
    [
        ({}, torch.bfloat16, COMPILING_PAYS - 1, "graph", f"compiling pays from {COMPILING_PAYS:,} on"),
        (
            {},
            torch.bfloat16,
            COMPILING_PAYS,
            "compiled_graph",
            f"compiling pays for {COMPILING_PAYS:,} steps",
        ),
        ({"deterministic": True}, torch.float32, 10**6, "graph", "--deterministic rules out"),
        ({}, torch.float16, 10**6, "eager", "float16 scales its gradients"),
        ({"objective": "sigreg"}, torch.bfloat16, 10**6, "eager", "SIGReg's loss cannot be captured"),
        ({"power": 0.5}, torch.bfloat16, 10**6, "eager", "cannot be captured"),
        ({"objective": "vicreg"}, torch.bfloat16, 10, "graph", "10 steps"),
        ({"step": "compiled"}, torch.float16, 10, "compiled", "as asked for"),
    ],
)
def test_auto_takes_what_the_run_gains_by(
    changes: dict, dtype: torch.dtype, steps: int, how: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.training_step._lacking_to_compile", lambda _: None)
    found, said = how_to_step(settings(**changes), GPU, dtype, steps)
    assert found == how and why in said


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lacking() -> str:
        how, why = how_to_step(settings(), GPU, torch.bfloat16, 10**6)
        assert how == "graph"
        with pytest.raises(UserError, match="--step compiled: compiling"):
            how_to_step(settings(step="compiled"), GPU, torch.bfloat16, 10)
        return why

    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "needs a C compiler" in lacking()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert "needs Python.h" in lacking()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "needs Triton" in lacking()


def test_a_step_that_cannot_be_taken_here_is_chosen_anew_unless_asked_for() -> None:
    begun = settings(step="graph", data_on="device")  # on a GPU
    assert still_possible(begun, settings(), CPU, torch.float32, 10).step == "eager"
    with pytest.raises(UserError, match="a graph needs a GPU"):
        still_possible(begun, begun, CPU, torch.float32, 10)


def test_a_compiled_step_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As traced, without the minutes of a C++ compiler: its kernels are PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    of = settings(ema=True, view_sizes=[16, 16])
    g = torch.Generator().manual_seed(0)
    views = [torch.rand(20, 3, 16, 16, generator=g) for _ in range(2)]
    found = []
    for how in ("eager", "compiled"):
        learner = Learner.build(of, CPU, torch.float32)
        take = TrainingStep(learner, lambda batch: batch, loss_of(of), how)
        loss = take(views, 0, 0.1, 0.9).loss.total
        found.append([loss, *learner.encoder.state_dict().values(), *learner.encoder.parameters()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_a_graph_is_refused_where_none_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert how_to_step(settings(), CPU, torch.float32, 10**6) == ("eager", "a graph needs a GPU")
    with pytest.raises(UserError, match="--step graph: a graph needs a GPU; take --step eager"):
        how_to_step(settings(step="graph"), CPU, torch.float32, 10)
    monkeypatch.setattr("pretrain.training_step.world_size", lambda: 2)
    assert how_to_step(settings(), GPU, torch.bfloat16, 10**6)[0] == "eager"
    with pytest.raises(UserError, match="2 ranks share each step"):
        how_to_step(settings(step="compiled_graph"), GPU, torch.bfloat16, 10)
