"""`python -m transfer COMMAND ...`: calls the command's own module."""

from __future__ import annotations

import difflib
import importlib
import sys

from pretrain.common.cli import run
from pretrain.common.errors import UserError
from pretrain.common.help_formatter import EXIT_CODES, wrapped
from transfer.options import SETTINGS, parse

# command: (module with `main(argv)`, one line of help). Modules are imported only when they are called.
COMMANDS = {
    "inspect": ("transfer.checkpoints.inspect", "say what a checkpoint holds and whether its backbone loads"),
    "formats": ("transfer.checkpoints.formats", "list the checkpoint formats that can be read"),
    "protocols": ("transfer.evaluation.protocol", "list the evaluation protocols"),
    "knn": ("transfer.evaluators.knn", "classify by nearest neighbours in feature space"),
    "linear": ("transfer.evaluators.linear", "train linear heads on the frozen backbone"),
    "semisup": ("transfer.evaluators.semisup", "fine-tune with 1 %, 10 % or all of the labels"),
    "convert": ("transfer.conversion.convert", "turn a checkpoint into detectron2 weights, proved equal"),
    "train-net": ("transfer.train_net", "fine-tune a detector in detectron2, or evaluate one"),
    "plan": ("transfer.detection.schedule", "say what a detection run will cost before it starts"),
    "export": ("transfer.export", "write the backbone as another library's files, loaded there"),
    "report": ("transfer.report.command", "tables and plots of all results, beside published numbers"),
    "scenes": ("transfer.detection.scenes", "compose a small detection data set from labelled images"),
    "spectrum-study": ("transfer.spectrum.study", "which g(λ) avoid collapse: train, judge, draw"),
}


def usage() -> str:
    """The commands with one line of help each."""
    lines = [f"  {name:14s}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([
        "usage: python -m transfer COMMAND [options]", "",
        "Judge any self-supervised ResNet checkpoint. COMMAND --help lists its options.", "",
        "commands:", *lines, "",
        wrapped(EXIT_CODES),
    ])  # fmt: skip


def dispatch(argv: list[str]) -> int | None:
    """Run the command named by the first word."""
    if not argv:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{name!r} is no command of transfer: {', '.join(COMMANDS)}{hint}")
    module, _ = COMMANDS[name]
    if name in SETTINGS:
        parse(name, rest)  # as main will: --help and a wrong option are answered before PyTorch is loaded
    return importlib.import_module(module).main(rest)


def main(argv: list[str] | None = None) -> int:
    """The console script: exit code 0, 1, 2, 75 or 130."""
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
