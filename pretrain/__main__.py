"""`python -m pretrain`: the command line of pretraining."""

from __future__ import annotations

import sys

from pretrain.common.cli import run
from pretrain.settings import parse_recipe


def pretrain(argv: list[str]) -> None:
    """Parse, and train."""
    settings = parse_recipe(
        argv, description="Pretrain a timm ResNet with INTL. Run again with the same --output to go on."
    )
    # here, as PyTorch takes seconds to load: --help and a wrong option are answered at once
    from pretrain.common.process_group import process_group
    from pretrain.train import load_hook, train

    with process_group() as device:
        train(settings, device, hook=load_hook(settings.hook))


def main(argv: list[str] | None = None) -> int:
    """The console script's entry; returns the exit code."""
    return run(pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
