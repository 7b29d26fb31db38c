"""`python -m benchmarks [NAME ...]` enters; JSON files and Markdown tables leave, the tables printed too."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import BENCHMARKS
from benchmarks.harness import as_markdown, as_record
from pretrain.cli import UserError, run
from pretrain.files import write_json, write_text


def measure(argv: list[str]) -> int:
    """Run the named benchmarks (all by default); exit code 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: does it run at all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        raise UserError(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(BENCHMARKS)}")
    if options.threads < 1:
        raise UserError(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    missed = 0
    for name in options.names or BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        comparisons = module.measure(options.quick) if hasattr(module, "measure") else []
        tables = module.tables(options.quick) if hasattr(module, "tables") else []
        record = as_record(module.TITLE, comparisons, tables)
        write_json(options.output / f"{name}.json", record)
        write_text(options.output / f"{name}.md", as_markdown(record))
        print(as_markdown(record))
        missed += sum(not c.met for c in comparisons) + sum(t.missed for t in tables)
    return 1 if missed and not options.quick else 0


def main(argv: list[str] | None = None) -> int:
    return run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
