"""--help of every command, and words without an option, as a user meets them."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pretrain.common.cli import parse_settings
from pretrain.common.errors import UserError
from slurm.__main__ import COMMANDS as SLURM
from transfer.__main__ import COMMANDS as TRANSFER

COMMANDS = [
    ["pretrain"], ["pretrain.profile"], ["benchmarks"],
    ["transfer"], *(["transfer", name] for name in TRANSFER),
    ["slurm"], *(["slurm", name] for name in SLURM),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Every kind of option that the commands have."""

    dirs: list[str]
    """Folders to search."""
    kind: Literal["small", "large"]
    """Which of the two."""
    data_dir: Path | None = None
    """Folder of the data set; default: none."""
    view_sizes: list[int] = field(default_factory=lambda: [224, 96])
    """Side in px, at most 5 % apart."""
    seed: int = 0
    """Of the order."""
    lr: float | None = None
    """Learning rate."""
    force: bool = False
    """Do it again."""
    verify: bool = True
    """Prove it."""


def typical(*argv: str) -> Typical:
    return parse_settings(
        Typical, argv, prog="python -m typical", positional=["dirs"],
        description="Do what is\nusual.\n\na ─▶ b\n└──▶ c",
    )  # fmt: skip


def test_help_is_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices or a unit, one sentence, the default: no types, and a drawing that stays one."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        typical("--help")
    assert (
        capsys.readouterr().out
        == """\
usage: python -m typical DIR ... --kind {small,large} [options]

Do what is usual.

a ─▶ b
└──▶ c

required:
  DIR ...                Folders to search.
  --kind {small,large}   Which of the two.

options:
  --data-dir DIR         Folder of the data set; default: none.
  --view-sizes [PX,...]  Side in px, at most 5 % apart. (default: [224, 96])
  --seed N               Of the order. (default: 0)
  --lr X                 Learning rate.
  --force                Do it again.
  --verify, --no-verify  Prove it.

general:
  --config FILE          YAML file with any of these options.
  --print-config         Print the settings as YAML and stop.
  -h, --help             Print this text.

exit codes: 0 done; 1 failed; 2 wrong input, nothing started; 75 stopped by
SIGTERM or SIGUSR2 with everything saved, run it again to go on; 130
interrupted
"""
    )


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_fits_the_terminal(
    command: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    module = importlib.import_module(command[0])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command[0]}.__main__")
    with contextlib.suppress(SystemExit):
        module.main([*command[1:], "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m {' '.join(command)}")
    assert "exit codes: 0 done" in text
    assert max(map(len, text.splitlines())) <= columns
    for noise in ("Union[", "Optional[", "Literal[", "type:", "<class '", "null)", "ENV", "_MISSING"):
        assert noise not in text


def test_words_without_an_option_may_stand_anywhere() -> None:
    for words in (
        ["a", "b", "--kind", "small", "--force"],
        ["--force", "a", "--kind", "small", "b"],
        ["--force", "true", "a", "b", "--kind=small"],
        ["--kind", "small", "--force", "--dirs", '["a", "b"]'],
        ["--no-verify", "--verify", "--lr", "-1", "--lr=null", "--force=true", "--kind", "small", "a", "b"],
    ):
        assert typical(*words) == Typical(dirs=["a", "b"], kind="small", force=True), words
    assert not typical("a", "--kind", "small", "--no-verify").verify
    with pytest.raises(UserError, match="unrecognized arguments: --knid small; did you mean --kind"):
        typical("a", "--knid", "small")
    with pytest.raises(UserError, match="required: --kind "):
        typical("a")
