"""`python -m pretrain.profile`: where a step's time goes on this machine, and what to change.

python -m pretrain.profile --recipe NAME|FILE.yaml --data-dir DIR [--steps 10 --seconds 120 ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pretrain.common.cli import parse_settings, run
from pretrain.common.errors import UserError
from pretrain.settings import GROUPS, RECIPES, Settings


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(Settings):
    """The run whose steps are timed, and how many of them."""

    output: str = ""
    """Not needed: nothing is written."""
    steps: int = 10
    """Steps to time, after some to warm up."""
    seconds: float = 120
    """No further change of an option is tried after so many seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, got {self.steps}")
        if self.seconds < 0:
            raise UserError(f"--seconds must be at least 0, got {self.seconds}")


def main(argv: list[str]) -> None:
    """Time some steps part by part, and print the table."""
    settings = parse_settings(
        ProfileSettings, argv, prog="python -m pretrain.profile", config_flag="--recipe", presets=RECIPES,
        groups=GROUPS | {"steps": "this measurement"},
        description="Say where the time of a training step goes on this machine, and what to change.",
    )  # fmt: skip
    # PyTorch takes seconds to load: --help is answered at once.
    from pretrain.profile.step_timing import report

    report(settings, settings.steps, settings.seconds)


if __name__ == "__main__":
    sys.exit(run(main))
