"""A command line as people write it enters; the form that the option parser reads leaves."""

from __future__ import annotations

import json


def spread(argv: list[str], lists: list[str], flags: list[str]) -> list[str]:
    """`--weights A B` and `--tasks a,b` become lists; a bare `--dry-run` becomes `--dry-run=true`."""
    out: list[str] = []
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for i, word in enumerate(argv):
        name, joined, value = word.partition("=")
        if name in lists:
            current = values.setdefault(name, [])
            current += _parts(name, value) if joined else []
        elif word.startswith("--"):
            current = None
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            bare = word in flags and following.lower() not in ("true", "false")
            out.append(f"{word}=true" if bare else word)
        elif current is not None:
            current += _parts("", word)
        else:
            out.append(word)
    return out + [f"{name}={json.dumps(given)}" for name, given in values.items()]


def _parts(name: str, value: str) -> list[str]:
    """a,b is two values; [a, b] is as the parser's own help spells a list."""
    return [v.strip() for v in value.strip("[]").replace('"', "").split(",") if v.strip()]


def positional(argv: list[str], option: str, place: int = 1) -> list[str]:
    """The `place`-th word at the front that is no option becomes `option`'s value: `status DIR`."""
    at = place - 1
    if len(argv) > at and not any(w.startswith("-") for w in argv[: at + 1]):
        return [*argv[:at], *argv[at + 1 :], option, argv[at]]
    return argv
