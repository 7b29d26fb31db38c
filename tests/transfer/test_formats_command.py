"""`formats`: the list, and a format as a file of one's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from transfer.__main__ import main
from transfer.checkpoints.formats import FORMATS
from transfer.checkpoints.user_format import read_user_format
from transfer.formats_command import told


def test_formats_are_listed_three_ways(capsys: pytest.CaptureFixture):
    assert main(["formats"]) == 0
    plain = capsys.readouterr().out
    assert main(["formats", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["formats", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["source"] for row in said["formats"]] == [f.name for f in FORMATS]
    for f in FORMATS:
        assert f.name.split(",")[0] in plain
        assert any(line.startswith(f"| {f.name} |") for line in lines)
    assert "BYOL (DeepMind)" in said["refused"]
    assert main(["formats", "--yaml"]) == 2


def test_a_format_is_shown_as_a_file_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["formats", "show", "dino"]) == 0  # the one of this name, not DINOv2
    assert capsys.readouterr().out == (
        "name: DINO\nonline:\n- container: student\n  prefix: backbone.\n"
        "ema:\n- container: teacher\n  prefix: backbone.\ndrop:\n  head.: projector\n"
        "note: 'DINO''s own evaluation uses the teacher: --branch ema'\n"
    )
    assert main(["formats", "show", "PyTorch"]) == 0
    assert "name: BYOL (PyTorch)\n" in capsys.readouterr().out
    beyond = {"families": (), "top": "", "many_heads": "", "positions": "bicubic antialias"}
    for f in FORMATS:
        file = tmp_path / "mine.yaml"
        file.write_text(told(f.name), encoding="utf-8")
        if f.online or f.ema:
            assert read_user_format(file) == dataclasses.replace(f, **beyond), f.name
    for words, said in ((["show", "MoCoo"], "did you mean"), (["DINO"], "wanted show NAME")):
        assert main(["formats", *words]) == 2
        assert said in capsys.readouterr().err
