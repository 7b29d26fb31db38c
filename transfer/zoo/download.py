"""A published file, fetched once into the user's cache folder: bounded, resumed where it was cut, checked."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.common.errors import UserError, is_disk_full
from pretrain.common.files import read_json, whole_number, write_json
from pretrain.common.locks import hold
from pretrain.common.output_folder import need_space
from pretrain.common.progress import Progress
from pretrain.data.cache import cache_dir
from transfer.options.weights import WeightsOptions
from transfer.zoo.manifest import PREFIX, Entry, find_entry

logger = logging.getLogger(__name__)

LARGEST = 32 << 30
"""Bytes; the largest published ViTs with optimizer and heads have less."""
BLOCK = 1 << 20
MOST_ATTEMPTS = 30
WAIT_S = 60
PAGE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+)/")
GOOGLE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"


def located(weights: str | Path, asked: WeightsOptions) -> tuple[Path, WeightsOptions, Entry | None]:
    """The file that --weights means, how to read it, and the zoo's entry of a zoo:NAME, which is fetched.

    Raises UserError.
    """
    if not str(weights).startswith(PREFIX):
        if asked.zoo is not None:
            raise UserError(f"--zoo {asked.zoo}: goes with --weights zoo:NAME, and {weights} is none")
        return Path(weights), asked, None
    entry = find_entry(str(weights), asked.zoo)
    return fetch(entry), entry.reading(asked), entry


def place_of(entry: Entry) -> Path:
    """Where the file is kept once it is fetched, or put by hand."""
    suffix = re.search(r"(?:\.pth\.tar|\.[A-Za-z0-9]{1,12})$", urllib.parse.urlparse(entry.url).path)
    url = hashlib.sha256(entry.url.encode()).hexdigest()[:6]  # another manifest may have another file
    return cache_dir() / "zoo" / f"{entry.name}-{url}{suffix[0] if suffix else '.pth'}"


def fetch(entry: Entry) -> Path:
    """The file of an entry, fetched unless it is there. Raises UserError for one that cannot be had, is not
    the file of the manifest's hash, or a web page."""
    path = place_of(entry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold(path.with_name(f".{path.name}.lock"), wait_s=None):
            if not path.is_file():
                _receive(entry, path)
                return path
    except OSError as error:
        if not path.is_file():  # such as a cache folder that nobody may write to
            raise UserError(f"{PREFIX}{entry.name}: {path} cannot be written ({error})") from error
    if wrong := _wrong(entry, path):
        raise UserError(f"{path}: {wrong}; delete it, and it is fetched anew, or give it as --weights {path}")
    return path


def _receive(entry: Entry, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    by_hand = f"fetch {entry.url} where there is a network, and put it at {path}"
    for attempt in itertools.count(1):
        before = _size(part)
        try:
            _go_on(entry, part)
            break
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
        ) as error:  # ValueError: a redirection to no URL
            if is_disk_full(error) or isinstance(error, UserError):
                raise
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if _size(part) > before and attempt < MOST_ATTEMPTS:
                time.sleep(min(0.05 * 2**attempt, 10))
                logger.info("%s: cut off (%s); going on from %d bytes", entry.url, reason, _size(part))
                continue
            raise UserError(
                f"{PREFIX}{entry.name}: {entry.url} could not be fetched ({reason}); run it again, to go on "
                f"from byte {before}, or {by_hand}"
            ) from error
    with open(part, "rb") as file:
        head = file.read(512).lstrip().lower()
    wrong = "is a web page" if head.startswith((b"<!doctype html", b"<html")) else _wrong(entry, part)
    if wrong:
        part.unlink()
        raise UserError(f"{PREFIX}{entry.name}: what {entry.url} gives {wrong}; {by_hand}")
    os.replace(part, path)
    _note(part).unlink(missing_ok=True)
    if not entry.sha256:
        logger.info("%s%s: sha256 %s; its manifest has none yet", PREFIX, entry.name, _digest(path, "sha256"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _note(part: Path) -> Path:
    """Which version of which file a part is of."""
    return part.with_name(f"{part.name}.json")


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What is still to come: from byte `start` on, of `total` bytes (None: not said)."""

    stream: BinaryIO
    start: int
    total: int | None
    version: str
    """What changes with the file's content; empty where the server does not say."""


def _go_on(entry: Entry, part: Path) -> None:
    """Fetch what `part` lacks. Raises OSError where it was cut off, UserError where it is too large."""
    url = GOOGLE.format(page[1]) if (page := PAGE.match(entry.url)) else entry.url
    note = read_json(_note(part))
    known = str(note.get("version") or "") if note.get("url") == url else ""
    have = _size(part) if known else 0
    opened = _open_file(url, have, known) if url.startswith("file:") else _open_web(url, have, known)
    with opened as answer:
        total = answer.total
        if (total or 0) > LARGEST:
            raise UserError(f"{PREFIX}{entry.name}: {url} has {total:,} bytes; {LARGEST:,} are the most")
        need_space(part.parent, (total or 0) - answer.start, f"{PREFIX}{entry.name}")
        write_json(_note(part), {"url": url, "version": answer.version})
        mb = 1_000_000
        with (
            open(part, "r+b" if answer.start else "wb") as file,
            Progress((total or 0) // mb, label=entry.name, unit="MB", start=answer.start // mb) as bar,
        ):
            done = answer.start
            file.seek(done)
            file.truncate()
            while block := answer.stream.read(BLOCK):
                if (done := done + len(block)) > LARGEST:
                    raise UserError(f"{PREFIX}{entry.name}: {url} has more than {LARGEST:,} bytes")
                file.write(block)
                if done // mb > bar.done:
                    bar.update(done // mb - bar.done)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise OSError(f"cut off after {done:,} of {total:,} bytes")
    if not done:
        raise OSError("an empty answer")


@contextlib.contextmanager
def _open_file(url: str, have: int, known: str) -> Iterator[_Answer]:
    path = urllib.request.url2pathname(urllib.parse.urlparse(url).path)
    if not os.path.isfile(path):  # a device has no end, and a pipe may have no writer
        raise FileNotFoundError(f"{path} is no file")
    with open(path, "rb") as stream:
        stat = os.fstat(stream.fileno())
        version = f"{stat.st_size} {stat.st_mtime_ns}"
        start = have if version == known and have <= stat.st_size else 0
        stream.seek(start)
        yield _Answer(stream=stream, start=start, total=stat.st_size, version=version)


@contextlib.contextmanager
def _open_web(url: str, have: int, known: str) -> Iterator[_Answer]:
    """A server that cannot go on, or has another file by now (RFC 9110, 13.1.5), sends all of it."""
    headers = {"User-Agent": "intl-bench", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": known}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=WAIT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # nothing lies beyond what is there: all of it, or of another file
            raise
        answer = urllib.request.urlopen(
            urllib.request.Request(url, headers={"User-Agent": "intl-bench"}), timeout=WAIT_S
        )
    with answer:
        tag = answer.headers.get("ETag") or ""
        version = answer.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
        total = whole_number(answer.headers.get("Content-Length"))
        start = 0
        if answer.status == 206:
            said = re.fullmatch(
                r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", answer.headers.get("Content-Range", "")
            )
            if said is None or int(said[1]) != have:
                raise OSError(f"asked for bytes from {have} on, got {answer.headers.get('Content-Range')!r}")
            start, total = have, int(said[2])
        yield _Answer(stream=answer, start=start, total=total, version=version)


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _wrong(entry: Entry, path: Path) -> str:
    """In what a file is not the entry's, by the hashes that are known of it; empty where it is."""
    for kind in ("sha256", "md5"):
        said = getattr(entry, kind)
        if said and not (found := _digest(path, kind)).startswith(said):
            return f"has the {kind} {found}, and the manifest says {said}"
    return ""
