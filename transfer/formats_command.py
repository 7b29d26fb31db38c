"""`transfer formats`: list the checkpoint formats that can be read, and print one as a file."""

from __future__ import annotations

import difflib
import json
import sys
from typing import Any

import yaml

from pretrain.common.cli import Parser
from pretrain.common.errors import UserError
from pretrain.common.terminal import console
from transfer.checkpoints.format import Format
from transfer.checkpoints.formats import CMC, FORMATS, REFUSED
from transfer.checkpoints.other_files import IN_PYTHON


def table() -> list[dict[str, str]]:
    """A row a format: source, container, prefixes of both branches, what is dropped, padding."""
    return [
        {
            "source": f.name,
            "container": ", ".join(dict.fromkeys(p.container or "none" for p in (*f.online, *f.ema))),
            "online": ", ".join(dict.fromkeys(p.prefix or "(bare)" for p in f.online)),
            "EMA": ", ".join(dict.fromkeys(p.prefix or "(bare)" for p in f.ema)),
            "dropped": ", ".join(prefix for prefix, _ in f.drop),
            "CIFAR padding": str(f.cifar_padding or ""),
        }
        for f in FORMATS
    ]


def markdown() -> str:
    """The table for the documentation, and what is refused."""
    rows = table()
    code = {"container", "online", "EMA", "dropped"}
    lines = [f"| {' | '.join(rows[0])} |", f"| {' | '.join('---' for _ in rows[0])} |"]
    for row in rows:
        cells = (
            ", ".join(f"`{word}`" if word not in ("none", "(bare)") else word for word in value.split(", "))
            if name in code and value
            else value
            for name, value in row.items()
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Recognised and refused:", "", *(f"- {name}: {why}" for name, why in REFUSED.items())]
    lines += ["", f"{IN_PYTHON[0].upper()}{IN_PYTHON[1:]}."]
    return "\n".join(lines)


DESCRIPTION = """List the checkpoint formats that can be read: container of the weights, prefix of the online
and of the EMA branch, what is dropped, and the padding assumed for a 3x3 (CIFAR) stem.

A file must fit one of them completely; `python -m transfer inspect FILE` says whether it does.
"""


def told(name: str) -> str:
    """All that is known of the formats whose name has `name` in it. Raises UserError for none."""
    found = [f for f in (*FORMATS, CMC) if name.casefold() in f.name.casefold()]
    exact = [f for f in found if f.name.casefold() == name.casefold()]
    if not found:
        near = difflib.get_close_matches(name, [f.name for f in FORMATS], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"formats show {name}: no such format{hint} (`python -m transfer formats` lists them)"
        )
    return "\n\n".join(map(_told, exact or found))


def _told(f: Format) -> str:
    """The format as a file that `--weights-format` takes, what such a file cannot say as comments."""
    comments = [f"# networks: {', '.join(f.families)}"] if f.families else []
    comments += [f"# told by: {f.top} at the file's top"] if f.top else []
    comments += [f"# heads of ViTs up to ViT-S: 12 ({f.many_heads})"] if f.many_heads else []
    comments += [f"# positions are resampled: {f.positions}"] if "vit" in f.families else []
    comments += [f"# refused: {REFUSED[f.name]}"] if f.name in REFUSED else []
    said: dict[str, Any] = {"name": f.name}
    for branch, places in (("online", f.online), ("ema", f.ema)):
        said[branch] = [{"container": p.container, "prefix": p.prefix} for p in places]
    said |= {"drop": dict(f.drop), "rename": dict(f.rename), "needs": list(f.needs)}
    said |= {"also_needs": list(f.also_needs), "cifar_padding": f.cifar_padding, "note": f.note}
    kept = {key: value for key, value in said.items() if value}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([*comments, text.rstrip()])


def main(argv: list[str]) -> int:
    """`python -m transfer formats [show NAME]`."""
    parser = Parser(prog="python -m transfer formats", description=DESCRIPTION)
    parser.add_argument("words", nargs="*", metavar="show NAME", help="All that is known of one.")
    parser.add_argument("--markdown", action="store_true", help="As a Markdown table, for documentation.")
    parser.add_argument("--json", action="store_true", help="As JSON.")
    asked = parser.parse_args(argv)
    if asked.words:
        if asked.words[0] != "show" or len(asked.words) < 2:
            raise UserError(f"formats {' '.join(asked.words)}: wanted show NAME, such as show DINO")
        print(told(" ".join(asked.words[1:])))
    elif asked.markdown:
        print(markdown())
    elif asked.json:
        print(json.dumps({"formats": table(), "refused": REFUSED}, indent=2))
    else:
        from rich.table import Table

        rows = table()
        view = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
        for row in rows:
            view.add_row(*row.values())
        console(width=None if sys.stdout.isatty() else 160).print(view, markup=False)
        for name, why in REFUSED.items():
            print(f"refused: {name}: {why}")
    return 0
