"""Tables as plain text."""

from __future__ import annotations

from transfer.report.pages.tables import Cell, table, to_text


def test_a_wide_table_goes_on_below_within_the_width() -> None:
    """Columns of 10, 11, 6 and 6 characters, two apart: 10 + 2 + 11 + 2 + 6 = 31 fit, 8 more do not."""
    t = table(
        "v", "Verdict", ["method ten", "metric", "second", "third1"],
        [[Cell(text="INTL"), Cell(text="79.4", note="±0.1"), Cell(text="-"), Cell(text="80.1")]],
    )  # fmt: skip
    shown = to_text(t, 31)
    assert shown.splitlines() == [
        "Verdict", "",
        "method ten  metric       second", "----------  -----------  ------",
        "INTL        79.4 (±0.1)  -", "",
        "method ten  third1", "----------  ------", "INTL        80.1",
    ]  # fmt: skip
    assert to_text(t, 80).count("INTL") == 1


def test_a_long_cell_goes_on_in_the_next_line() -> None:
    words = "seven words are too many for one"  # 32 characters; 28 are room enough for six of them
    t = table("v", "V", ["a", words], [[Cell(text="x"), Cell(text="1")]])
    assert to_text(t).splitlines()[2:4] == [
        "a  seven words are too many for", "   one",
    ]  # fmt: skip
    assert to_text(t, 40, wide_end=True).splitlines()[2] == f"a  {words}"  # 3 + 32 of 40 characters
    wide = table("v", "V", [f"column {i}" for i in range(40)], [[Cell(text="12.3")] * 40])
    assert max(map(len, to_text(wide, 100).splitlines())) <= 100
