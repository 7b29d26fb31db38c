"""Protocols: every hyperparameter of an evaluation, with its source and a hash.

A protocol is a YAML file `NAME@VERSION.yaml` in protocols/: `task`, `title`, `source`, `values` and, where it
is known, `differs`: in what it still is not what its authors do. The hash covers task and values alone, so a
corrected remark does not part new results from old ones, and a changed number does. A published file's values
never change: a correction is a new version.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

import yaml

from pretrain.common.errors import UserError
from pretrain.common.files import read_yaml
from pretrain.common.help_formatter import in_words

FOLDER = Path(__file__).parents[1] / "protocols"
TASKS = ("knn", "linear", "semisup", "spectrum")

Values = TypeVar("Values")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named, versioned set of hyperparameters."""

    name: str
    version: int
    task: str
    title: str
    source: str
    values: Mapping[str, Any]
    differs: str = ""
    """In what it is known to differ from what its authors do."""

    @property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of task and values as canonical JSON."""
        text = json.dumps({"task": self.task, "values": self.values}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def has_authors(self) -> bool:
        """Whether `source` names other people's code."""
        return self.source.startswith("https://")

    @property
    def reference(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.name, "version": self.version, "hash": self.hash}

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def settings(self, cls: type[Values]) -> Values:
        """The values as the frozen dataclass `cls`. Raises UserError naming a wrong or missing one."""
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key, value in self.values.items():
            if key not in fields:
                raise UserError(f"protocol {self}: unknown value {key!r}; known: {', '.join(fields)}")
            if not _fits(value, hints[key]):
                raise UserError(f"protocol {self}: {key}: {short(value)}: wanted {in_words(hints[key])}")
            if why := _too_much(key, value):
                raise UserError(f"protocol {self}: {key}: {short(value)}: wanted {why}")
        needed = (
            n
            for n, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        )
        missing = [n for n in needed if n not in self.values]
        if missing:
            raise UserError(f"protocol {self}: {', '.join(missing)} missing")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.values.items()})
        except ValueError as error:
            raise UserError(f"protocol {self}: {error}") from error


MOST = {
    "batch": 2**17, "epochs": 10**5, "warmup_epochs": 10**5, "steps_per_epoch": 10**6, "iterations": 10**7,
    "folds": 100, "samples": 1000, "shots": 10**6, "ks": 10**6, "crop": 4096, "resize": 8192,
    "image_size": 4096, "images": 10**6, "sizes": 10**6, "view_images": 10**6, "views": 1000,
    "clusters": 10**5, "neighbours": 10**5, "repeats": 10**4,
}  # fmt: skip
"""The largest whole numbers of some values: beyond what anybody runs, within what memory can hold."""
MOST_OF_OTHERS = 10**6
LARGEST = 1e100
LONGEST = 1000
"""Entries of a list, or characters of a text."""


def _too_much(key: str, value: Any) -> str:
    """What is wanted instead of a value, or an entry of it, that is beyond all use; empty where it is not."""
    if isinstance(value, (str, list, dict)) and len(value) > LONGEST:
        return f"at most {LONGEST} {'characters' if isinstance(value, str) else 'entries'}"
    if isinstance(value, (list, dict)):
        entries = value if isinstance(value, list) else [*value, *value.values()]
        return next(filter(None, (_too_much(key, v) for v in entries)), "")
    most = MOST.get(key, MOST_OF_OTHERS) if isinstance(value, int) else LARGEST
    return (
        ""
        if isinstance(value, str) or value is None or not value > most
        else f"at most {most:,}"
        if isinstance(value, int)
        else f"at most {most:g}"
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is of the annotated type; an int is a float, a list is a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, args[1]) for v in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def load_protocol(name: str, task: str | None = None) -> Protocol:
    """The protocol `NAME@VERSION`, or one of your own from a file `.../NAME@VERSION.yaml`.

    Raises UserError for an unknown name, listing those of `task`, or one that belongs to another task.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() and name.endswith((".yaml", ".yml")):
        raise UserError(f"{name}: no such file; wanted a protocol's YAML file, NAME@VERSION.yaml")
    if not path.is_file():
        known = [str(p) for p in all_protocols() if task in (None, p.task)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        if Path(f"{name}.yaml").is_file():
            hint = f" (your file is named with its suffix: {name}.yaml)"
        raise UserError(f"unknown protocol {name!r}{hint}; choose one of: {', '.join(known)}")
    protocol = _read(path)
    shipped = FOLDER / f"{protocol}.yaml"
    if shipped.is_file() and _read(shipped).hash != protocol.hash:
        raise UserError(
            f"{path}: {protocol} is a protocol of this project with other values; give yours a name of its "
            f"own, such as mine_{protocol.name}@1.yaml, so that its results are told apart"
        )
    if task is not None and protocol.task != task:
        known = [str(p) for p in all_protocols() if p.task == task]
        raise UserError(f"protocol {protocol} is for {protocol.task}; for {task}: {', '.join(known)}")
    return protocol


def _read(path: Path) -> Protocol:
    stem, at, version = path.stem.rpartition("@")
    if not at or not re.fullmatch("[0-9]{1,9}", version):
        raise UserError(f"{path}: a protocol's file is named NAME@VERSION.yaml, such as mine@1.yaml")
    try:
        content = read_yaml(path, _Loader)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    wanted = {"task", "title", "source", "values"}
    if not isinstance(content, dict) or set(content) - {"differs"} != wanted:
        raise UserError(f"{path}: wanted the entries {', '.join(sorted(wanted))} and optionally differs")
    if not isinstance(content["values"], dict):
        raise UserError(f"{path}: values: wanted entries KEY: VALUE")
    for key in content.keys() - {"task", "values"}:
        if not isinstance(content[key], str):
            found = short(content[key])
            raise UserError(f"{path}: {key}: {found}: wanted text (in quotes if it has a colon)")
    if content["task"] not in TASKS:
        raise UserError(f"{path}: task {short(content['task'])}; wanted one of {', '.join(TASKS)}")
    return Protocol(name=stem, version=int(version), **content)


def want(ok: bool, key: str, value: object, what: str) -> None:
    """Raises ValueError unless `ok`, naming the key, its value and what was wanted."""
    if not ok:
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{key}: {shown}: wanted {what}")


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-6 as a number, which YAML 1.1 takes for a string."""


_Loader.yaml_implicit_resolvers = {
    key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def all_protocols() -> list[Protocol]:
    """Every protocol that comes with the project, by task and name."""
    found = [_read(p) for p in FOLDER.glob("*.yaml")]
    return sorted(found, key=lambda p: (TASKS.index(p.task), p.name, p.version))


def as_markdown() -> str:
    """All protocols with all their values as Markdown tables, one a task."""
    lines, protocols = [], all_protocols()
    for task in TASKS:
        lines += [
            f"### {task}",
            "",
            "| protocol | what it is | values | source | known to differ |",
            "| --- | --- | --- | --- | --- |",
        ]
        for p in protocols:
            if p.task == task:
                values = ", ".join(f"{k} {_spell(v)}" for k, v in p.values.items())
                lines.append(f"| `{p}` ({p.hash}) | {p.title} | {values} | {p.source} | {p.differs} |")
        lines.append("")
    return "\n".join(lines)


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return "{" + ", ".join(_spell(v) for v in value) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_spell(v)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
