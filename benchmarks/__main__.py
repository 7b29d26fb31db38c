"""`python -m benchmarks [NAME ...]`: JSON files and Markdown tables, printed too."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks import BENCHMARKS
from pretrain.common.cli import Parser, run
from pretrain.common.errors import UserError
from pretrain.common.files import write_json, write_text

SUMMARY = "summary.md"


def measure(argv: list[str]) -> int:
    """Run the named benchmarks (all by default); exit code 1 when a target is missed."""
    parser = Parser(
        prog="python -m benchmarks",
        description="Measure speed and memory beside plain references; exit code 1 when a target is missed.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(BENCHMARKS)}; default: all.")
    parser.add_argument("--quick", action="store_true", help="Small sizes, few repeats: does it run at all?")
    parser.add_argument("--threads", type=int, metavar="N", help="Of PyTorch; default: its own number.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR",
                        help="Folder for a JSON file and a Markdown table of each; default: results, "
                        "beside the benchmarks.")  # fmt: skip
    options = parser.parse_args(argv)
    import torch  # here, as it takes seconds to load and --help does not need it

    from benchmarks.harness import as_markdown, as_record, as_summary

    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        raise UserError(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(BENCHMARKS)}")
    if options.threads is not None:
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
    files = {name: options.output / f"{name}.json" for name in BENCHMARKS}
    records = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    write_text(options.output / SUMMARY, as_summary(records))
    print(as_summary(records))
    return 1 if missed and not options.quick else 0


def main(argv: list[str] | None = None) -> int:
    return run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
