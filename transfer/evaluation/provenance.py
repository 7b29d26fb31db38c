"""Where figures come from: the commit of this project's code, the name and epoch of a checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transfer.options.weights import RAW_PIXELS

ROOT = Path(__file__).resolve().parents[2]
PINNED = "COMMIT"
"""File of a copy of the code that was pinned for a job: the commit it was copied from."""
GENERIC = ("backbone", "checkpoint")
"""How names of files begin that say nothing of what is in them."""
SUFFIX = re.compile(
    r"(?<=[^/.])(\.(pth|pt|ckpt|pkl))?\.(pth|pt|ckpt|pkl|tar|safetensors|bin|npz|gz|zip)$", re.IGNORECASE
)


@cache
def commit() -> str | None:
    """The commit of this project's checkout or pinned copy, with "+changes" where files differ from it; None
    elsewhere."""
    pinned = ROOT / PINNED
    if pinned.is_file():
        return pinned.read_text(encoding="utf-8").strip() or None
    try:
        if not _git("ls-files", "--error-unmatch", str(Path(__file__).relative_to(ROOT))):
            return None
        changes = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def weights_name(path: str) -> str:
    """A short name for weights without a label: the file's, without suffix, after its folder's where many
    files have that name."""
    if path in ("", RAW_PIXELS):
        return path.replace("-", " ") or "random initialisation"
    if path.startswith("zoo:"):
        return path.removeprefix("zoo:")
    folder, name = Path(path).parent.name, Path(_without_suffix(path)).name
    return f"{folder}/{name}" if folder and name.startswith(GENERIC) else name


def file_labels(paths: Sequence[str]) -> dict[str, str]:
    """The labels of weights without one: `weights_name`, with as much of the folder as tells files apart."""
    paths = [*dict.fromkeys(paths)]
    alike: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        alike[weights_name(path)].append(path)
    found: dict[str, str] = {}
    for name, places in alike.items():
        stems = [_without_suffix(path) for path in places]
        names = short_names(stems if len(set(stems)) == len(stems) else places)
        found |= dict(zip(places, [name] if len(places) == 1 else names))
    return found if len(set(found.values())) == len(found) else dict(zip(paths, short_names(paths)))


def short_names(paths: list[str]) -> list[str]:
    """The fewest last parts of each path that tell all of them apart."""
    parts = [p.strip("/").split("/") for p in paths]
    longest = max((len(p) for p in parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(i + 1) for i in range(len(paths))]


def _without_suffix(path: str) -> str:
    """model of model.pth and model.pth.tar, run.100ep of run.100ep.pth and run.100ep."""
    return SUFFIX.sub("", path)


def kept_epoch(path: str) -> int | None:
    """The epoch of a checkpoint that pretraining kept: 100 of checkpoint_epoch100.pt; None of others."""
    match = re.fullmatch(r"checkpoint_epoch(\d{1,9})\.pt", Path(path).name)
    return int(match[1]) if match else None


def _git(*words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    # Without optional locks: git may be killed with us, and would leave the checkout locked.
    return subprocess.run(
        ["git", "--no-optional-locks", "-C", str(ROOT), *words],
        capture_output=True, text=True, check=True, timeout=20, env=environment,
    ).stdout.strip()  # fmt: skip
