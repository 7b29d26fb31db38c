"""`slurm logs`: the log of one step."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from slurm.commands.status import suite_folder
from slurm.state.step_files import Record, records


@dataclass(frozen=True, kw_only=True)
class Logs:
    """Settings of `python -m slurm logs`."""

    dir: str
    """The suite's output folder."""
    step: str = ""
    """A step's name as `status` shows it, or a part of it: linear."""
    lines: int = 40
    """Last lines to print of each file; 0 for all."""


def main(argv: list[str]) -> int | None:
    """Print the end of each rank's output and error, under the file's path."""
    asked = parse_settings(
        Logs, argv, prog="python -m slurm logs", positional=["dir", "step"],
        description="Print the end of a step's log, of each rank, and the traceback where it failed.",
    )  # fmt: skip
    root = suite_folder(asked.dir)
    names = [r.name for r in records(root)]
    if not asked.step:
        raise UserError(f"of which step? There are {', '.join(names) or 'none yet'}")
    found = [n for n in names if n == asked.step] or [n for n in names if n.startswith(asked.step)]
    if not found:
        near = difflib.get_close_matches(asked.step, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{asked.step}: no such step; steps: {', '.join(names)}{hint}")
    for name in found:
        record = Record(root, name)
        paths = [p for rank in range(record.state.get("ranks", 1)) for p in record.logs(rank) if p.exists()]
        if not paths:
            print(f"==> {name}: no log yet")
        for path in paths:
            print(f"==> {name}: {path}")
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-asked.lines :] if asked.lines else lines))
        if trace := record.failure.get("traceback"):
            print(f"==> {name}: failed on rank {record.failure['rank']}\n{trace}")
    return None
