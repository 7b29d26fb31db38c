"""The text of --help, with one look for every command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.common.terminal import width as terminal_width

EXIT_CODES = (
    "exit codes: 0 done; 1 failed; 2 wrong input, nothing started; 75 stopped by SIGTERM or SIGUSR2 with "
    "everything saved, run it again to go on; 130 interrupted"
)

LONGEST_CHOICES = 60  # characters on a line; longer lists stand in the option's text

FIRM = "\xa0"  # a space at which no line ends

VALUES = {
    "output": "PATH", "weights": "FILE", "lists": "FILE", "dirs": "DIR", "results": "DIR", "stage_to": "DIR",
    "zoo": "FILE", "tasks": "TASK", "force": "STEP", "every_s": "SECONDS",
    "detection_data": "NAME=JSON:IMAGES", "override": "KIND.KEY=VALUE", "profile": "NAME|FILE",
    "sweep": "OPTION=VALUE,VALUE",
    "image_size": "PX", "eval_size": "PX", "size": "PX", "view_sizes": "PX",
}  # fmt: skip
"""What stands for an option's value where neither its type nor the last word of its name says it."""


class Formatter(argparse.HelpFormatter):
    """argparse's, with a usage line of what must be given and text whose paragraphs and drawings are kept."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = terminal_width() - 2
        super().__init__(prog, **(options | {"max_help_position": 26, "width": width}))

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None
    ) -> str:
        named = [a for a in actions if a.option_strings]
        needed = [
            f"{a.option_strings[-1]} {self._format_args(a, _stands_for(a))}" for a in named if a.required
        ]
        placed = [a for a in actions if not a.option_strings]
        first = [self._format_args(a, _stands_for(a)) for a in placed if a.nargs != argparse.REMAINDER]
        last = [f"[{_stands_for(a)} ...]" for a in placed if a.nargs == argparse.REMAINDER]
        words = [self._prog, *first, *needed, *(["[options]"] if named else []), *last]
        line = "usage: " + " ".join(w.replace(" ", FIRM) for w in words)
        return "\n".join(_wrap(line, self._width, indent=" " * 11)) + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrapped(text, width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrap(text, width)


def wrapped(text: str, width: int | None = None) -> str:
    """`text` in lines of `width` (the terminal's); paragraphs with a drawing in them stay as they are."""
    width = width or terminal_width() - 2
    blocks = text.strip("\n").split("\n\n")
    return "\n\n".join(b if "─" in b else "\n".join(_wrap(b, width)) for b in blocks)


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    words = re.sub(r"[ \n]+", " ", text)
    lines = textwrap.wrap(
        words, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return [line.replace(FIRM, " ") for line in lines]


def _stands_for(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def help_text(
    settings: type,
    docs: Mapping[str, str],
    *,
    prog: str,
    description: str,
    config: tuple[str, str],
    positional: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
) -> str:
    """--help of a command with the options of the dataclass `settings`, whose fields are said in `docs`.

    `config` has the option for a YAML file and what it takes; the fields named in `positional` are shown
    as words without an option. `groups` has, by a group's first field, the groups' titles in the order in
    which they are shown; without, what must be given comes first.
    """
    fields = [f for f in dataclasses.fields(settings) if f.init]
    needed = {f.name for f in fields if _default(f) is dataclasses.MISSING} | {*positional}
    hints = typing.get_type_hints(settings)
    sections: dict[str, list[argparse.Action]] = {}
    title = ""
    for f in fields:
        title = groups.get(f.name, title) if groups else "required" if f.name in needed else "options"
        says = _says(docs.get(f.name) or "", _default(f), needed=f.name in needed and groups is not None)
        action = _action(f, hints[f.name], says, positional=f.name in positional)
        action.required = f.name in needed
        sections.setdefault(title, []).append(action)
    if groups:
        sections = {title: sections[title] for title in groups.values() if title in sections}
    flag, takes = config
    file = argparse.Action([flag], "config", metavar="FILE", help=takes)
    general = [
        argparse.Action(
            ["--print-config"], "print_config", nargs=0, help="Print the settings as YAML and stop."
        ),
        argparse.Action(["-h", "--help"], "help", nargs=0, help="Print this text."),
    ]
    if flag == "--config":
        sections = {"required": sections.pop("required", []), **sections, "general": [file, *general]}
    else:  # a recipe is what one starts from
        sections = {flag[2:]: [file], **sections, "general": general}
    formatter = Formatter(prog)
    formatter.add_usage(None, [a for actions in sections.values() for a in actions], [])
    formatter.add_text(description)
    for title, actions in sections.items():
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    formatter.add_text(EXIT_CODES)
    return formatter.format_help()


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _says(doc: str, default: Any, *, needed: bool) -> str:
    """The help sentence with its default, unless it speaks of that itself."""
    told = (
        "default" in doc.lower()
        or isinstance(default, bool)
        or default in (None, "", [], (), dataclasses.MISSING)
    )
    if isinstance(default, (list, tuple)):
        words = all(isinstance(value, str) for value in default)
        default = shlex.join(default) if words else json.dumps(default)
    note = "required" if needed else "" if told else f"default: {default}"
    if len(note) <= LONGEST_CHOICES:
        note = note.replace(" ", FIRM)
    return (f"{doc} ({note})" if note else doc).replace("%", "%%")


def _action(field: Any, hint: Any, says: str, *, positional: bool) -> argparse.Action:
    name = field.name
    option = f"--{name.replace('_', '-')}"
    if hint is bool:
        both = [option, f"--no-{option[2:]}"] if field.default is True else [option]
        return argparse.Action(both, name, nargs=0, help=says)
    return argparse.Action([] if positional else [option], name, metavar=value_of(name, hint), help=says)


def in_words(hint: Any) -> str:
    """A type as people say it: `a list of whole numbers, such as [1, 2]`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, args))
    if origin is typing.Literal:
        return " or ".join(filter(None, (", ".join(map(str, args[:-1])), str(args[-1]))))
    if origin in (list, tuple):
        example = {int: "[1, 2]", float: "[0.1, 0.2]"}.get(args[0], "[a, b]")
        return f"a list of {_KINDS.get(args[0], 'word')}s, such as {example}"
    if origin is dict:
        return "entries such as {'1': 0.01, '10': 0.01}"
    if hint in (bool, type(None)):
        return "true or false" if hint is bool else "nothing"
    return "text" if hint is str else f"a {_KINDS.get(hint, 'path')}"


_KINDS = {int: "whole number", float: "number"}


def value_of(name: str, hint: Any) -> str:
    """What stands for the value of option `name` of type `hint`: its choices, its unit, N, X or a word."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return value_of(name, next(a for a in args if a is not type(None)))
    if origin in (list, tuple):
        one = value_of(name, args[0])
        return f"[{one},...]" if args[0] in (int, float) else f"{one} ..."
    if name in VALUES:
        return VALUES[name]
    if origin is typing.Literal and len(choices := ",".join(map(str, args))) <= LONGEST_CHOICES:
        return "{" + choices + "}"
    if hint is bool:
        return "{true,false}"
    return {int: "N", float: "X"}.get(hint, name.rpartition("_")[2].upper())
