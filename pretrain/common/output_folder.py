"""The folder a command writes to: checked before the work, locked during it, with room for what is to come.

One rule for all commands. What a command writes may be there already only if an earlier run of it wrote it:
a marker file names the commands that used the folder, or the content shows that a version without markers
did. Otherwise the command is refused, with the names of those files. Other files are nobody's concern.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from fnmatch import fnmatchcase
from pathlib import Path
from stat import S_ISREG
from typing import Any

import yaml

from pretrain.common.errors import UserError, is_disk_full
from pretrain.common.files import remove_leftovers, write_json
from pretrain.common.locks import Held, hold

MARKER = ".intl-bench.json"
LOCK = ".intl-bench.lock"
FORMAT = "intl-bench/1"
CONFIG = "config.yaml"
LARGEST_CONFIG = 1 << 20  # bytes


class FolderInUse(UserError):
    """Another process holds the folder's lock."""


IsOurs = Callable[[Path], bool]


@contextlib.contextmanager
def output_folder(
    path: str | Path,
    command: str,
    *,
    writes: Sequence[str] = ("*",),
    earlier: IsOurs | type,
    wait_s: float = 0.0,
    main: bool | None = None,
) -> Iterator[Path]:
    """Make `path` the output folder of `command`, and hold its lock for as long as the block lasts.

    `writes` are patterns of the names that it writes or removes at the folder's top. `earlier` says whether
    those that are there, without a marker, are of this command: a function of the folder, or the command's
    settings, whose names are then looked for in config.yaml. Of several ranks the first (`main`; default:
    RANK is 0) locks. Leaves nothing behind where nothing was written. Raises UserError for a folder with
    files of others by those names, in use, not writable or no folder.
    """
    folder = Path(path)
    check_folder(folder, command, writes=writes, earlier=earlier)
    if not (int(os.environ.get("RANK", 0)) == 0 if main is None else main):
        yield folder
        return
    with _held(folder / LOCK, folder, (MARKER, LOCK), folder, wait_s):
        check_folder(folder, command, writes=writes, earlier=earlier)  # again: another may have been quicker
        remove_leftovers(folder)
        commands = marked(folder)
        if command not in commands:
            with _said_in_one_line(folder):
                write_json(folder / MARKER, {"format": FORMAT, "commands": [*commands, command]})
        yield folder


@contextlib.contextmanager
def output_file(path: str | Path, *, earlier: IsOurs) -> Iterator[Path]:
    """Where --output is one file: new, or one that this command wrote (`earlier` says so), and locked."""
    file = Path(path)
    with _said_in_one_line(file):
        if file.is_dir():
            raise UserError(f"--output {file} is a folder; a file is wanted")
        if os.path.lexists(file) and not (file.is_file() and earlier(file)):
            raise UserError(f"--output {file} exists and no earlier run wrote it; choose another name")
    lock = file.with_name(f".{file.name}.lock")
    with _held(lock, file.parent, (lock.name,), file, 0.0):
        remove_leftovers(file.parent, of=file.name)
        try:
            yield file
        finally:
            lock.unlink(missing_ok=True)


def check_folder(
    folder: Path, command: str, *, writes: Sequence[str] = ("*",), earlier: IsOurs | type
) -> None:
    """Raises UserError where `folder` holds what `command` writes and did not write. Writes nothing."""
    is_ours = earlier if not isinstance(earlier, type) else settings_in(earlier)
    with _said_in_one_line(folder):
        try:
            os.lstat(folder)
        except FileNotFoundError:
            return
        if not folder.is_dir():
            raise UserError(f"output folder {folder} is a file; a folder is wanted")
        names = [name for name in visible(folder) if any(fnmatchcase(name, w) for w in writes)]
        commands = marked(folder)
        if not names or command in commands or is_ours(folder):
            return
        names = [name if name.isprintable() else ascii(name) for name in names]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        used = f" (it is that of an earlier `{', '.join(commands)}`)" if commands else ""
        raise UserError(
            f"output folder {folder} holds what no earlier `{command}` wrote and this one would replace: "
            f"{', '.join(names[:3])}{more}{used}; choose another folder"
        )


def marked(folder: Path) -> list[str]:
    """The commands that a folder's marker names; none without a marker of ours."""
    try:
        said = json.loads(_text_of(folder / MARKER))
        return [str(c) for c in said["commands"]] if said["format"] == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def visible(folder: Path) -> list[str]:
    """What is in a folder, sorted, but for hidden files and lost+found."""
    return sorted(n for n in os.listdir(folder) if not n.startswith(".") and n != "lost+found")


def settings_in(settings: type) -> IsOurs:
    """Whether a folder's config.yaml holds the settings of the dataclass `settings`, or of an older form of
    it: everything that must be given, and little else than its names."""
    known = {f.name for f in fields(settings)}
    needed = {f.name for f in fields(settings) if f.default is MISSING and f.default_factory is MISSING}

    def is_ours(folder: Path) -> bool:
        names = set(read_config(folder))
        return needed <= names and len(names & known) > 0.8 * len(names)

    return is_ours


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a folder's config.yaml; empty where there are none that can be read."""
    try:
        said = yaml.safe_load(_text_of(folder / CONFIG))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _text_of(file: Path) -> str:
    """The text of a small file. Raises OSError or ValueError for a large one, and for what is no file."""
    stat = file.stat()
    if not S_ISREG(stat.st_mode) or stat.st_size > LARGEST_CONFIG:
        raise ValueError(f"{file}: no small file")
    return file.read_text(encoding="utf-8")


def need_space(folder: str | Path, size: int, what: str) -> None:
    """Raises UserError unless the disk of `folder` has room for `size` more bytes; `what` names them."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB are free and {size / 1e9:.2f} GB will be written ({what}); free "
            "some space or name another folder"
        )


@contextlib.contextmanager
def _held(lock: Path, folder: Path, own: tuple[str, ...], output: Path, wait_s: float) -> Iterator[None]:
    """Make `folder` and hold the lock in it; at the end, if nothing was written, take away what is `own` and
    the folders that were made."""
    made = []
    with contextlib.ExitStack() as stack:
        try:
            with _said_in_one_line(output):
                for parent in (folder, *folder.parents):
                    if parent.exists():
                        break
                    made.append(parent)
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold(lock, wait_s=wait_s))
        except Held as held:
            raise FolderInUse(
                f"output {output} is in use by {held.by or 'another process'}; wait for it or end it, "
                "or choose another output"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if not visible(folder):
                    for name in (f"{lock.name}.by", *own):
                        (folder / name).unlink(missing_ok=True)
                    for parent in made:
                        parent.rmdir()


@contextlib.contextmanager
def _said_in_one_line(path: Path) -> Iterator[None]:
    """What the system says of an impossible --output."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null in the name
        if isinstance(error, UserError):
            raise
        said = error.strerror if isinstance(error, OSError) else str(error)
        todo = "free some space" if is_disk_full(error) else "choose another folder"
        raise UserError(f"output {str(path)!r}: cannot be written to ({said}); {todo}") from error
