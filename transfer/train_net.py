"""Fine-tune a detector in detectron2, or evaluate one; append its results to results.jsonl.

`python -m transfer train-net`, also `python -m transfer.train_net`, follows detectron2's own conventions
(--config-file, --num-gpus, --eval-only, --resume, trailing KEY VALUE). It goes on by itself where it
stopped: model, optimizer, schedule, gradient scaler and iteration are in the checkpoint, and data order,
augmentation and sampling follow from (SEED, iteration). A run on CPUs cut off at any moment therefore ends
with the numbers of an undisturbed one, to the bit while the number of processes and threads stays the same.
On GPUs detectron2's kernels add in no fixed order: there the same data is seen, and the numbers agree up to
rounding.
"""

from __future__ import annotations

import argparse
import importlib.util

from pretrain.common.cli import Parser, run
from pretrain.common.errors import UserError
from transfer.conversion.availability import need_detectron2


def parser() -> argparse.ArgumentParser:
    """detectron2's command line, and this project's additions."""
    p = Parser(
        prog="python -m transfer train-net",
        description="Fine-tune and evaluate a detector or a semantic segmentation in detectron2. Run again, "
        "it goes on.",
    )
    p.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE",
                   help="Any key of detectron2's config, after the options.")  # fmt: skip
    p.add_argument("--config-file", required=True, metavar="NAME|FILE",
                   help="A name in detection_configs/, or a YAML file.")  # fmt: skip
    p.add_argument("--num-gpus", type=int, default=1, metavar="N",
                   help="GPUs of this machine; 0: the CPU. (default: 1)")  # fmt: skip
    p.add_argument("--num-machines", type=int, default=1, metavar="N",
                   help="Machines taking part. (default: 1)")  # fmt: skip
    p.add_argument("--machine-rank", type=int, default=0, metavar="N",
                   help="Number of this machine. (default: 0)")  # fmt: skip
    p.add_argument("--dist-url", default="auto", metavar="URL",
                   help="tcp://HOST:PORT of machine 0, for several machines.")  # fmt: skip
    p.add_argument("--eval-only", action="store_true", help="Evaluate MODEL.WEIGHTS, train nothing.")
    p.add_argument("--resume", action="store_true",
                   help="Go on from OUTPUT_DIR's checkpoint even if the settings have changed; with "
                   "--eval-only: evaluate it.")  # fmt: skip
    p.add_argument("--random-init", action="store_true", help="Start from random weights, on purpose.")
    p.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES",
                   help="A COCO-format folder under a name of yours: NAME=ANNOTATIONS.json:IMAGES; may be "
                   "given several times.")  # fmt: skip
    p.add_argument("--sem-seg", action="append", default=[], metavar="NAME=IMAGES:MASKS",
                   help="Two folders of files with the same names, images and masks (PNGs of class numbers), "
                   "under a name of yours; may be given several times.")  # fmt: skip
    p.add_argument("--seeds", type=int, default=None, metavar="N",
                   help="N trials one after the other, of SEED, SEED + 1 ..., in OUTPUT_DIR/seed0 ...; "
                   "published figures of VOC are means of 5.")  # fmt: skip
    p.add_argument("--keep-checkpoints", type=int, default=1, metavar="N",
                   help="Keep the N newest checkpoints, a file each. (default: 1, replaced)")  # fmt: skip
    p.add_argument("--wandb", default=None, metavar="PROJECT",
                   help="Log to this project of Weights & Biases too.")  # fmt: skip
    p.add_argument("--label", default=None, help="Name of this row in reports.")
    p.add_argument("--show", default=None, metavar="DIR", help="Only draw predictions into DIR.")
    p.add_argument("--force", nargs="?", const="true", default="false", choices=("true", "false"),
                   metavar="true|false", help="Run again when finished.")  # fmt: skip
    return p


def main(argv: list[str]) -> int | None:
    """Parse, and hand over to what needs detectron2. Raises UserError where there is none."""
    args = parser().parse_args(argv)
    if args.show and (args.eval_only or args.resume):
        raise UserError("--show DIR only draws predictions into DIR: leave out --eval-only and --resume")
    for name, count in (("--seeds", args.seeds), ("--keep-checkpoints", args.keep_checkpoints)):
        if count is not None and count < 1:
            raise UserError(f"{name} {count}: wanted 1 or more")
    if args.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the wandb package: pip install 'intl-bench[wandb]'")
    need_detectron2()
    from transfer.detection.run import start

    return start(args)


if __name__ == "__main__":
    import sys

    sys.exit(run(main))
