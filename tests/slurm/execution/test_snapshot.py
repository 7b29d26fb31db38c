"""What the copy of the code holds that queued jobs run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from slurm.execution.snapshot import SOURCE, code_files, pin, untracked


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two tracked files, changed since, and what a user leaves lying about."""
    root = tmp_path / "checkout"
    for name, text in (
        ("transfer/a.py", "a"), ("pretrain/run.sh", "b"), ("transfer/.env", "TOKEN=1"),
        ("transfer/key.pem", "secret"), ("transfer/own.py", "c"), ("slurm/__pycache__/x.pyc", "d"),
        ("docs/x.md", "e"), (".gitignore", "*.pem\n*.pyc\n"),
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "pretrain/run.sh").chmod(0o750)
    for words in (["init", "-q"], ["add", "transfer/a.py", "pretrain/run.sh", "docs"]):
        subprocess.run(["git", "-C", root, *words], check=True, capture_output=True)
    (root / "transfer/a.py").write_text("changed")
    (root / "transfer/a.py").chmod(0o600)
    return root


def test_tracked_files_and_named_extras_alone_with_their_modes(checkout: Path, tmp_path: Path) -> None:
    copy = pin(tmp_path / "out", source=checkout)
    files = {str(p.relative_to(copy)): p for p in copy.rglob("*") if p.is_file()}
    assert set(files) == {"transfer/a.py", "pretrain/run.sh", "COMMIT"}
    assert files["transfer/a.py"].read_text() == "changed"
    modes = [files[n].stat().st_mode & 0o777 for n in ("transfer/a.py", "pretrain/run.sh")]
    assert modes == [0o600, 0o750]
    assert untracked(checkout) == ["transfer/.env", "transfer/own.py"]
    more = pin(tmp_path / "out", [checkout / "transfer/own.py"], checkout)
    assert (more / "transfer/own.py").read_text() == "c" and not (more / "transfer/.env").exists()
    assert more != copy and pin(tmp_path / "out", source=checkout) == copy
    assert len(list((tmp_path / "out" / "code").iterdir())) == 2
    (checkout / "pretrain/run.sh").unlink()  # deleted, and git has not been told
    assert code_files(source=checkout) == [Path("transfer/a.py")]


def test_links_and_foreign_extras_are_refused(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted a file or folder of the project"):
        code_files([tmp_path / "out"], checkout)
    (checkout / "transfer/b.py").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"transfer/b[.]py is a link"):
        code_files([checkout / "transfer"], checkout)
    subprocess.run(["git", "-C", checkout, "add", "transfer/b.py"], check=True)
    with pytest.raises(UserError, match="is a link"):
        pin(tmp_path / "out", source=checkout)
    assert not (tmp_path / "out").exists()


def test_an_installation_without_git_has_all_but_hidden_files(checkout: Path) -> None:
    (checkout / ".git").rename(checkout / "git")
    names = {str(p) for p in code_files(source=checkout)}
    assert names == {"transfer/a.py", "transfer/own.py", "transfer/key.pem", "pretrain/run.sh"}
    assert untracked(checkout) == []


def test_a_broken_checkout_is_one_clear_line(checkout: Path) -> None:
    (checkout / ".git" / "index").write_bytes(b"damaged")
    with pytest.raises(UserError, match="git does not say which files"):
        code_files(source=checkout)


def test_this_project_is_whole_in_its_copy() -> None:
    names = {str(p) for p in code_files()}
    assert {"slurm/execution/job.py", "transfer/protocols/solo_knn@1.yaml", "pretrain/__main__.py"} <= names
    assert all((SOURCE / name).is_file() for name in names)
