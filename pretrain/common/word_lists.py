"""Command lines as people write them, in the form that the option parser reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection

import yaml

COMMA = {"--override": r",(?=\s*\w+\.\w+=)", "--detection-data": r",(?=[^,=:]+=)", "--sweep": r",(?=\s*\w+=)"}
"""What separates two values in one word, where it is not every comma: partition=a,b is one value."""


def spread(argv: list[str], lists: Collection[str], texts: Collection[str] = ()) -> list[str]:
    """`--weights A B` and `--tasks a,b` become lists; options given several times are taken together.

    `lists` are the options with several values, `texts` those whose value is a text of further options.
    """
    out: list[str] = []
    values: dict[str, list[str]] = {}
    further: dict[str, list[str]] = {}
    current: list[str] | None = None
    in_list = ""
    words = iter(argv)
    for word in words:
        name, joined, value = word.partition("=")
        if name in texts:
            current = None
            text = value if joined else next(words, None)
            if text is None:
                out.append(word)  # the parser says what is missing
            else:
                further.setdefault(name, []).append(text)
        elif name in lists:
            current, in_list = values.setdefault(name, []), name
            current += _parts(name, value) if joined else []
        elif word.startswith("--"):
            current = None
            out.append(word)
        elif current is not None:
            current += _parts(in_list, word)
        else:
            out.append(word)
    out += [f"{name}={' '.join(given)}" for name, given in further.items()]
    return out + [f"{name}={json.dumps(given)}" for name, given in values.items()]


def _parts(name: str, value: str) -> list[str]:
    """a,b is two values, unless a file has that name; [a, b] is as the parser's help spells it."""
    if os.path.isfile(value):
        return [value]
    if value.startswith("[") and value.endswith("]"):
        try:
            return [str(v) for v in yaml.safe_load(value)]
        except yaml.YAMLError:
            value = value[1:-1]
    parts = [v.strip() for v in re.split(COMMA.get(name, ","), value)]
    found = []
    while parts:
        files = (n for n in range(len(parts), 1, -1) if os.path.isfile(",".join(parts[:n])))
        count = next(files, 1)
        found.append(",".join(parts[:count]))
        parts = parts[count:]
    return [v for v in found if v]
