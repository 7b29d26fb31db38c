"""Locate or download Fashion-MNIST's four files.

Xiao et al., 2017, https://github.com/zalandoresearch/fashion-mnist (MIT licence).
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pretrain.common.errors import UserError
from pretrain.data.cache import cache_dir

logger = logging.getLogger(__name__)

FILES = tuple(f"{s}-{k}-ubyte.gz" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1"))
DEBIAN_PACKAGE = "dataset-fashion-mnist"


def _places() -> Iterator[Path]:
    yield cache_dir() / "fashion-mnist"
    yield Path("/usr/share/datasets/fashion-mnist")


def find_or_fetch() -> Path:
    """The folder holding the four idx .gz files; fetched once, from Debian's package or torchvision's source.

    Raises UserError saying what was tried and what to do.
    """
    for place in _places():
        if all((place / f).is_file() for f in FILES):
            return place
    target = next(_places())
    target.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for fetch in (_from_debian, _from_torchvision):
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fashion-mnist-") as aside:
            try:
                found = fetch(Path(aside))
                ready = Path(aside) / "ready"
                ready.mkdir()
                for file in FILES:
                    shutil.copyfile(found / file, ready / file)
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                problems.append(f"{fetch.__name__.removeprefix('_from_')}: {_reason(error)}")
                continue
            if not target.exists():
                ready.rename(target)  # at once: a kill leaves no half folder
            return target
    raise UserError(
        f"Fashion-MNIST is not on this machine and could not be fetched ({'; '.join(problems)}). Install the "
        f"Debian package {DEBIAN_PACKAGE}, or put {', '.join(FILES)} into {target}"
    )


def _reason(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    lines = (output or str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _from_debian(aside: Path) -> Path:
    """Download and unpack the package under `aside`, with apt's own signatures checked; needs no root."""
    logger.info("fetching Debian's %s", DEBIAN_PACKAGE)
    if _apt(aside, "download", DEBIAN_PACKAGE, check=False).returncode != 0:
        # The package lists may be missing or old: read them into a state folder of our own.
        for folder in ("lists/partial", "cache/archives/partial"):
            (aside / folder).mkdir(parents=True, exist_ok=True)
        own = ("-o", f"Dir::State::Lists={aside}/lists", "-o", f"Dir::Cache={aside}/cache")
        _apt(aside, *own, "update")
        _apt(aside, *own, "download", DEBIAN_PACKAGE)
    package = next(aside.glob(f"{DEBIAN_PACKAGE}*.deb"))
    subprocess.run(
        ["dpkg-deb", "-x", str(package), str(aside / "unpacked")], check=True, capture_output=True, text=True
    )
    return next((aside / "unpacked").rglob(FILES[0])).parent


def _apt(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # As root apt would drop to the user _apt, who cannot write here.
    return subprocess.run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *arguments],
        cwd=folder, check=check, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def _from_torchvision(aside: Path) -> Path:
    """torchvision's download, with its checksums."""
    logger.info("downloading Fashion-MNIST through torchvision")
    from torchvision.datasets import FashionMNIST

    return Path(FashionMNIST(str(aside), download=True).raw_folder)
