"""`python -m transfer COMMAND ...`: calls the command's own module."""

from __future__ import annotations

import sys

from transfer.options import SETTINGS, parse
from transfer.program import Program

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


def _parse_early(command: str, argv: list[str]) -> None:
    """Parse as the command will: --help and a wrong option are answered before PyTorch is loaded."""
    if command in SETTINGS:
        parse(command, argv)


main = Program(
    name="transfer", description="Judge any self-supervised ResNet checkpoint.", commands=COMMANDS,
    before=_parse_early,
).main  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
