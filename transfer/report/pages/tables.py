"""Tables of text as Markdown, CSV, LaTeX and plain text, all with the same cells."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import re
import textwrap

from pretrain.common.files import file_name

PUBLISHED = "published"
MISSING = "missing"
STALE = "stale"
NUMBER = re.compile(r"^[-+]?[\d.,]*\d( ± .*)?$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell, the same in every form of the table."""

    text: str
    note: str = ""
    """A second, smaller line: spread, n, best epoch …"""
    link: str = ""
    kind: str = ""
    """"" or one of best, published, missing, stale, bad, good: how it is marked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table whose rows all have as many cells as it has columns."""

    name: str
    """File name without suffix."""
    title: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @functools.cached_property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers alone (or dashes for missing ones), and are set flush right."""
        texts = [[row[i].text for row in self.rows] for i in range(len(self.columns))]
        known = [[text for text in column if text not in ("", "-", "–")] for column in texts]
        return tuple(bool(column) and all(map(NUMBER.match, column)) for column in known)


def cell(value: object, **rest: str) -> Cell:
    """A cell with `value` as text; None gives an empty one."""
    return Cell(text="" if value is None else str(value), **rest)


def table(name: str, title: str, columns: list[str | Cell], rows: list[list[Cell]], note: str = "") -> Table:
    """A table whose rows all have as many cells as it has columns."""
    heads = tuple(c if isinstance(c, Cell) else Cell(text=c) for c in columns)
    assert all(len(row) == len(heads) for row in rows), name
    return Table(
        name=file_name(name), title=title, columns=heads, rows=tuple(tuple(r) for r in rows), note=note
    )


def _one_line(c: Cell) -> str:
    return f"{c.text} ({c.note})" if c.note else c.text


def markdown_escape(text: str) -> str:
    """Text as Markdown shows it literally, on one line."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", text).replace("\n", " ")


def to_markdown(t: Table) -> str:
    """A GitHub table; links stay links."""

    def spell(c: Cell) -> str:
        text = markdown_escape(_one_line(c))
        text = f"**{text}**" if c.kind == "best" else text
        return f"[{text}]({c.link})" if c.link else text

    lines = [[spell(c) for c in t.columns]]
    lines += [["---"] * len(t.columns)]
    lines += [[spell(c) for c in row] for row in t.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return body + (f"\n\n{markdown_escape(t.note)}" if t.note else "")


def to_csv(t: Table) -> str:
    """Texts and notes; a link is a column of its own when there is one in the table."""

    def plain(text: str) -> str:  # a spreadsheet would run it as a formula
        number = re.fullmatch(r"[-+]?[\d.,]*", text)
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not number else text

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    linked = any(c.link for row in t.rows for c in row)
    writer.writerow([plain(_one_line(c)) for c in t.columns] + (["link"] if linked else []))
    for row in t.rows:
        links = [next((c.link for c in row if c.link), "")] if linked else []
        writer.writerow([plain(_one_line(c)) for c in row] + links)
    return out.getvalue()


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$",
    "–": "--", "·": r"$\cdot$", "×": r"$\times$", "λ": r"$\lambda$", "…": r"\dots{}", "<": "$<$", ">": "$>$",
}  # fmt: skip


def tex_escape(text: str) -> str:
    """Text as LaTeX shows it literally, with pdflatex and any font."""
    return "".join(_TEX.get(c, c) for c in text)


def to_tex(t: Table) -> str:
    r"""A `tabular` in the rules of booktabs, ready to \input."""

    def spell(c: Cell) -> str:
        text = tex_escape(c.text)
        text = rf"\textbf{{{text}}}" if c.kind == "best" else text
        return text + (rf" {{\scriptsize {tex_escape(c.note)}}}" if c.note else "")

    lines = [
        f"% {t.title}. Needs \\usepackage{{booktabs}}.".replace("\n", " "),
        rf"\begin{{tabular}}{{{''.join('r' if is_number else 'l' for is_number in t.numeric)}}}",
        r"\toprule",
        " & ".join(spell(c) for c in t.columns) + r" \\",
        r"\midrule",
        *(" & ".join(spell(c) for c in row) + r" \\" for row in t.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


MOST_CHARACTERS = 28  # of a cell in plain text, before it goes on in a second line


def to_text(t: Table, width: int = 110, *, wide_end: bool = False) -> str:
    """Aligned plain text of at most `width` characters a line, for pipes and logs.

    Columns that do not fit beside each other follow below, each time with the first one again. With
    `wide_end` the last column, of sentences, has what the others leave of the width.
    """
    texts = [[c.text for c in t.columns], [c.note for c in t.columns]]
    texts = texts if any(texts[1]) else texts[:1]
    texts += [[_one_line(c) for c in row] for row in t.rows]
    lines = [[_broken(text) for text in row] for row in texts]
    if wide_end:
        taken = sum(max(len(part) for row in lines for part in row[i]) + 2 for i in range(len(t.columns) - 1))
        for row, texts_of_row in zip(lines, texts):
            row[-1] = _broken(texts_of_row[-1], max(MOST_CHARACTERS, width - taken))
    widths = [max(len(part) for line in lines for part in line[i]) for i in range(len(t.columns))]
    spelt = [t.title]
    todo = list(range(1, len(t.columns)))
    while todo or len(spelt) == 1:
        shown = [0]
        while todo and (len(shown) == 1 or sum(widths[i] + 2 for i in (*shown, todo[0])) - 2 <= width):
            shown.append(todo.pop(0))
        block = [_spelt([line[i] for i in shown], [widths[i] for i in shown]) for line in lines]
        first = len(lines) - len(t.rows)
        rule = "  ".join("-" * widths[i] for i in shown)
        spelt += ["", *(x for b in block[:first] for x in b), rule, *(x for b in block[first:] for x in b)]
    return "\n".join(spelt)


def _broken(text: str, most: int = MOST_CHARACTERS) -> list[str]:
    return textwrap.wrap(text, most) or [""]


def _spelt(cells: list[list[str]], widths: list[int]) -> list[str]:
    """One row of cells of several lines each."""
    rows = itertools.zip_longest(*cells, fillvalue="")
    return ["  ".join(f"{text:{w}s}" for text, w in zip(row, widths)).rstrip() for row in rows]
