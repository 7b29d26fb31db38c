"""Asking a checkout for its commit changes nothing in it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from transfer.evaluation import provenance


def test_a_checkout_is_not_locked_by_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain `git status` writes the index anew, under a lock that outlives git where it is killed."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "file").write_text("text")
    git("init", "-q")
    git("add", "file")
    index = tmp_path / ".git" / "index"
    written = [index.read_bytes()]
    os.utime(tmp_path / "file", (10**9, 10**9))  # the file is as it was, but for its time
    assert provenance._git("status", "--porcelain", "--untracked-files=no") == "A  file"
    written.append(index.read_bytes())
    git("status", "--porcelain", "--untracked-files=no")
    written.append(index.read_bytes())
    assert written[0] == written[1] != written[2]
