"""The suite's folder enters; the report of all that ended leaves, with a list of what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.cli import UserError, parse_settings
from pretrain.files import write_json
from slurm.look import look
from slurm.record import records

REPORTED = ("knn", "linear", "semisup", "detection")


@dataclass(frozen=True, kw_only=True)
class Gather:
    """The last step of a suite."""

    root: str
    """The suite's output folder."""
    output: str
    """Folder for the report."""


def missing(root: Path) -> list[dict[str, str]]:
    """The steps that have no result, with the reason where there is one."""
    told = []
    for record in records(root):
        if record.name == "report" or record.done:
            continue
        view = look(record, None)
        told.append({"step": record.name, "state": view.state, "why": view.detail})
    return told


def main(argv: list[str]) -> int | None:
    """Write `output`/index.html and `output`/missing.json."""
    from transfer.report import main as write_report

    asked = parse_settings(Gather, argv, prog="python -m slurm.gather", description=__doc__ or "")
    root, output = Path(asked.root), Path(asked.output)
    gaps = missing(root)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "missing.json", gaps)
    if not any(any((root / name).rglob("results.jsonl")) for name in REPORTED):
        raise UserError(f"no step in {root} left a result to report")
    write_report([str(root), "--output", str(output)])
    for gap in gaps:
        print(f"missing: {gap['step']} ({gap['state']}) {gap['why']}")
    return None
