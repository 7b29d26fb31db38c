"""`python -m pretrain`: the command line of pretraining."""

from __future__ import annotations

import sys
from pathlib import Path

from pretrain.common.cli import run
from pretrain.common.output_folder import output_folder, read_config, settings_in
from pretrain.settings import Settings, parse_recipe

WRITES = (
    "config.yaml", "metrics.jsonl", "progress.json", "checkpoint*.pt", "backbone*.safetensors", "tensorboard",
    "wandb_id",
)  # fmt: skip


def pretrain(argv: list[str]) -> None:
    """Parse, and train."""
    settings = parse_recipe(
        argv, description="Pretrain a timm ResNet with INTL. Run again with the same --output to go on."
    )
    with output_folder(settings.output, "pretrain", writes=WRITES, earlier=_wrote):
        # here, as PyTorch takes seconds to load: --help and a wrong option are answered at once
        from pretrain.common.process_group import process_group
        from pretrain.train import load_hook, train

        with process_group() as device:
            train(settings, device, hook=load_hook(settings.hook))


def _wrote(folder: Path) -> bool:
    """Whether a run without a marker wrote the folder: its settings or its checkpoint is there."""
    if settings_in(Settings)(folder):
        return True
    from pretrain.checkpoint import is_checkpoint

    return is_checkpoint(folder / "checkpoint.pt") and not read_config(folder)


def main(argv: list[str] | None = None) -> int:
    """The console script's entry; returns the exit code."""
    return run(pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
