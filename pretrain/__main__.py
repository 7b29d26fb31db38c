"""`python -m pretrain`: the command line of pretraining."""

from __future__ import annotations

import sys

from pretrain.cli import run


def main(argv: list[str] | None = None) -> int:
    """The console script's entry; returns the exit code."""
    from pretrain import train

    return run(train.main, argv)


if __name__ == "__main__":
    sys.exit(main())
