"""Files that a kill cannot tear."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from pathlib import Path

import pytest

from pretrain.common.errors import is_disk_full
from pretrain.common.files import (
    NoFile,
    append_jsonl,
    atomic_path,
    file_name,
    read_json,
    read_jsonl,
    read_yaml,
    regular,
    remove_leftovers,
    sha256_of,
    whole_number,
    write_text,
)


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


@pytest.mark.parametrize(
    "text",
    ["../../etc/passwd", "/abs", "a b", "..", "", "é", ".hidden", "x" * 400, "nul\0", "-rf", "a b/c"],
)
def test_names_from_elsewhere_are_reduced_to_plain_ones(text: str) -> None:
    name = file_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and len(name) <= 120
    assert file_name(name) == name


def test_plain_names_stay_and_others_are_told_apart() -> None:
    assert file_name("task-knn-cifar10-solo_knn-v1-a1b2c3") == "task-knn-cifar10-solo_knn-v1-a1b2c3"
    assert len({file_name(t) for t in ("a/b", "a b", "a-b", "a\\b", "a:b")}) == 5


def test_lines_are_read_in_their_order_and_what_is_none_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        '\ufeff{"a": 1}',
        "",
        "[1]",
        '{"a": NaN}',
        "{",
        '{"a": "\u2028"}',
        "[" * 99_999,
        '{"a": 2, "torn',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_jsonl(path, nan=False) == [{"a": 1}, {"a": "\u2028"}]
    told = [r.getMessage() for r in caplog.records]
    assert told == [f"{path}: 4 lines without a JSON object left out (line 3, 4, 5 ...)"]
    assert path.read_text(encoding="utf-8") == "\n".join(lines)
    assert len(read_jsonl(path)) == 3  # detectron2 writes NaN for what it has no object of


def test_leftovers_of_writers_go_and_nothing_else(tmp_path: Path) -> None:
    ours = [".a.pt.12.tmp", ".a.pt.12.0f1e2d.tmp", ".b.pkl.9.aabbcc.pkl"]
    theirs = [".notes.tmp", "x.12.tmp", ".a.tmp"]
    for name in ours + theirs:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, of="b.pkl")
    assert not (tmp_path / ours[2]).exists() and (tmp_path / ours[0]).exists()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(theirs)


@pytest.mark.faults
def test_lines_that_do_not_fit_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_jsonl(path, {"a": 1})
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
        try:
            append_jsonl(path, {"b": "x" * 10}, {"c": "x" * 10})
        except OSError as error:
            os._exit(7 if is_disk_full(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert path.read_text() == '{"a": 1}\n'


def test_only_files_are_opened(tmp_path: Path) -> None:
    """A pipe without a writer, a device and a folder: each is named at once, none is waited for."""
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    link = tmp_path / "link.yaml"
    link.symlink_to("/dev/zero")
    for path, kind in ((pipe, "a pipe"), (link, "a device or socket"), (tmp_path, "a folder")):
        for read in (read_jsonl, read_yaml, sha256_of, regular):
            with pytest.raises(NoFile, match=rf"{path.name} is no file \({kind}\)"):
                read(path)
        assert read_json(path) == {}
    with pytest.raises(FileNotFoundError):
        regular(tmp_path / "none")
    file = tmp_path / "file"
    file.write_text("{}")
    assert regular(file) == file


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("12", 12), ("9" * 18, 10**18 - 1), ("9" * 19, None), ("9" * 5000, None), ("", None),
     ("\u00b2", None), ("\u0661", None), ("-1", None), (" 1", None), ("1.0", None), (None, None), (7, 7)],
)  # fmt: skip
def test_whole_numbers_of_strangers(text: object, number: int | None) -> None:
    assert whole_number(text) == number


def test_yaml_whose_aliases_stand_for_very_much_is_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    lists = ["a0: &a0 [" + ",".join(["x"] * 10) + "]"]
    lists += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9)]
    for text in ("\n".join(lists), "a: &a [*a, *a]", "a: &a {b: *a}"):
        bomb.write_text(text)
        with pytest.raises(ValueError, match="more than 200,000 values"):
            read_yaml(bomb)
    bomb.write_text("a: &a [1, 2]\nb: *a")
    assert read_yaml(bomb) == {"a": [1, 2], "b": [1, 2]}
