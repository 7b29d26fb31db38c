"""A run's checkpoints and backbone files, each written whole or not at all, whenever the run is killed."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.common.errors import RunFailed, UserError, is_disk_full
from pretrain.common.files import atomic_path, set_usual_mode

logger = logging.getLogger(__name__)

FORMAT = "intl-bench/1"


class NotSaved(RunFailed):
    """A checkpoint could not be written; the one before it is still there."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain values) atomically. Raises NotSaved; `path` then keeps what it had."""
    try:
        with atomic_path(path) as aside:
            torch.save({"format": FORMAT, **state}, aside)
    except (OSError, RuntimeError) as error:
        kept = "the last good one is kept" if path.exists() else "there is none before it"
        reason = _why_not_written(error, path.parent, state)
        raise NotSaved(f"{path}: checkpoint not saved, {reason}; {kept}") from error


def try_to_save(path: Path, state: Mapping[str, Any], *, must_be_saved: bool) -> None:
    """`save_checkpoint`, after whose failure the run goes on, unless it `must_be_saved`."""
    try:
        save_checkpoint(path, state)
    except NotSaved as error:
        if must_be_saved:
            raise
        _tell_not_saved(error)


def _tell_not_saved(error: NotSaved) -> None:
    logger.error("%s; training goes on and will try again", error)


def _why_not_written(error: Exception, folder: Path, state: Mapping[str, Any]) -> str:
    """The reason in words. torch's writer hides errno, so free space is compared with the state's size."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    if is_disk_full(error):
        return "the disk is full"
    if isinstance(error, OSError):
        return said
    free, wanted = shutil.disk_usage(folder).free, size_of(state)
    if "writ" in said and free < wanted:
        return "the disk is full"
    return f"{said} ({free / 1e9:.1f} GB are free for {wanted / 1e9:.1f}: is a quota used up?)"


def size_of(value: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def load_checkpoint(path: Path, *, formats: tuple[str | None, ...] = (FORMAT,)) -> dict[str, Any]:
    """Read a checkpoint of this project, running nothing from it. Raises UserError for any other file and
    for one whose bytes are not those that were written."""
    try:
        damaged = damaged_record(path)
        if damaged is not None:
            raise UserError(
                f"{path}: damaged, {damaged} has other bytes than were written; remove it, or take an "
                "earlier copy, and run again"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a seek in a cut-off file gives
            raise UserError(f"{path}: cannot be read ({error.strerror}); is the disk there?") from error
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); remove it") from error
    if not isinstance(state, dict) or state.get("format") not in formats:
        raise UserError(f"{path}: not a checkpoint of this project; choose another --output")
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint of this project; its tensors are not read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return False
    return isinstance(state, dict) and state.get("format") == FORMAT


def damaged_record(path: Path) -> str | None:
    """The first record of a file of torch.save whose content is not what its CRC-32 says, or None.

    torch.load compares none. Raises OSError and zipfile.BadZipFile.
    """
    with zipfile.ZipFile(path) as archive:
        return (archive.testzip() or "").partition("/")[2] or None


class CheckpointWriter:
    """Writes checkpoints in a thread, so that training goes on; at most one is on its way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread: threading.Thread | None = None
        self._error: NotSaved | None = None

    def save(self, state: Mapping[str, Any], *, also: Path | None = None) -> None:
        """Copy `state` now and write it soon, to a second file too where `also` names one."""
        self.wait()
        copied = to_host(state)
        arrived = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if arrived is not None:
            arrived.record()  # behind the copies, before the next step's kernels

        def write() -> None:
            try:
                if arrived is not None:
                    arrived.synchronize()
                save_checkpoint(self.path, copied)
                if also is not None:
                    save_checkpoint(also, copied)
            except NotSaved as error:
                self._error = error
            except Exception as error:
                self._error = NotSaved(f"{self.path}: checkpoint not saved, {type(error).__name__}: {error}")

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self, *, must_be_saved: bool = False) -> None:
        """Wait for the last write; when it failed, log that, or raise NotSaved if `must_be_saved`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            if must_be_saved:
                raise error
            _tell_not_saved(error)


def to_host(value: Any) -> Any:
    """A copy of nested dicts, lists and tensors, on the CPU, that later steps cannot change.

    What lies on a GPU is on its way when this returns, ahead of all that its stream is given afterwards.
    """
    if isinstance(value, Tensor):
        if value.is_cuda:  # into pinned memory, so that the host need not wait
            out = torch.empty_like(value, device="cpu", pin_memory=True)
            return out.copy_(value.detach(), non_blocking=True)
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {k: to_host(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_host(v) for v in value]
    return value


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file whose bytes are a function of its content.

    The library writes the metadata in an order of chance; here they are sorted in place after it.
    """
    save_file(dict(state), path, metadata=dict(metadata))
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(ordered) == length, "the tensors begin where the header ends"
        file.seek(8)
        file.write(ordered)
    set_usual_mode(path)


def save_backbone(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """The backbone alone under timm's keys, for exchange; metadata values become strings.

    The same content gives the same bytes.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with atomic_path(path) as aside:
        write_safetensors(aside, tensors, {"format": FORMAT, **{k: _spell(v) for k, v in metadata.items()}})


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
