"""A snapshot of the project's code for queued jobs, and a record of the environment.

A job may wait for days. It runs the code as it was when it was submitted: OUT/code/<hash of the content>.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.common.errors import UserError
from pretrain.common.machine import cores
from transfer.evaluation.provenance import PINNED, commit

SOURCE = Path(__file__).resolve().parents[2]
FOLDERS = ("pretrain", "transfer", "slurm", "detection_configs")


def code_files(extras: Sequence[Path] = (), source: Path = SOURCE) -> list[Path]:
    """The project's files that a job may use, relative to its root.

    Those that git tracks, as they are now, or all that were installed where this is no checkout; and
    `extras`, files and folders of the project that the user named. Raises UserError for a link among them,
    and for an extra outside the project.
    """
    tracked = _git_files(source)
    found = set(_installed(source) if tracked is None else tracked)
    for extra in extras:
        path = Path(os.path.abspath(extra))
        if not path.is_relative_to(source) or not path.exists():
            raise UserError(f"--include {extra}: wanted a file or folder of the project, below {source}")
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        found |= {p.relative_to(source) for p in inside if p.is_symlink() or p.is_file()}
    files = sorted(p for p in found if "__pycache__" not in p.parts)
    for path in files:
        if any((source / part).is_symlink() for part in (path, *path.parents)):
            raise UserError(
                f"{source / path} is a link: jobs get a copy of the code, put the file itself there"
            )
    return [path for path in files if (source / path).is_file()]


def untracked(source: Path = SOURCE) -> list[str]:
    """Files of the project that a job will not have, because git does not know them."""
    return [str(p) for p in _git_files(source, "--others", "--exclude-standard") or ()]


def _git_files(source: Path, *options: str) -> list[Path] | None:
    """What `git ls-files` lists of the code; None where `source` is no checkout."""
    if not (source / ".git").exists():
        return None
    # A checkout of another user is read all the same: what it holds is about to be run.
    command = ["git", "-c", "safe.directory=*", "-C", str(source), "ls-files", "-z", *options, "--", *FOLDERS]
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=60, env=own)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise UserError(
            f"git does not say which files of {source} it tracks ({said.decode(errors='replace').strip()}), "
            "and jobs get a copy of those alone"
        ) from error
    return [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def _installed(source: Path) -> list[Path]:
    """Everything that an installation has put there: no hidden files."""
    files = [p for name in FOLDERS for p in (source / name).rglob("*") if p.is_symlink() or p.is_file()]
    paths = [p.relative_to(source) for p in files]
    return [p for p in paths if not any(part.startswith(".") for part in p.parts)]


def pin(root: Path, extras: Sequence[Path] = (), source: Path = SOURCE) -> Path:
    """Copy the code under `root`/code and return the copy's folder; the same content is copied once."""
    digest = hashlib.sha256()
    files = code_files(extras, source)
    for path in files:
        digest.update(str(path).encode() + b"\0" + (source / path).read_bytes() + b"\0")
    folder = root.resolve() / "code" / digest.hexdigest()[:12]
    if folder.is_dir():
        return folder
    for left in folder.parent.glob(".*.*"):  # by a submission that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    for path in files:
        copy = aside / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE((source / path).stat().st_mode) & 0o777
        handle = os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)  # never wider
        with os.fdopen(handle, "wb") as file:
            file.write((source / path).read_bytes())
        copy.chmod(mode)
    (aside / PINNED).write_text((commit() or "") + "\n")
    try:
        aside.rename(folder)
    except OSError:  # another submission made the same copy meanwhile
        shutil.rmtree(aside)
    return folder


def environment() -> dict[str, Any]:
    """Python, packages, machine, GPUs and commit, as plain values."""
    packages = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": cores(),
        "gpus": gpu_names(),
        "commit": commit(),
        "packages": dict(sorted(packages.items())),
    }


def gpu_names() -> list[str]:
    """What nvidia-smi lists; nothing where there is none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(" (UUID")[0] for line in done.stdout.splitlines() if line.startswith("GPU")]
