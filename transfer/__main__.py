"""`python -m transfer COMMAND ...`: calls the command's own module."""

from __future__ import annotations

import sys

from transfer.options.commands import SETTINGS, parse
from transfer.program import Program

COMMANDS = {
    "inspect": ("transfer.checkpoints.inspect", "what a checkpoint holds, and whether its backbone loads"),
    "formats": ("transfer.formats_command", "list the checkpoint formats that can be read"),
    "zoo": ("transfer.zoo.listing", "list the published checkpoints that --weights zoo:NAME fetches"),
    "protocols": ("transfer.protocols_command", "list the evaluation protocols, explain one, check your own"),
    "knn": ("transfer.evaluators.knn", "classify by nearest neighbours in feature space"),
    "linear": ("transfer.evaluators.linear", "train linear heads on the frozen backbone"),
    "semisup": ("transfer.evaluators.semisup", "fine-tune with 1 %, 10 % or all of the labels"),
    "reproduce": ("transfer.reproduce", "evaluate a published checkpoint, and compare with its figures"),
    "convert": ("transfer.conversion.convert", "convert a checkpoint to detectron2 weights, with proof"),
    "train-net": ("transfer.train_net", "fine-tune a detector in detectron2, or evaluate one"),
    "plan": ("transfer.detection.schedule", "scale a detection schedule to your GPUs, estimate its cost"),
    "export": ("transfer.export", "write the backbone as files of another library"),
    "report": ("transfer.report.command", "tables and plots of all results, beside published numbers"),
    "leaderboard": ("transfer.report.leaderboard", "rank many people's results, like with like alone"),
    "scenes": ("transfer.detection.scenes", "compose a small detection data set from labelled images"),
    "spectrum": ("transfer.spectrum.diagnosis", "what the spectrum of features says, without labels"),
    "spectrum-study": ("transfer.spectrum.study", "which transformations g(λ) avoid collapse"),
}


def _parse_early(command: str, argv: list[str]) -> None:
    """Parse as the command will: --help and a wrong option are answered before PyTorch is loaded."""
    if command in SETTINGS:
        parse(command, argv)


main = Program(
    name="transfer", description="Evaluate any self-supervised checkpoint.", commands=COMMANDS,
    before=_parse_early,
).main  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
