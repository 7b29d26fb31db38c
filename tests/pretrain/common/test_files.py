"""Files that a kill cannot tear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.common.files import append_jsonl, atomic_path, read_jsonl, sha256_of, write_text


def test_a_failed_write_leaves_the_last_good_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "state.bin"
    write_text(target, "good")
    with pytest.raises(OSError, match="disk"), atomic_path(target) as aside:
        aside.write_text("half")
        raise OSError("no space left on the disk")
    assert target.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["state.bin"]


def test_a_line_after_a_torn_one_starts_anew_and_the_torn_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_jsonl(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "metr')  # what a kill in the middle of a write leaves
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


def test_no_file_holds_no_records(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_not_a_number_is_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_jsonl(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(path, {"a": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}]


def test_sha256_of_known_content(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # the first example of FIPS 180-4's appendix
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
