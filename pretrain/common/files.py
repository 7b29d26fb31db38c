"""Files that a kill cannot tear: written aside, flushed, renamed; lines only ever appended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

LARGEST_YAML = 1 << 20  # bytes
MOST_VALUES = 200_000
DEEPEST = 30  # levels of a line's lists and objects

LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+(\.[0-9a-f]+)?\.(tmp|pkl)")
LONGEST_NAME = 120
TOLD = 3


class NoFile(OSError):
    """What is to be read is there, and is no file: a folder, a pipe or a device."""


def regular(path: str | Path) -> Path:
    """`path`, to be opened where a stranger named it: a pipe may have no writer, a device no end.

    Raises OSError where there is nothing, NoFile where it is no file or link to one.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise NoFile(f"{path} is no file ({kind})")
    return Path(path)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed and renamed over `path`.

    When the body raises (a full disk, a signal turned into an exception) the temporary file is removed
    and `path` keeps what it had.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def set_usual_mode(path: Path) -> None:
    """Give a file the access rights of any new one: safetensors writes for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_leftovers(folder: Path, *, of: str | None = None) -> None:
    """Delete the temporary files of writers that were killed; `of`: those of this file alone."""
    for path in folder.iterdir():
        found = LEFTOVER.fullmatch(path.name)
        if found and of in (None, found["name"]) and path.is_file():
            path.unlink(missing_ok=True)


def file_name(text: str) -> str:
    """`text` as a part of a path: of [A-Za-z0-9._-] alone, not hidden, not empty, not over LONGEST_NAME long.

    What is cut off or replaced is told apart by a hash of the whole.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-")
    if name and name == text and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:6]
    return f"{name[: LONGEST_NAME - 7].rstrip('.-')}-{digest}".lstrip("-")


def whole_number(text: object) -> int | None:
    """The number that the text of a stranger's file writes in at most 18 digits of 0 to 9; None for others:
    Python also takes other scripts' digits and refuses thousands of them."""
    found = str(text)
    return int(found) if re.fullmatch(r"[0-9]{1,18}", found) else None


def append_jsonl(path: str | Path, *records: dict[str, Any]) -> None:
    """Append JSON objects, a line each, starting a new line after a torn one: all of them or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                lines = "\n" + lines
        try:
            left = memoryview(lines.encode())
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:  # a full disk
            file.truncate(end)
            raise


def read_jsonl(path: str | Path, *, nan: bool = True) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file, in its order. No file, no objects.

    Other lines are left out and told, but for a last one that a kill tore; without `nan`, those with a
    number that is not finite as well.
    """
    path = Path(path)
    if not path.exists():
        return []
    records, bad = [], []
    for number, record, whole in numbered_jsonl(path, nan=nan):
        if record is not None:
            records.append(record)
        elif whole:  # a last line without an end was cut off by a kill
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:TOLD])) + (" ..." if len(bad) > TOLD else "")
        logger.warning("%s: %d lines without a JSON object left out (line %s)", path, len(bad), shown)
    return records


def numbered_jsonl(
    path: str | Path, *, nan: bool = True
) -> Iterator[tuple[int, dict[str, Any] | None, bool]]:
    """The lines of a file that are not empty: number from 1, JSON object or None, whether it has an end."""
    lines = regular(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=None if nan else _refuse)
        except (ValueError, RecursionError):
            record = None
        fits = isinstance(record, dict) and _is_shallow(record, DEEPEST)
        yield number, record if fits else None, number < len(lines)


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other no deeper: what walks through them calls itself."""
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(
        _is_shallow(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value)
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no such file or it is torn."""
    try:
        value = json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(regular(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_yaml(path: str | Path, loader: Any = None) -> Any:
    """The content of a YAML file that anybody may have written, by a safe loader.

    Raises OSError, or ValueError for what is larger than 1 MB or no YAML: PyYAML lets through whatever its
    conversions of numbers, dates and deep nesting raise.
    """
    import yaml

    with open(regular(path), "rb") as file:
        data = file.read(LARGEST_YAML + 1)
    if len(data) > LARGEST_YAML:
        raise ValueError(f"larger than {LARGEST_YAML:,} bytes")
    try:
        value = yaml.load(data.decode("utf-8"), Loader=loader or yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not YAML: {error}") from error
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not YAML: {type(error).__name__} at a value that cannot be read") from error
    left, count = [value], 0
    while left:
        inside = left.pop()
        found = inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else ()
        if (count := count + len(found)) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, an alias (*NAME) being what it stands for")
        left += found
    return value
