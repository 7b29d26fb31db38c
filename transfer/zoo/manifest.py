"""The zoo's entries: zoo.yaml, which comes with the project, and a manifest of the user's own."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from pretrain.common.errors import UserError
from pretrain.common.files import read_yaml
from transfer.options.weights import WeightsOptions
from transfer.zoo.figures import Published, load_published, read_figure, source_of

FILE = Path(__file__).parent / "zoo.yaml"
PREFIX = "zoo:"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
LONGEST_URL = 2000
SCHEMES = ("https://", "http://", "file:///")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One published checkpoint."""

    name: str
    url: str
    source: str
    """The page that links to the file."""
    arch: str = ""
    """timm's name; empty where it has none of its own."""
    format: str = ""
    """What the file should be read as; empty where nobody has said."""
    branch: Literal["online", "ema"] = "online"
    """The one that its own evaluation uses."""
    epochs: int | None = None
    sha256: str = ""
    """Hexadecimal digest of the file, or how it begins; empty where unknown."""
    md5: str = ""
    """The same, where the source states this one."""
    note: str = ""
    figures: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError naming what is wrong."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{short(self.name)}: wanted a name of letters, digits and ._-")
        if not self.url.startswith(SCHEMES):
            raise ValueError(f"{self.name}: url {short(self.url)}: wanted {', '.join(SCHEMES)}...")
        if why := _no_url(self.url):
            raise ValueError(f"{self.name}: url {short(self.url)}: {why}")
        if self.branch not in ("online", "ema"):
            raise ValueError(f"{self.name}: branch {short(self.branch)}: wanted online or ema")
        if self.epochs is not None and not (type(self.epochs) is int and 0 <= self.epochs < 10**6):
            raise ValueError(f"{self.name}: epochs {short(self.epochs)}: wanted a whole number")
        for kind, longest in (("sha256", 64), ("md5", 32)):
            if not re.fullmatch(rf"(?:[0-9a-f]{{6,{longest}}})?", getattr(self, kind)):
                raise ValueError(f"{self.name}: {kind}: wanted 6 to {longest} hexadecimal digits, in quotes")

    def reading(self, asked: WeightsOptions) -> WeightsOptions:
        """How to read the file: as asked, else the branch that the entry names."""
        return asked.reading(branch=asked.branch or self.branch, zoo=None)

    def doubts(self, arch: str | None, form: str) -> tuple[str, ...]:
        """In what a file that was read is not what the entry says."""
        pairs = (("architecture", self.arch, arch), ("format", self.format, form))
        return tuple(
            f"{PREFIX}{self.name} should have the {what} {said}, and was read as {found}"
            for what, said, found in pairs
            if said and said != found
        )


def _no_url(url: str) -> str:
    """Why nothing can be fetched by it; empty where it can be tried."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return "wanted printable ASCII, other characters as %xx"
    if len(url) > LONGEST_URL:
        return f"wanted at most {LONGEST_URL} characters"
    try:
        parts = urllib.parse.urlsplit(url)
        missing = not parts.hostname and parts.scheme != "file"
        return "names no host" if missing else "" if parts.port != 0 else "port 0"
    except ValueError as error:
        return f"no URL ({error})"


TEXTS = ("url", "source", "arch", "format", "branch", "sha256", "md5", "note")


def _read(name: object, raw: Any, own: Mapping[str, list[Published]], folder: Path) -> Entry:
    """An entry as the file in `folder` has it. Raises ValueError."""
    known = [f.name for f in dataclasses.fields(Entry) if f.name != "name"]
    if not isinstance(raw, Mapping):
        raise ValueError(f"{name}: wanted entries such as url: https://...")
    if unknown := sorted(str(key) for key in raw if key not in known):
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    for key in TEXTS:
        if not isinstance(raw.get(key, ""), str):
            found = short(raw[key])
            raise ValueError(f"{name}: {key}: {found}: wanted text (in quotes where it is all digits)")
    if missing := [key for key in ("url", "source") if not raw.get(key)]:
        raise ValueError(f"{name}: wanted {' and '.join(missing)}")
    rows = raw.get("figures") or []
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{name}: figures: wanted a list of rows as in figures.yaml")
    said = {"method": str(name), "pretraining": "", "arch": raw.get("arch", ""), "source": raw["source"]}
    figures = [read_figure({**said, **_placed(row, folder), "checkpoint": str(name)}) for row in rows]
    values = {**raw, "source": source_of(raw["source"]), "name": str(name)}
    return Entry(**values | {"figures": (*own.get(str(name), ()), *figures)})


def _placed(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A figure whose protocol, where it is a file, is looked for beside the manifest."""
    protocol = row.get("protocol", "")
    if not isinstance(protocol, str):
        raise ValueError(f"protocol {short(protocol)}: wanted NAME@VERSION or a file")
    return {**row, "protocol": str(folder / protocol) if protocol.endswith(".yaml") else protocol}


def _load(path: Path, own: Mapping[str, list[Published]]) -> dict[str, Entry]:
    try:
        said = read_yaml(path)
        if not isinstance(said, Mapping) or set(said) != {"checkpoints"}:
            raise ValueError("wanted one entry, checkpoints, with NAME: {url: ..., source: ...} under it")
        if not isinstance(said["checkpoints"], Mapping):
            raise ValueError("checkpoints: wanted NAME: {url: ..., source: ...}")
        return {str(name): _read(name, raw, own, path.parent) for name, raw in said["checkpoints"].items()}
    except (OSError, ValueError) as error:
        raise UserError(f"--zoo {path}: {error}") from error


@functools.cache
def _shipped() -> dict[str, Entry]:
    own: dict[str, list[Published]] = {}
    for figure in load_published():
        own.setdefault(figure.checkpoint, []).append(figure)
    return _load(FILE, own)


def load_zoo(file: str | Path | None = None) -> dict[str, Entry]:
    """Every entry by its name: those of `file`, and those that come with the project.

    Raises UserError for a file that is no manifest, or whose name of an entry is one of the project's.
    """
    mine = _load(Path(file), {}) if file is not None else {}
    if twice := sorted(mine.keys() & _shipped().keys()):
        raise UserError(f"--zoo {file}: {', '.join(twice)}: a name of the project's own; take another")
    return mine | _shipped()


def find_entry(name: str, file: str | Path | None = None) -> Entry:
    """The entry called `name`, with or without zoo: before it. Raises UserError, with near names."""
    name, zoo = name.removeprefix(PREFIX), load_zoo(file)
    if name not in zoo:
        near = difflib.get_close_matches(name, zoo, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{PREFIX}{name}: no such checkpoint{hint} (`python -m transfer zoo` lists them)")
    return zoo[name]
