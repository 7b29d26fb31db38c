"""The driver of a suite on this machine, with steps of a second: tiny_suite.main([OUTPUT])."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from pretrain.common.cli import run
from slurm.commands.suite import _here
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import KINDS, Resources
from slurm.steps.suite import Suite


def graph(root: Path) -> Graph:
    """One step, another that needs it and trains for a second, and one that reports of both."""

    def step(
        name: str, what: str, *more: str, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()
    ) -> Step:
        return Step(
            name=name, kind="knn", command="tiny_steps", argv=(what, str(root / name), *more),
            output=root / name, depends_on=needs, after=after, makes=(root / name / "made",),
        )  # fmt: skip

    return Graph([
        step("first", "work"), step("long", "train", "10", needs=("first",)),
        step("last", "work", after=("first", "long")),
    ])  # fmt: skip


def main(argv: list[str]) -> int:
    """What `slurm suite` does once it has its graph."""
    root = Path(argv[0])
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where jobs find tiny_steps
    sys.stderr = open(root.with_name(f"{root.name}.log"), "a")  # noqa: SIM115
    logging.disable(logging.INFO)
    asked = Suite(output=str(root), weights=["none"], data_dir=".", tasks=["knn"])
    resources = {kind: Resources() for kind in KINDS}
    return run(lambda _: _here(asked, graph(root), root, resources, set()), [])
