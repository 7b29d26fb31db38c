"""How a step runs: what is chosen, and that compiled and captured steps are the eager one's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.settings import Settings
from pretrain.training_step import COMPILING_PAYS, how_to_step
from tests.helpers.training import CPU, tiny

GPU = torch.device("cuda")


def settings(**changes: object) -> Settings:
    return tiny(Path("d"), Path("o"), **changes)


@pytest.mark.parametrize(
    ("changes", "dtype", "steps", "how", "why"),
    [
        ({}, torch.bfloat16, COMPILING_PAYS - 1, "graph", "compiling pays from 5,000 on"),
        ({}, torch.bfloat16, COMPILING_PAYS, "compiled_graph", "compiling pays for 5,000 steps"),
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
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found, said = how_to_step(settings(**changes), GPU, dtype, steps)
    assert found == how and why in said


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert how_to_step(settings(), GPU, torch.bfloat16, 10**6)[0] == "graph"


def test_a_graph_is_refused_where_none_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert how_to_step(settings(), CPU, torch.float32, 10**6) == ("eager", "a graph needs a GPU")
    with pytest.raises(UserError, match="--step graph: a graph needs a GPU; take --step eager"):
        how_to_step(settings(step="graph"), CPU, torch.float32, 10)
    monkeypatch.setattr("pretrain.training_step.world_size", lambda: 2)
    assert how_to_step(settings(), GPU, torch.bfloat16, 10**6)[0] == "eager"
    with pytest.raises(UserError, match="2 ranks share each step"):
        how_to_step(settings(step="compiled_graph"), GPU, torch.bfloat16, 10)
