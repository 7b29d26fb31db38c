"""The cores of one rank, and the loader's workers on them."""

from __future__ import annotations

import pytest
import torch

from pretrain.common import machine
from pretrain.views.loader import default_workers


@pytest.mark.parametrize(
    ("cores", "local_ranks", "on_node", "share"),
    [
        (96, 8, None, 12),  # torchrun: 8 ranks on all 96 cores
        (96, 8, "96", 12),  # SLURM without binding: each sees what the job has
        (12, 8, "96", 12),  # SLURM with binding: 96 / 8 already
        (11, 8, "96", 11),  # ... and 8 cores of the node left idle
        (96, 1, "96", 96),
        (12, 8, None, 1),  # a container of 12 cores: 8 ranks share them
        (2, 8, None, 1),
        (4, 2, "8", 4),
        (4, None, "8", 4),
    ],
)
def test_a_rank_has_its_share_once(
    monkeypatch: pytest.MonkeyPatch, cores: int, local_ranks: int | None, on_node: str | None, share: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: cores)
    for name, value in (("LOCAL_WORLD_SIZE", local_ranks), ("SLURM_CPUS_ON_NODE", on_node)):
        monkeypatch.setenv(name, "1")
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WORLD_SIZE", "32")  # 4 nodes of 8: nothing to do with this node's cores
    assert machine.cores_of_rank() == share
    # one core is the training process's own; on a CPU the model takes all of them
    assert default_workers(torch.device("cuda")) == min(16, max(1, share - 1))
    assert default_workers(torch.device("cpu")) == 1
