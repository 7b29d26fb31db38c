"""A command line as people write it enters; the form that the option parser reads leaves."""

from __future__ import annotations

import json


def spread(argv: list[str], lists: list[str]) -> list[str]:
    """`--weights A B` and `--tasks a,b` become lists."""
    out: list[str] = []
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in argv:
        name, joined, value = word.partition("=")
        if name in lists:
            current = values.setdefault(name, [])
            current += _parts(name, value) if joined else []
        elif word.startswith("--"):
            current = None
            out.append(word)
        elif current is not None:
            current += _parts("", word)
        else:
            out.append(word)
    return out + [f"{name}={json.dumps(given)}" for name, given in values.items()]


def _parts(name: str, value: str) -> list[str]:
    """a,b is two values; [a, b] is as the parser's own help spells a list."""
    return [v.strip() for v in value.strip("[]").replace('"', "").split(",") if v.strip()]
