"""The working tree enters; a copy that later edits cannot reach, and a note of the environment, leave.

A job may wait for days. It runs the code as it was when it was submitted: OUT/code/<hash of the content>.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.common.machine import cores
from transfer.evaluation.provenance import PINNED, commit

SOURCE = Path(__file__).resolve().parents[2]
FOLDERS = ("pretrain", "transfer", "slurm", "detection_configs")
SKIPPED = {"__pycache__"}


def code_files() -> list[Path]:
    """The project's files that a job may use, relative to the project's root."""
    files = [p for name in FOLDERS for p in sorted((SOURCE / name).rglob("*")) if p.is_file()]
    return [p.relative_to(SOURCE) for p in files if not SKIPPED.intersection(p.parts)]


def pin(root: Path) -> Path:
    """Copy the code under `root`/code and return the copy's folder; the same content is copied once."""
    digest = hashlib.sha256()
    files = code_files()
    for path in files:
        digest.update(str(path).encode() + b"\0" + (SOURCE / path).read_bytes() + b"\0")
    folder = root.resolve() / "code" / digest.hexdigest()[:12]
    if folder.is_dir():
        return folder
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    for path in files:
        (aside / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOURCE / path, aside / path)
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
