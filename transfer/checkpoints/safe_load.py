"""Tensors and plain values from a stranger's checkpoint file; nothing in it is run.

`torch.load(weights_only=True)` reads what it can. Honest files that it refuses (argparse.Namespace, NumPy
scalars, OmegaConf objects) are read by `InertUnpickler`, which rebuilds tensors and turns every other global
into an inert `Placeholder`: it imports nothing and calls nothing. The same unpickler looks through each file
first, so that a size that lies is refused before anything of that size is allocated; the tensors it makes are
views of the mapped file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import mmap
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from pretrain.common.errors import UserError

logger = logging.getLogger(__name__)

LEGACY_MAGIC = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickled 0x1950a86a20f9469cfc6c, torch.save before 1.6
)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")
MAX_PICKLE_BYTES = 1 << 28
MAX_SAFETENSORS_HEADER = 100_000_000  # the limit of the safetensors library

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))


class Refused(pickle.UnpicklingError):
    """The file is malformed or does something that no checkpoint does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawFile:
    """What a file holds: `value`, safetensors' `metadata`, and the globals that became placeholders."""

    value: Any
    metadata: dict[str, str]
    container: str
    """safetensors, zip or legacy: how the file is packed."""
    placeholders: tuple[str, ...] = ()
    """Names of the globals that were neither imported nor called, sorted."""


class Placeholder:
    """Stands where a file names a class or function: keeps what it was given, does nothing."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name, self.args, self.state, self.items = name, args, None, []  # type: ignore[var-annotated]

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in the file. Only a name: never the thing itself."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    data: torch.UntypedStorage | None  # None while only looking through
    dtype: torch.dtype
    numel: int


FindStorage = Callable[[Any], _Storage]


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's own unpickler in which every opcode that could import or call is replaced.

    `find_storage(persistent_id)` gives a tensor's storage. `placeholders` collects the names not followed.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: Any, find_storage: FindStorage) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._find_storage = find_storage
        self.placeholders: set[str] = set()

    def find_class(self, module: str, name: str) -> _Global:
        return _Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        return self._find_storage(pid)

    def _call(self, target: Any, args: Any) -> Any:
        if not isinstance(target, _Global) or not isinstance(args, tuple):
            if isinstance(target, Placeholder):
                return Placeholder(f"{target.name}()", args)
            raise Refused(f"the file calls a {type(target).__name__}")
        if target.name in ("collections.OrderedDict", "builtins.dict") and not args:
            return OrderedDict()
        if target.name == "collections.OrderedDict" and len(args) == 1 and isinstance(args[0], list):
            return OrderedDict(_pair(item) for item in args[0])
        if target.name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
            return self._call(args[0], args[2])
        rebuild = _REBUILD.get(target.name)
        if rebuild is None:
            self.placeholders.add(target.name)
            return Placeholder(target.name, args)
        return rebuild(*args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], (*args, kwargs))

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii", "replace") for _ in range(2))
        self.append(self._call(_Global(f"{module}.{name}"), tuple(self.pop_mark())))

    def load_obj(self) -> None:
        target, *args = self.pop_mark()
        self.append(self._call(target, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(
            target, (OrderedDict, torch.Tensor, _LookedAt)
        ):  # their attributes are not needed
            raise Refused(f"the file sets attributes of a {type(target).__name__}")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Placeholder)):
            raise Refused(f"the file appends to a {type(target).__name__}")
        (target.items if isinstance(target, Placeholder) else target).extend(items)

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _update(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if len(flat) % 2:
            raise Refused("a key without a value")
        pairs = list(zip(flat[::2], flat[1::2]))
        if isinstance(target, Placeholder):
            target.items.extend(pairs)
        elif type(target) in (dict, OrderedDict):
            target.update(_pair(pair) for pair in pairs)
        else:
            raise Refused(f"the file sets items of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def load_dict(self) -> None:
        flat = self.pop_mark()
        self.append({})
        self._update(flat)

    def load_additems(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise Refused(f"the file adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(_plain_key(item) for item in items)

    def load_frozenset(self) -> None:
        self.append(frozenset(_plain_key(item) for item in self.pop_mark()))

    def load_refused(self) -> None:
        raise Refused("the file uses a part of pickle that no checkpoint needs")

    for _opcode, _method in (
        (pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_reduce), (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.INST, load_inst), (pickle.OBJ, load_obj), (pickle.BUILD, load_build),
        (pickle.APPEND, load_append), (pickle.APPENDS, load_appends), (pickle.DICT, load_dict),
        (pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems),
        (pickle.ADDITEMS, load_additems), (pickle.FROZENSET, load_frozenset),
        (pickle.EXT1, load_refused), (pickle.EXT2, load_refused), (pickle.EXT4, load_refused),
        (pickle.BYTEARRAY8, load_refused), (pickle.NEXT_BUFFER, load_refused),
        (pickle.READONLY_BUFFER, load_refused),
    ):  # fmt: skip
        dispatch[_opcode[0]] = _method


def _plain_key(key: Any) -> Any:
    """Only plain values and tuples of them are hashed: a tuple nested a million deep ends the process."""
    if isinstance(key, _PLAIN_KEYS) or (
        isinstance(key, tuple) and all(isinstance(k, _PLAIN_KEYS) for k in key)
    ):
        return key
    if isinstance(key, (Placeholder, _Global)):
        return repr(key)
    raise Refused(f"a {type(key).__name__} as a key")


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise Refused("not a pair of key and value")
    return _plain_key(item[0]), item[1]


class _LookedAt:
    """A tensor seen while only looking through the file: its sizes were checked, nothing was made."""

    __slots__ = ()


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor | _LookedAt:
    """A view of `storage`; its extent must lie inside, so that `set_` never grows it."""
    if not isinstance(storage, _Storage):
        raise Refused("a tensor without a storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise Refused("a tensor whose size and stride do not match")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("a tensor with a size that is no number")
    elements, last = 1, offset
    for n, step in zip(size, stride):
        elements *= n
        last += (n - 1) * step
    if elements and (elements > storage.numel or last >= storage.numel):
        raise Refused(f"a tensor of size {size} in a storage of {storage.numel} elements")
    if storage.data is None:
        return _LookedAt()
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, size, stride)  # type: ignore[call-overload]


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, (torch.Tensor, _LookedAt)):
        raise Refused("a parameter without a tensor")
    return data


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}


def load_file(path: str | Path) -> RawFile:
    """Read `path`, however it is packed. Raises UserError for what is no checkpoint or not safe to read."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
        raise UserError(
            f"{path} is a folder; name the weight file in it{': ' if files else ''}{', '.join(files[:5])}"
        )
    with open(path, "rb") as file:
        head = file.read(512)
    try:
        if _is_safetensors(path, head):
            return _load_safetensors(path)
        if head.startswith(b"PK\x03\x04"):
            return _load_torch(path, "zip", _read_zip)
        if head.startswith(LEGACY_MAGIC):
            return _load_torch(path, "legacy", _read_legacy)
    except UserError:
        raise
    except Exception as error:  # a broken file fails in many places of three libraries; none of them is ours
        raise UserError(
            f"{path} cannot be read safely: {str(error) or type(error).__name__}. "
            "It is damaged or no checkpoint; compare its size with the published one and download it again"
        ) from error
    raise UserError(f"{path} is no checkpoint that can be read safely: {_what_else(path, head)}")


def _load_torch(path: Path, container: str, read: Callable[[Path, bool], tuple[Any, set[str]]]) -> RawFile:
    _, placeholders = read(path, False)  # sizes that lie end here
    if not placeholders:
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=container == "zip")
            return RawFile(value=value, metadata={}, container=container)
        except Exception as error:  # it refuses more than the reader below, which says what it skips
            logger.debug("torch.load refused %s: %s", path, error)
    value, placeholders = read(path, True)
    return RawFile(value=value, metadata={}, container=container, placeholders=tuple(sorted(placeholders)))


def _read_zip(path: Path, with_data: bool) -> tuple[Any, set[str]]:
    """torch.save since 1.6: a zip of data.pkl and one uncompressed record a storage."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in records):
            raise UserError(
                f"{path} is a TorchScript archive, a program rather than weights; "
                "save its state_dict with torch.save and give that file"
            )
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive, but not one that torch.save wrote: no data.pkl in it")
        root = pickles[0].removesuffix("data.pkl")
        order = records.get(f"{root}byteorder")
        if order is not None and archive.read(order)[:16].strip() != sys.byteorder.encode():
            raise UserError(f"{path} was written on a machine of another byte order")
        main = records[pickles[0]]
        if main.compress_type != zipfile.ZIP_STORED or main.file_size > MAX_PICKLE_BYTES:
            raise Refused("its data.pkl is compressed or larger than any checkpoint's")
        mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size) if with_data else None

        def find_storage(pid: Any) -> _Storage:
            kind, dtype, key, _, numel = _check_pid(pid, 5)
            info = records.get(f"{root}data/{key}")
            if kind != "storage" or info is None:
                raise Refused(f"storage {key!r} is not in the archive")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != numel * dtype.itemsize:
                raise Refused(
                    f"storage {key!r} says {numel * dtype.itemsize} bytes, the archive {info.file_size}"
                )
            if mapped is None or numel == 0:
                return _Storage(None if mapped is None else torch.UntypedStorage(0), dtype, numel)
            file.seek(info.header_offset + 26)  # local header: lengths of name and extra field, then the data
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if start + info.file_size > path.stat().st_size:
                raise Refused(f"storage {key!r} reaches beyond the end of the file")
            return _Storage(_aligned(mapped[start : start + info.file_size], start), dtype, numel)

        unpickler = InertUnpickler(io.BytesIO(archive.read(main)), find_storage)
        return unpickler.load(), unpickler.placeholders


def _read_legacy(path: Path, with_data: bool) -> tuple[Any, set[str]]:
    """torch.save before 1.6: pickles of magic number, version, system, value, storage keys; data."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        storages: dict[str, _Storage] = {}
        placeholders: set[str] = set()

        def find_storage(pid: Any) -> _Storage:
            if isinstance(pid, tuple) and pid and pid[0] == "module":
                raise UserError(
                    f"{path} holds a whole pickled module, a program; save its state_dict instead"
                )
            _, dtype, key, _, numel, part = _check_pid(pid, 6)
            if numel * dtype.itemsize > size:
                raise Refused(f"storage {key!r} says {numel * dtype.itemsize} bytes, the file has {size}")
            known = storages.setdefault(key, _Storage(None, dtype, numel))
            if (known.dtype, known.numel) != (dtype, numel):
                raise Refused(f"storage {key!r} is described in two ways")
            if part is None:
                return known
            if not isinstance(part, tuple) or len(part) != 3 or any(type(n) is not int for n in part[1:]):
                raise Refused(f"storage {key!r} has a part that is not one")
            _, start, length = part
            if start < 0 or length < 0 or start + length > numel:
                raise Refused(f"a part of storage {key!r} reaches beyond it")
            step = dtype.itemsize
            data = None if known.data is None else known.data[start * step : (start + length) * step]
            return _Storage(data, dtype, length)

        def load() -> Any:
            unpickler = InertUnpickler(view, find_storage)
            value = unpickler.load()
            placeholders.update(unpickler.placeholders)
            return value

        for _ in range(3):
            load()
        start_of_value = view.tell()
        value = load()
        keys = load()
        if not isinstance(keys, list) or {str(k) for k in keys} != set(storages):
            raise Refused("its list of storages does not match its tensors")
        position = view.tell()
        mapped = torch.UntypedStorage.from_file(str(path), False, size) if with_data else None
        for key in map(str, keys):
            known = storages[key]
            end = position + 8 + known.numel * known.dtype.itemsize
            if end > size or struct.unpack("<q", view[position : position + 8])[0] != known.numel:
                raise Refused(f"storage {key!r} is cut off or of another length than its tensors say")
            if mapped is not None:
                data = _aligned(mapped[position + 8 : end], position + 8)
                storages[key] = _Storage(data, known.dtype, known.numel)
            position = end
        if mapped is not None:
            view.seek(start_of_value)
            value = load()
        return value, placeholders


def _aligned(data: torch.UntypedStorage, start: int) -> torch.UntypedStorage:
    """A storage at an odd place of the mapped file is copied: kernels expect aligned elements."""
    return data if start % 16 == 0 else data.clone()


def _check_pid(pid: Any, length: int) -> Any:
    """Storage id ("storage", type, key, location, numel, ...) with the type's dtype in its place."""
    if not isinstance(pid, tuple) or len(pid) != length or not isinstance(pid[1], _Global):
        raise Refused("a storage whose description has another form")
    kind, type_, key, location, numel, *rest = pid
    module, _, name = type_.name.rpartition(".")
    if kind != "storage" or module not in ("torch", "torch.storage") or name not in _STORAGE_DTYPES:
        raise Refused(f"a storage of unknown type {type_.name}")
    if type(numel) is not int or numel < 0 or not isinstance(key, (str, int)):
        raise Refused("a storage whose length is no number")
    return (kind, _STORAGE_DTYPES[name], str(key), location, numel, *rest)


def _is_safetensors(path: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little") if len(head) > 8 else 0
    return 0 < length <= min(MAX_SAFETENSORS_HEADER, path.stat().st_size) and head[8:9] == b"{"


def _load_safetensors(path: Path) -> RawFile:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device="cpu") as file:
        metadata = {str(k): str(v) for k, v in (file.metadata() or {}).items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return RawFile(value=tensors, metadata=metadata, container="safetensors")


def _what_else(path: Path, head: bytes) -> str:
    """What the file looks like instead, and what to do."""
    if not head:
        return "it is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` in its repository"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, so the download went wrong; fetch the file itself"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it, or if PyTorch 0.1 wrote it, save it again with a newer one"
    if path.suffix == ".safetensors":
        return "its safetensors header is damaged or cut off; download it again"
    if head[:1] == b"\x80":
        return _what_pickle(path)
    try:
        json.loads(path.read_bytes()[:1_000_000])
        return "it is a JSON file; name the weight file beside it"
    except ValueError:
        return "neither safetensors nor written by torch.save; download it again if it should be"


def _what_pickle(path: Path) -> str:
    """A plain pickle: DeepMind's BYOL and detectron2's weights are such files."""

    def no_storage(_: Any) -> _Storage:
        raise Refused("a storage in a plain pickle")

    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            value = InertUnpickler(view, no_storage).load()
    except Exception:
        value = None
    if isinstance(value, dict) and ("experiment_state" in value or "target_params" in value):
        return (
            "it is DeepMind's BYOL pickle, whose arrays are rebuilt by functions that the file names. In a "
            "sandbox, unpickle it with JAX and dm-haiku, take online_params and online_state, permute the "
            "HWIO kernels by (3, 2, 0, 1) and save the arrays under torchvision's names with torch.save"
        )
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        names = list(value["model"])
        if any(str(name).startswith(("stem.conv1", "backbone.bottom_up", "res2.")) for name in names):
            return (
                "it is a detectron2 pickle, made by `transfer convert`; give the checkpoint it was made from"
            )
    return "it is a plain pickle, which can run code; save its tensors with torch.save or safetensors"
